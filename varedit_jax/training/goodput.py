"""Goodput: the time of a run by kind over all its processes, and the share of it that made steps which count.

Process 0 appends lines to goodput.jsonl while it trains; nothing is ever taken back, so a killed process leaves what it
wrote up to then. A line has seconds since the start of its process, by kind:

  productive   steps: computing, and waiting for their results
  data         waiting for a batch while no step was running
  compile      tracing and compiling steps
  checkpoint   saving and restoring
  evaluate     evaluation and sampled images
  startup      from the start of the process to the first step, but for the kinds above
  other        anything else: writing metrics, say
  lost         steps that were skipped, their numbers not being finite; steps that an earlier process made after its
               last checkpoint, with all it did since; and the time from the last line of a process to the start of the
               next, whether it was dead, waiting or never noticed

Lines are written as often as the log, and what a process did between two lines is taken to be spread evenly.
"""

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

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
    """Seconds spent in each named part of a run: data, step, skipped, compile, evaluate, sample, save, restore."""

    def __init__(self) -> None:
        """Starts now."""
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Adds the time the block takes to `part`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def move(self, part: str, other: str, seconds: float) -> None:
        """Counts so many seconds of `part` as time of `other` instead."""
        self.seconds[part] = self.seconds.get(part, 0.0) - seconds
        self.seconds[other] = self.seconds.get(other, 0.0) + seconds

    def share(self, part: str) -> float:
        """Time of `part` as a share of all the time since the start."""
        return self.seconds.get(part, 0.0) / (time.perf_counter() - self._start)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """One line of goodput.jsonl."""

    process: str  # a name no other process of the run has
    start: float  # of the process, seconds since 1970
    time: float  # of the line, likewise
    first_step: int  # the step the process began with
    step: int  # updates made when the line was written
    seconds: Mapping[str, float]  # by kind, since the start; together time - start


class Goodput:
    """Writes the lines of this process and knows those of the ones before it. A context manager: it ends with a line.

    Only the first process of several writes; for the others everything is empty. A full disk is a UserError.
    """

    def __init__(
        self,
        workdir: PathLike,
        clock: Stopwatch,
        first_step: int,
        *,
        start: float | None = None,
        now: Any = time.time,
    ) -> None:
        """To be made when the run is about to take step `first_step`; what came before is start-up.

        Args:
          workdir: directory of the run.
          clock: the loop's stopwatch, which keeps counting.
          first_step: of this process.
          start: of this process, seconds since 1970; found out if not given.
          now: a clock, seconds since 1970.
        """
        self._writes = jax.process_index() == 0
        self._clock, self._first_step, self._now = clock, first_step, now
        self._closed = False
        if not self._writes:
            return
        path = resolve(workdir) / GOODPUT_FILE
        earlier = read_goodput(workdir)
        start = process_start() if start is None else start
        # A process can resume a run twice; its second time begins where the first ended.
        self._start = max([start, *(moment.time for moment in earlier if moment.start <= start)])
        self._process = f"{os.getpid()}-{now():.6f}"
        self._before = _totals(earlier, first_step, self._start)
        self._startup = max(now() - self._start - sum(clock.seconds.values()), 0.0)
        self._lines = LineWriter(path)
        self._step = first_step
        self.record(first_step)

    def record(self, step: int) -> Seconds:
        """Writes a line when `step` updates are made; gives the shares of the whole run by kind, summing to 1."""
        if not self._writes:
            return {}
        self._step = step
        seconds = dict.fromkeys(KINDS, 0.0)
        for part, spent in self._clock.seconds.items():
            seconds[_KIND_OF.get(part, "other")] += spent
        seconds["startup"] = self._startup
        # Parts can run side by side, and clocks be set back: then the line ends when its parts do.
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
        """Writes the last line: to be called when all is saved."""
        if self._writes and not self._closed:
            self._closed = True
            with contextlib.closing(self._lines), contextlib.suppress(UserError):  # that has been said before
                self.record(self._step)

    def __enter__(self) -> "Goodput":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_goodput(workdir: PathLike) -> list[Moment]:
    """The lines of a run's goodput.jsonl in order; a line that was cut short by a kill is left out."""
    moments = []
    for line in read_lines(resolve(workdir) / GOODPUT_FILE):
        with contextlib.suppress(TypeError):  # cut short, and by chance still JSON
            moments.append(Moment(**line))
    return moments


def run_seconds(workdir: PathLike) -> Seconds:
    """Seconds of a whole run by kind, up to its last line; together the time since its first process started."""
    return _totals(read_goodput(workdir), None, None)


def run_shares(workdir: PathLike) -> Seconds:
    """The same as shares, summing to 1; `productive` is the goodput. All 0 for a run without lines."""
    return _shares(run_seconds(workdir))


def process_start() -> float:
    """Returns the start of this process, seconds since 1970; now, where the system does not tell."""
    now = time.time()
    try:
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
        age = uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return now
    return now - max(age, 0.0)


def _totals(moments: Iterable[Moment], next_step: int | None, next_start: float | None) -> Seconds:
    """Seconds by kind of the processes of `moments`, and of the gaps between them.

    A process starts at `next_step` and `next_start` after them, if given: what they did past it is lost.
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
        # A later process may have gone back farther than the next one.
        next_step = last.first_step if next_step is None else min(next_step, last.first_step)
        next_start = last.start
    return totals


def _kept(process: list[Moment], until: int | None) -> Seconds:
    """Seconds by kind of one process, those after it had made `until` steps left out."""
    last = process[-1]
    if until is None or last.step <= until:
        return {kind: last.seconds.get(kind, 0.0) for kind in KINDS}
    before = [moment for moment in process if moment.step <= until]
    if not before:  # it began beyond the step that the run resumed from
        return dict.fromkeys(KINDS, 0.0)
    at, after = before[-1], process[len(before)]
    share = (until - at.step) / (after.step - at.step)
    return {kind: (1 - share) * at.seconds.get(kind, 0.0) + share * after.seconds.get(kind, 0.0) for kind in KINDS}


def _shares(seconds: Seconds) -> Seconds:
    total = sum(seconds.values())
    return {kind: value / total if total > 0 else 0.0 for kind, value in seconds.items()}
