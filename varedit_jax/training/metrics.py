"""Metrics of a run: a JSONL file, TensorBoard, images and progress; each step is reported one step late."""

import collections
import contextlib
import dataclasses
import math
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import jax
import numpy as np
import PIL.Image
from tensorboardX import SummaryWriter

from varedit_jax import hardware
from varedit_jax.parallel.processes import say
from varedit_jax.progress import Progress
from varedit_jax.storage.disk import explained
from varedit_jax.storage.files import copy, make_directory, replacing
from varedit_jax.storage.jsonl import LineWriter, keep_lines, read_lines
from varedit_jax.storage.paths import PathLike, children, is_remote, resolve
from varedit_jax.training import hosts
from varedit_jax.training.flops import Flops
from varedit_jax.training.goodput import Goodput, Stopwatch
from varedit_jax.types import Metrics

METRICS_FILE = "metrics.jsonl"
SAMPLES = "samples"


class MetricsWriter:
    """Writes metrics to TensorBoard and metrics.jsonl, images to TensorBoard and samples/, progress to the screen.

    Only process 0 writes; the others' calls do nothing.
    """

    def __init__(self, workdir: PathLike, *, first_step: int, steps: int, screen: TextIO | None = None) -> None:
        """Opens the metrics of a run that resumes at `first_step` (0 for a new one) towards `steps`.

        Drops what an earlier process logged for `first_step` and later, because these steps are repeated.
        `screen` is standard error by default: a progress bar on a terminal, plain lines elsewhere.
        """
        self._writes = jax.process_index() == 0
        self._screen = screen or sys.stderr
        self._steps = steps
        self._bar = Progress(
            total=steps,
            initial=first_step,
            file=self._screen,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            disable=not (self._writes and self._screen.isatty()),
        )
        if not self._writes:
            return
        self._directory = resolve(workdir)
        path = self._directory / METRICS_FILE
        keep_lines(path, lambda line: _has_step(line) and line["step"] < first_step)
        self._lines = LineWriter(path)
        # Object stores cannot append: TensorBoard writes to a local file, which `flush` copies.
        self._local = tempfile.TemporaryDirectory() if is_remote(path) else None
        self._board = SummaryWriter(
            self._local.name if self._local else str(self._directory),
            purge_step=first_step or None,  # hides what an earlier process wrote from this step on
            filename_suffix=f".{first_step}",
            flush_secs=30,
        )

    def scalars(self, step: int, metrics: Metrics) -> None:
        """Writes the metrics of one step; a vector [K] becomes `name/scale_k`. A value that is not finite is null."""
        if not self._writes:
            return
        values = dict(flat_metrics(metrics))
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.append(line)
        for name, value in values.items():
            if math.isfinite(value):  # tensorboardX prints a warning for others
                self._board.add_scalar(name, value, step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes uint8 images [y, x, 3] to TensorBoard and to samples/NAME_STEP.png."""
        if not self._writes:
            return
        for name, image in images.items():
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
                raise ValueError(f"image {name!r} is {image.dtype}{list(image.shape)}, not uint8[y, x, 3]")
            make_directory(self._directory / SAMPLES)
            path = self._directory / SAMPLES / f"{name}_{step:07d}.png"
            with explained("samples", path.parent), replacing(path) as file:
                PIL.Image.fromarray(image).save(file, "PNG")
            self._board.add_image(name, image, step, dataformats="HWC")

    def progress(
        self, step: int, metrics: Mapping[str, Any], *, examples_per_second: float, eta: float, mfu: float | None = None
    ) -> None:
        """Shows the progress after `step` updates. `eta` is the remaining time in seconds, `mfu` a share."""
        shown = [f"{name} {float(metrics[name]):.4g}" for name in ("loss", "bit_accuracy") if name in metrics]
        shown.append(f"{examples_per_second:.3g} examples/s")
        if mfu is not None:
            shown.append(f"MFU {mfu:.1%}")
        shown.append(f"{duration(eta)} left")
        if self._bar.disable:
            self.say(", ".join([f"step {step}/{self._steps}", *shown]))
        else:
            self._bar.set_postfix_str(", ".join(shown), refresh=False)

    def advance(self) -> None:
        """Advances the progress bar, if any, by one step."""
        self._bar.update()

    def say(self, sentence: str) -> None:
        """Shows a line to the user."""
        if self._bar.disable:
            say(sentence, self._screen)
        else:
            self._bar.write(sentence, file=self._screen)

    def flush(self) -> None:
        """Makes everything written so far durable, in an object store too."""
        if self._writes:
            self._lines.flush()
            self._board.flush()
            if self._local:
                for path in children(pathlib.Path(self._local.name)):
                    copy(path, self._directory / path.name)

    def close(self) -> None:
        """Writes what is pending."""
        if not self._writes:
            return
        self._bar.close()
        with contextlib.suppress(OSError):  # a full disk, which has been reported
            self._board.close()
        self.flush()
        self._lines.close()
        if self._local:
            self._local.cleanup()


def flat_metrics(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields names and values of metrics: a scalar under its name, entry k of a vector as `name/scale_k`."""
    for name, value in metrics.items():
        array = np.asarray(value)
        if array.ndim == 0:
            yield name, float(array)
        elif array.ndim == 1:
            for k, entry in enumerate(array):
                yield f"{name}/scale_{k}", float(entry)
        else:
            raise ValueError(f"metric {name!r} has shape {list(array.shape)}; metrics are scalars or vectors [K]")


def read_metrics(workdir: PathLike) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics.jsonl, in order; a last line that was cut short is left out."""
    return [line for line in read_lines(resolve(workdir) / METRICS_FILE) if _has_step(line)]


def _has_step(line: Mapping[str, Any]) -> bool:
    """Returns True for a line of metrics; a power cut can leave others that are JSON by chance."""
    return isinstance(line.get("step"), int)


def duration(seconds: float) -> str:
    """Returns seconds as text: 4 s, 3 min, 2 h 05 min."""
    if not math.isfinite(seconds):
        return "?"
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


RECENT_STEPS = 50  # whose median predicts the remaining time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The cost of a training example and the devices that share it, for TFLOP/s and MFU (convention: flops.py)."""

    flops: int  # of an example: the transformer's training
    flops_with_encoders: int  # and the frozen encoders' forward passes
    tokens: int  # of an example, source and target
    devices: int  # JAX devices, of all processes
    chip: hardware.Chip | None  # None if its peak is unknown: then there is no MFU

    @classmethod
    def of(cls, flops: Flops, devices: Any) -> "Work":
        """Returns the work of `flops` on JAX devices of one kind (a flat list, such as `mesh.devices.flat`)."""
        devices = list(devices)
        return cls(
            flops=flops.training,
            flops_with_encoders=flops.training_with_encoders,
            tokens=flops.tokens,
            devices=len(devices),
            chip=hardware.chip_of(devices[0]),
        )

    def speed(self, examples: float, seconds: float) -> dict[str, float]:
        """Returns model TFLOP/s and MFU per chip of `examples` examples in `seconds` seconds.

        If the chip is unknown, `tflops_per_chip` is per device, and `mfu` and `mfu_with_encoders` are absent.
        """
        chips = self.devices / (self.chip.devices if self.chip else 1)
        rate = examples / seconds / chips / 1e12
        values = {"tflops_per_chip": rate * self.flops}
        if self.chip:
            values["mfu"] = rate * self.flops / self.chip.tflops
            values["mfu_with_encoders"] = rate * self.flops_with_encoders / self.chip.tflops
        return values


# (step, metrics, example_ids) -> further metrics to log; raises UserError to end the run.
Check = Callable[[int, Metrics, np.ndarray | None], dict[str, float]]


@dataclasses.dataclass
class _Window:
    """Sums since the last logged step."""

    steps: int = 0
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data: float = 0.0
    flops: float = 0.0
    flops_with_encoders: float = 0.0
    extra: dict[str, float] = dataclasses.field(default_factory=dict)


class StepReport:
    """Logs the metrics of each step while the next one runs, so that no device waits for the fetch."""

    def __init__(
        self,
        writer: MetricsWriter,
        clock: Stopwatch,
        log_every: int,
        steps: int,
        learning_rate: Callable[[int], float] | None,
        *,
        check: Check | None = None,
        goodput: Goodput | None = None,
    ) -> None:
        """Starts the clock of the first step.

        Args:
          writer: takes the metrics.
          clock: the loop's stopwatch.
          log_every: steps between logged ones; 0 = none.
          steps: of the whole run.
          learning_rate: of a step, for the log.
          check: checks the metrics of every step (guard.py).
          goodput: gets a line for every logged step.
        """
        self._writer, self._clock, self._steps = writer, clock, steps
        self._log_every, self._learning_rate = log_every, learning_rate
        self._check, self._goodput = check, goodput
        self._pending: tuple[int, Metrics, int, np.ndarray | None, Work | None] | None = None
        self._window = _Window()
        self._recent: collections.deque[float] = collections.deque(maxlen=RECENT_STEPS)
        self._last = time.perf_counter()  # end of the previous step
        self._spent = dict(clock.seconds)  # at that time
        self._data = clock.seconds["data"]  # when the last step was dispatched

    def later(
        self,
        step: int,
        metrics: Metrics,
        examples: int,
        example_ids: np.ndarray | None = None,
        work: Work | None = None,
    ) -> None:
        """Takes the metrics of a step just dispatched, and logs those of the previous one.

        Args:
          step: counted from 0.
          metrics: scalars or vectors [K], on the devices.
          examples: of the step, over all processes.
          example_ids: of this process, int [B], for the guard.
          work: cost of an example of the step, for tokens/s, TFLOP/s and MFU.
        """
        if self._pending is not None and not _ready(self._pending[1]):
            # This step's batch came while the previous step was still running: nothing waited for it.
            self._clock.move("data", "step", self._clock.seconds["data"] - self._data)
        self._data = self._clock.seconds["data"]
        self.finish()
        self._pending = (step, metrics, examples, example_ids, work)

    def finish(self) -> None:
        """Waits for the pending step to end, and logs its metrics."""
        if self._pending is None:
            return
        step, device_metrics, examples, example_ids, work = self._pending
        self._pending = None
        with self._clock.time("step"):
            metrics = jax.device_get(dict(device_metrics))
        self._measure(examples, work, skipped=float(metrics.get("skipped", 0)) > 0)
        if self._check is not None:
            self._window.extra |= self._check(step, metrics, example_ids)
        self._writer.advance()
        if self._log_every and (step % self._log_every == 0 or step + 1 == self._steps):
            self._log(step, metrics, work)

    def _since(self, part: str) -> float:
        """Returns the seconds of a part since the previous step ended."""
        return self._clock.seconds[part] - self._spent.get(part, 0.0)

    def _measure(self, examples: int, work: Work | None, *, skipped: bool) -> None:
        """Adds the step that just ended to the window: the time since the previous one, without other parts."""
        now = time.perf_counter()
        others = sum(self._since(part) for part in self._clock.seconds if part not in ("data", "step"))
        seconds = max(now - self._last - others, 1e-9)
        data = self._since("data")
        if skipped:  # it changed nothing
            self._clock.move("step", "skipped", self._since("step"))
        self._last, self._spent = now, dict(self._clock.seconds)
        self._recent.append(seconds)
        window = self._window
        window.steps += 1
        window.examples += examples
        window.seconds += seconds
        window.data += data
        if work:
            window.tokens += examples * work.tokens
            window.flops += examples * work.flops
            window.flops_with_encoders += examples * work.flops_with_encoders

    def _log(self, step: int, metrics: Metrics, work: Work | None) -> None:
        window, self._window = self._window, _Window()
        times = {
            "time/step_seconds": window.seconds / window.steps,
            "time/examples_per_second": window.examples / window.seconds,
            "time/data_share": min(window.data / window.seconds, 1.0),
        }
        times |= hosts.gather(step, window.seconds / window.steps, window.data / window.steps)
        if work:
            # The steps of a window can be of two stages and many aspects.
            mean = dataclasses.replace(
                work,
                flops=round(window.flops / window.examples),
                flops_with_encoders=round(window.flops_with_encoders / window.examples),
            )
            times["time/tokens_per_second"] = window.tokens / window.seconds
            times |= {f"time/{name}": value for name, value in mean.speed(window.examples, window.seconds).items()}
        if self._goodput is not None:
            shares = self._goodput.record(step + 1)
            times |= {f"time/share/{kind}": share for kind, share in shares.items()}
            times["time/goodput"] = shares.get("productive", math.nan)
        else:
            times["time/goodput"] = self._clock.share("step")
        memory = hardware.memory(jax.local_devices())
        times |= {f"memory/{name}_gib": value / hardware.GIB for name, value in memory.items()}
        rate = {} if self._learning_rate is None else {"learning_rate": float(self._learning_rate(step))}
        self._writer.scalars(step, {**metrics, **window.extra, **rate, **times})
        self._writer.progress(
            step + 1,
            metrics,
            examples_per_second=times["time/examples_per_second"],
            eta=(self._steps - step - 1) * statistics.median(self._recent),
            mfu=times.get("time/mfu"),
        )


def _ready(metrics: Metrics) -> bool:
    """Returns True if the step of these metrics has ended."""
    return all(getattr(leaf, "is_ready", lambda: True)() for leaf in jax.tree.leaves(dict(metrics)))
