"""What the loop reports of its steps: metrics one step late, throughput, and whether the numbers are sound."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from varedit_jax.errors import UserError
from varedit_jax.training.ledger import Ledger, Stopwatch

Metrics = Mapping[str, Any]

NONFINITE_LIMIT = 10  # steps in a row whose loss is not finite, after which a run ends


class Report:
    """Metrics of the step before the one that runs now: fetched late, so that fetching does not hold up the devices."""

    def __init__(
        self,
        ledger: Ledger,
        clock: Stopwatch,
        log_every: int,
        steps: int,
        learning_rate: Callable[[int], float] | None,
    ) -> None:
        self._ledger, self._clock, self._steps = ledger, clock, steps
        self._log_every, self._learning_rate = log_every, learning_rate
        self._pending: tuple[int, Metrics] | None = None
        self._nonfinite = 0  # steps in a row, up to now
        self._examples = 0  # since the last line, as are the two below
        self._window_steps = 0
        self._before = {"data": 0.0, "step": 0.0}

    def later(self, step: int, metrics: Metrics, examples: int) -> None:
        """Takes the metrics of a step just dispatched, and writes down those of the step before it."""
        self.finish()
        self._pending = (step, metrics)
        self._examples += examples
        self._window_steps += 1

    def finish(self) -> None:
        """Writes down the metrics that are pending, waiting for their step to end."""
        if self._pending is None:
            return
        step, device_metrics = self._pending
        self._pending = None
        with self._clock.time("step"):
            metrics = jax.device_get(dict(device_metrics))
        self._check_finite(step, metrics)
        self._ledger.advance()
        if self._log_every and (step % self._log_every == 0 or step + 1 == self._steps):
            self._log(step, metrics)

    def _log(self, step: int, metrics: Metrics) -> None:
        spent = {part: self._clock.seconds.get(part, 0.0) - self._before[part] for part in self._before}
        self._before = {part: self._clock.seconds.get(part, 0.0) for part in self._before}
        seconds = max(sum(spent.values()), 1e-9)
        examples_per_second = self._examples / seconds
        seconds_per_step = seconds / max(self._window_steps, 1)
        self._examples = self._window_steps = 0
        times = {
            "time/step_seconds": seconds_per_step,
            "time/examples_per_second": examples_per_second,
            "time/data_share": spent["data"] / seconds,
            "time/goodput": self._clock.share("step"),
        }
        rate = {} if self._learning_rate is None else {"learning_rate": float(self._learning_rate(step))}
        self._ledger.record(step, {**metrics, **rate, **times})
        eta = (self._steps - step - 1) * seconds_per_step
        self._ledger.progress(step + 1, metrics, examples_per_second=examples_per_second, eta=eta)

    def _check_finite(self, step: int, metrics: Metrics) -> None:
        if "loss" not in metrics:
            return
        self._nonfinite = 0 if math.isfinite(metrics["loss"]) else self._nonfinite + 1
        if self._nonfinite >= NONFINITE_LIMIT:
            raise UserError(
                f"the loss was {float(metrics['loss'])} in {NONFINITE_LIMIT} steps in a row, up to step {step}; "
                f"lower optimizer.learning_rate or optimizer.clip_norm, or look at the data of those steps"
            )
