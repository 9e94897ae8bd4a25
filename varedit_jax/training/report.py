"""What the loop reports of its steps, one step late: metrics, speed, memory, and what the guard makes of them."""

import collections
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from varedit_jax import hardware
from varedit_jax.training.flops import Flops
from varedit_jax.training.goodput import Goodput
from varedit_jax.training.ledger import Ledger, Stopwatch

Metrics = Mapping[str, Any]

RECENT_STEPS = 50  # whose median says how long the rest takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one training example costs, and what does it: for TFLOP/s and MFU, by the convention of flops.py."""

    flops: int  # of an example: the transformer's training
    flops_with_encoders: int  # and the frozen encoders' forward passes
    tokens: int  # of an example, source and target
    devices: int  # JAX devices, of all processes
    chip: hardware.Chip | None  # None where its peak is not known: then there is no MFU

    @classmethod
    def of(cls, flops: Flops, devices: Any) -> "Work":
        """Of `flops` on JAX devices (a flat list, as of `mesh.devices.flat`), all of one kind."""
        devices = list(devices)
        return cls(
            flops=flops.training,
            flops_with_encoders=flops.training_with_encoders,
            tokens=flops.tokens,
            devices=len(devices),
            chip=hardware.chip_of(devices[0]),
        )

    def speed(self, examples: float, seconds: float) -> dict[str, float]:
        """Model TFLOP/s and MFU a chip, where so many examples took so many seconds.

        `tflops_per_chip` is of a device where the chip is not known; `mfu` and `mfu_with_encoders` are absent there.
        """
        chips = self.devices / (self.chip.devices if self.chip else 1)
        rate = examples / seconds / chips / 1e12
        values = {"tflops_per_chip": rate * self.flops}
        if self.chip:
            values["mfu"] = rate * self.flops / self.chip.tflops
            values["mfu_with_encoders"] = rate * self.flops_with_encoders / self.chip.tflops
        return values


class Check(Protocol):
    """What looks at the metrics of every step (guard.py)."""

    def check(self, step: int, metrics: Metrics, example_ids: np.ndarray | None) -> dict[str, float]:
        """Metrics to be written beside those of the step; raises UserError to end the run."""


@dataclasses.dataclass
class _Window:
    """Sums since the last line of the log."""

    steps: int = 0
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data: float = 0.0
    flops: float = 0.0
    flops_with_encoders: float = 0.0
    extra: dict[str, float] = dataclasses.field(default_factory=dict)


class Report:
    """Metrics of the step before the one that runs now: fetched late, so that fetching does not hold up the devices."""

    def __init__(
        self,
        ledger: Ledger,
        clock: Stopwatch,
        log_every: int,
        steps: int,
        learning_rate: Callable[[int], float] | None,
        *,
        guard: Check | None = None,
        goodput: Goodput | None = None,
    ) -> None:
        """Starts the clock of the first step.

        Args:
          ledger, clock: what is written to, and what the loop times its parts with.
          log_every: steps between lines; 0 = none.
          steps: of the whole run.
          learning_rate: of a step, for the log.
          guard: looks at every step.
          goodput: gets a line whenever the log does.
        """
        self._ledger, self._clock, self._steps = ledger, clock, steps
        self._log_every, self._learning_rate = log_every, learning_rate
        self._guard, self._goodput = guard, goodput
        self._pending: tuple[int, Metrics, int, np.ndarray | None, Work | None] | None = None
        self._window = _Window()
        self._recent: collections.deque[float] = collections.deque(maxlen=RECENT_STEPS)
        self._last = time.perf_counter()  # when the step before ended
        self._spent = dict(clock.seconds)  # by then
        self._data = clock.seconds.get("data", 0.0)  # seconds of it when the last step was dispatched

    def later(
        self,
        step: int,
        metrics: Metrics,
        examples: int,
        example_ids: np.ndarray | None = None,
        work: Work | None = None,
    ) -> None:
        """Takes the metrics of a step just dispatched, and writes down those of the step before it.

        Args:
          step: counted from 0.
          metrics: scalars or vectors [K], on the devices.
          examples: of the step, over all processes.
          example_ids: of this process, int [B], for the guard.
          work: what an example of the step costs, for tokens/s, TFLOP/s and MFU.
        """
        if self._pending is not None and not _ready(self._pending[1]):
            # This step's batch came while the step before was still running: nothing waited for it.
            self._clock.move("data", "step", self._clock.seconds.get("data", 0.0) - self._data)
        self._data = self._clock.seconds.get("data", 0.0)
        self.finish()
        self._pending = (step, metrics, examples, example_ids, work)

    def finish(self) -> None:
        """Writes down the metrics that are pending, waiting for their step to end."""
        if self._pending is None:
            return
        step, device_metrics, examples, example_ids, work = self._pending
        self._pending = None
        with self._clock.time("step"):
            metrics = jax.device_get(dict(device_metrics))
        self._measure(examples, work, skipped=float(metrics.get("skipped", 0)) > 0)
        if self._guard is not None:
            self._window.extra |= self._guard.check(step, metrics, example_ids)
        self._ledger.advance()
        if self._log_every and (step % self._log_every == 0 or step + 1 == self._steps):
            self._log(step, metrics, work)

    def _since(self, part: str) -> float:
        """Seconds of a part since the step before ended."""
        return self._clock.seconds.get(part, 0.0) - self._spent.get(part, 0.0)

    def _measure(self, examples: int, work: Work | None, *, skipped: bool) -> None:
        """Adds the step that just ended to the window: all the time since the one before, but for other parts."""
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
        if work:
            # Of the window's own steps, which may have been of two stages and of many aspects.
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
        self._ledger.record(step, {**metrics, **window.extra, **rate, **times})
        self._ledger.progress(
            step + 1,
            metrics,
            examples_per_second=times["time/examples_per_second"],
            eta=(self._steps - step - 1) * statistics.median(self._recent),
            mfu=times.get("time/mfu"),
        )


def _ready(metrics: Metrics) -> bool:
    """Whether the step that gives these metrics has ended."""
    return all(getattr(leaf, "is_ready", lambda: True)() for leaf in jax.tree.leaves(dict(metrics)))
