"""Goodput: the time of a run by kind over all its processes, and the share of it that was productive.

Process 0 appends lines to goodput.jsonl while it trains; lines are never changed, so those of a killed process remain.
A line has the seconds since the start of its process, by kind:

  productive   steps: computing, and waiting for their results
  data         waiting for a batch while no step was running
  compile      tracing and compiling steps
  checkpoint   saving and restoring
  evaluate     evaluation and sampled images
  startup      from the start of the process to the first step, without the kinds above
  other        anything else, such as writing metrics, and steps computed twice to verify them
  lost         skipped steps (not finite); everything that an earlier process did after its last checkpoint; and the
               time from the last line of a process to the start of the next

Lines are written whenever metrics are logged; what a process did between two lines is assumed to be spread evenly.
"""

import collections
import contextlib
import dataclasses
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import psutil

from varedit_jax.errors import UserError
from varedit_jax.storage.jsonl import LineWriter, read_lines
from varedit_jax.storage.paths import PathLike, resolve

GOODPUT_FILE = "goodput.jsonl"

KINDS = ("productive", "data", "compile", "checkpoint", "evaluate", "startup", "other", "lost")
_KIND_OF = {
    "step": "productive",
    "skipped": "lost",
    "data": "data",
    "compile": "compile",
    "save": "checkpoint",
    "restore": "checkpoint",
    "evaluate": "evaluate",
    "sample": "evaluate",
}

Seconds = dict[str, float]  # by kind


class Stopwatch:
    """Seconds spent in each part of a run: data, step, skipped, compile, evaluate, sample, save, restore, verify."""

    def __init__(self) -> None:
        """Starts now."""
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Adds the time the block takes to `part`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start

    def move(self, part: str, other: str, seconds: float) -> None:
        """Moves `seconds` from `part` to `other`."""
        self.seconds[part] -= seconds
        self.seconds[other] += seconds

    def share(self, part: str) -> float:
        """Returns the time of `part` as a share of the time since the start."""
        return self.seconds[part] / (time.perf_counter() - self._start)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """One line of goodput.jsonl."""

    process: str  # unique among the processes of the run
    start: float  # of the process, seconds since 1970
    time: float  # of the line, in the same unit
    first_step: int  # of the process
    step: int  # updates made when the line was written
    seconds: Mapping[str, float]  # by kind, since the start; they sum to time - start


class Goodput:
    """Writes the lines of this process, and counts those of earlier ones. `close` it after the last step.

    Only process 0 writes; in the others `record` returns {}. Raises UserError if the disk is full.
    """

    def __init__(
        self, workdir: PathLike, clock: Stopwatch, first_step: int, *, start: float | None = None, now: Any = time.time
    ) -> None:
        """Counts the time up to now as start-up: create it right before step `first_step`.

        Args:
          workdir: directory of the run.
          clock: the loop's stopwatch, which keeps counting.
          first_step: of this process.
          start: of this process, seconds since 1970; the system's account of it by default.
          now: a clock, seconds since 1970.
        """
        self._writes = jax.process_index() == 0
        self._clock, self._first_step, self._now = clock, first_step, now
        if not self._writes:
            return
        earlier = read_goodput(workdir)
        start = round(psutil.Process().create_time(), 3) if start is None else start  # as lines have it
        # A process can resume a run twice; its second time begins where the first ended.
        self._start = max([start, *(moment.time for moment in earlier if moment.start <= start)])
        self._process = f"{os.getpid()}-{now():.6f}"
        self._before = _totals(earlier, first_step, self._start)
        self._startup = max(now() - self._start - sum(clock.seconds.values()), 0.0)
        self._lines = LineWriter(resolve(workdir) / GOODPUT_FILE)
        self._step = first_step
        self.record(first_step)

    def record(self, step: int) -> Seconds:
        """Writes a line after `step` updates; returns the shares of the whole run by kind, which sum to 1."""
        if not self._writes:
            return {}
        self._step = step
        seconds = dict.fromkeys(KINDS, 0.0)
        for part, spent in self._clock.seconds.items():
            seconds[_KIND_OF.get(part, "other")] += spent
        seconds["startup"] = self._startup
        # Parts can overlap, and clocks be set back: then the line ends when its parts do.
        spent = sum(seconds.values())
        end = max(self._now(), self._start + spent)
        seconds["other"] += end - self._start - spent
        moment = Moment(
            process=self._process,
            start=round(self._start, 3),
            time=round(end, 3),
            first_step=self._first_step,
            step=step,
            seconds={kind: round(value, 3) for kind, value in seconds.items()},
        )
        self._lines.append(dataclasses.asdict(moment))
        return _shares({kind: self._before[kind] + seconds[kind] for kind in KINDS})

    def close(self) -> None:
        """Writes the last line, after everything is saved."""
        if self._writes:
            with contextlib.closing(self._lines), contextlib.suppress(UserError):  # an earlier line reported it
                self.record(self._step)


def read_goodput(workdir: PathLike) -> list[Moment]:
    """Returns the lines of a run's goodput.jsonl in order, without those that a kill cut short."""
    moments = []
    for line in read_lines(resolve(workdir) / GOODPUT_FILE):
        with contextlib.suppress(TypeError):  # cut short, and by chance still JSON
            moments.append(Moment(**line))
    return moments


def run_seconds(workdir: PathLike) -> Seconds:
    """Returns the seconds of a run by kind, from the start of its first process to its last line."""
    return _totals(read_goodput(workdir), None, None)


def run_shares(workdir: PathLike) -> Seconds:
    """Returns the same as shares that sum to 1; `productive` is the goodput. All 0 for a run without lines."""
    return _shares(run_seconds(workdir))


def _totals(moments: Iterable[Moment], next_step: int | None, next_start: float | None) -> Seconds:
    """Returns the seconds by kind of the processes of `moments`, and of the gaps between them.

    If a later process resumed at `next_step` at the time `next_start`, what they did past that step is lost.
    """
    processes: dict[str, list[Moment]] = {}
    for moment in moments:
        processes.setdefault(moment.process, []).append(moment)
    totals = dict.fromkeys(KINDS, 0.0)
    for process in reversed(list(processes.values())):
        last = process[-1]
        kept = _kept(process, next_step)
        for kind in KINDS:
            totals[kind] += kept[kind]
        totals["lost"] += last.time - last.start - sum(kept.values())
        if next_start is not None:
            totals["lost"] += max(next_start - last.time, 0.0)
        # A later process may have resumed from an earlier step than the next one.
        next_step = last.first_step if next_step is None else min(next_step, last.first_step)
        next_start = last.start
    return totals


def _kept(process: list[Moment], until: int | None) -> Seconds:
    """Returns the seconds by kind of one process until it had made `until` steps."""
    last = process[-1]
    if until is None or last.step <= until:
        return {kind: last.seconds.get(kind, 0.0) for kind in KINDS}
    before = [moment for moment in process if moment.step <= until]
    if not before:  # it started past the step that the run resumed from
        return dict.fromkeys(KINDS, 0.0)
    at, after = before[-1], process[len(before)]
    share = (until - at.step) / (after.step - at.step)
    return {kind: (1 - share) * at.seconds.get(kind, 0.0) + share * after.seconds.get(kind, 0.0) for kind in KINDS}


def _shares(seconds: Seconds) -> Seconds:
    total = sum(seconds.values())
    return {kind: value / total if total > 0 else 0.0 for kind, value in seconds.items()}
