"""What a run writes down while it trains: metrics, pictures, progress, and where its time went."""

import contextlib
import io
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import jax
import numpy as np
import PIL.Image
import tqdm
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from varedit_jax.errors import UserError

METRICS_FILE = "metrics.jsonl"
SAMPLES = "samples"


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


class Ledger:
    """Metrics to TensorBoard and metrics.jsonl, pictures to TensorBoard and samples/, progress to the screen.

    Only the first process writes; the others' calls do nothing.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], *, first_step: int, steps: int, screen: TextIO | None = None
    ) -> None:
        """Opens the ledger of a run that goes on at `first_step` (0 for a new one) towards `steps`.

        What an earlier process wrote down for `first_step` and later is dropped, for it comes again.
        `screen` is standard error if not given: a progress bar on a terminal, plain lines elsewhere.
        """
        self._writes = jax.process_index() == 0
        self._screen = screen or sys.stderr
        self._steps = steps
        self._bar: tqdm.tqdm | None = None
        if not self._writes:
            return
        self._folder = pathlib.Path(workdir)
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            _drop_from(self._folder / METRICS_FILE, first_step)
            # Unbuffered, and TensorBoard's file without a thread of its own: nothing written is lost, whatever ends
            # the process, and a full disk is noticed where it is met.
            self._lines = (self._folder / METRICS_FILE).open("ab", buffering=0)
            self._board = EventsWriter(str(self._folder / "events"), f".{first_step}")
            if first_step:  # hides what an earlier process wrote from this step on
                self._publish(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
        if self._screen.isatty():
            self._bar = tqdm.tqdm(
                total=steps,
                initial=first_step,
                file=self._screen,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            )

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of one step; a vector [K] becomes `name/scale_k`. A value that is not finite is null."""
        if not self._writes:
            return
        values = dict(flat_metrics(metrics))
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        with writing(self._folder):
            self._lines.write(json.dumps(line).encode() + b"\n")
            self._publish(Event(step=step, summary=Summary(value=scalars)))

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Writes uint8 pictures [y, x, 3], as samples/NAME_STEP.png too."""
        if not self._writes:
            return
        for name, picture in pictures.items():
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
                raise ValueError(f"picture {name!r} is {picture.dtype}{list(picture.shape)}, not uint8[y, x, 3]")
            encoded = io.BytesIO()
            PIL.Image.fromarray(picture).save(encoded, format="png")
            height, width, _ = picture.shape
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded.getvalue())
            with writing(self._folder):
                (self._folder / SAMPLES).mkdir(exist_ok=True)
                (self._folder / SAMPLES / f"{name}_{step:07d}.png").write_bytes(encoded.getvalue())
                self._publish(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)])))

    def progress(
        self,
        step: int,
        metrics: Mapping[str, Any],
        *,
        examples_per_second: float,
        eta: float,
        mfu: float | None = None,
    ) -> None:
        """Shows where the run is after `step` updates. `eta` is the seconds that are left, `mfu` a share."""
        shown = [f"{name} {float(metrics[name]):.4g}" for name in ("loss", "bit_accuracy") if name in metrics]
        shown.append(f"{examples_per_second:.3g} examples/s")
        if mfu is not None:
            shown.append(f"MFU {mfu:.1%}")
        shown.append(f"{duration(eta)} left")
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(shown), refresh=False)
        else:
            self.say(", ".join([f"step {step}/{self._steps}", *shown]))

    def advance(self) -> None:
        """Counts one step on the progress bar, where there is one."""
        if self._bar is not None:
            self._bar.update()

    def say(self, sentence: str) -> None:
        """Shows a line to the user."""
        if self._bar is not None:
            self._bar.write(sentence, file=self._screen)
        else:
            say(sentence, self._screen)

    def close(self) -> None:
        """Writes out what is pending."""
        if not self._writes:
            return
        if self._bar is not None:
            self._bar.close()
        self._lines.close()
        with contextlib.suppress(OSError):  # of what a full disk did not take, which has been said
            self._board.close()

    def _publish(self, event: Event) -> None:
        """Writes an event to TensorBoard's file."""
        event.wall_time = time.time()
        self._board.write_event(event)
        self._board.flush()


@contextlib.contextmanager
def writing(folder: pathlib.Path) -> Iterator[None]:
    """Turns a failure to write in `folder` into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"writing in {folder} failed: {error.strerror}; put that right and run the same command again"
        ) from error


def say(sentence: str, screen: TextIO | None = None) -> None:
    """Shows a line to the user, on standard error if no screen is given; the first process does it for all."""
    if jax.process_index() == 0:
        print(sentence, file=screen or sys.stderr, flush=True)


def flat_metrics(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and numbers of metrics: a scalar as it is, entry k of a vector as `name/scale_k`."""
    for name, value in metrics.items():
        array = np.asarray(value)
        if array.ndim == 0:
            yield name, float(array)
        elif array.ndim == 1:
            for k, entry in enumerate(array):
                yield f"{name}/scale_{k}", float(entry)
        else:
            raise ValueError(f"metric {name!r} has shape {list(array.shape)}; metrics are scalars or vectors [K]")


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in order; a last line that was cut short is left out."""
    path = pathlib.Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # the process was killed while writing it
            continue
    return lines


def duration(seconds: float) -> str:
    """Seconds as text: 4 s, 3 min, 2 h 05 min."""
    if not math.isfinite(seconds):
        return "?"
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _drop_from(path: pathlib.Path, first_step: int) -> None:
    """Removes the lines of `first_step` and later."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path.parent) if line["step"] < first_step]
    draft = path.with_suffix(".draft")
    draft.write_text("".join(json.dumps(line) + "\n" for line in kept))
    draft.replace(path)
