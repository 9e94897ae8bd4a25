"""Watches the numbers of a run: steps that were skipped because they were not finite, and losses that jump."""

import collections
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from varedit_jax.config import GuardConfig
from varedit_jax.errors import UserError

NAMED_EXAMPLES = 32  # of a step; the rest is counted
_FEWEST = 10  # losses that a median takes, unless spike_window is smaller


class Guard:
    """Looks at the metrics of every step, in order, in every process."""

    def __init__(self, config: GuardConfig, say: Callable[[str], None]) -> None:
        """`say` shows a line to the user."""
        self._config, self._say = config, say
        self._total = 0  # steps of the run that were skipped
        self._row: list[int] = []  # the last ones, up to now without a good step
        self._losses: collections.deque[float] = collections.deque(maxlen=max(config.spike_window, 1))
        self._high = False  # whether the step before was reported as a spike

    def recall(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Takes over what earlier processes of the run logged, so that counts and medians continue: lines of
        metrics.jsonl, in order. Only logged steps are there, so the median is of fewer losses at first."""
        for line in lines:
            self._total = int(line.get("skipped_steps") or self._total)
            if line.get("loss") is not None:
                self._losses.append(line["loss"])

    def check(self, step: int, metrics: Mapping[str, Any], example_ids: np.ndarray | None) -> dict[str, float]:
        """Counts and reports what is not as it should be with a step.

        Args:
          step: counted from 0.
          metrics: of the step, on the host and the same in all processes. Read are `loss`, `gradient_norm` and
            `skipped`; without `skipped`, a step counts as skipped if its loss is not finite.
          example_ids: int [B], the examples of this process. Those of the other processes are gathered if the step
            was skipped, so then all processes have to be here.

        Returns:
          Metrics to be logged: `skipped_steps`, of the run up to here; `loss_spike`, the loss by the median of
          the last steps, if it is large.

        Raises:
          UserError: too many steps in a row were skipped.
        """
        if was_skipped(metrics):
            self._skipped(step, metrics, example_ids)
            return {"skipped_steps": float(self._total)}
        self._row = []
        extra = {"skipped_steps": float(self._total)}
        if "loss" in metrics:
            extra |= self._spike(step, float(metrics["loss"]), example_ids)
        return extra

    def _skipped(self, step: int, metrics: Mapping[str, Any], example_ids: np.ndarray | None) -> None:
        self._total += 1
        self._row.append(step)
        values = ", ".join(f"{name} {float(metrics[name]):g}" for name in ("loss", "gradient_norm") if name in metrics)
        what = f"{values or 'not finite'}{_examples_text(_gathered(example_ids))}"
        if len(self._row) >= self._config.nonfinite_limit:
            raise UserError(
                f"{len(self._row)} steps in a row, {self._row[0]} to {step}, were not finite, the last one with "
                f"{what}; checkpoints are of earlier steps: lower optimizer.learning_rate or optimizer.clip_norm, or "
                f"look at the data of those steps"
            )
        self._say(f"step {step} was skipped: {what}; {len(self._row)} in a row, {self._total} in all")

    def _spike(self, step: int, loss: float, example_ids: np.ndarray | None) -> dict[str, float]:
        factor, known = self._config.spike_factor, len(self._losses)
        median = statistics.median(self._losses) if known else math.nan
        self._losses.append(loss)
        before, self._high = self._high, False
        # A loss that can be negative has no "times".
        if not factor or known < min(_FEWEST, self._config.spike_window) or not 0 < median * factor < loss:
            return {}
        self._high = True
        if not before:  # one line a spike, however many steps it lasts
            process = f" (of process {jax.process_index()})" if jax.process_count() > 1 else ""
            self._say(
                f"step {step} has a loss of {loss:.4g}, {loss / median:.1f} times the median {median:.4g} of the last "
                f"{known} steps{_examples_text(example_ids)}{process}"
            )
        return {"loss_spike": loss / median}


def was_skipped(metrics: Mapping[str, Any]) -> bool:
    """Returns True if a step with these metrics, on the host, left the parameters as they were, or should have."""
    if "skipped" in metrics:
        return float(metrics["skipped"]) > 0
    return "loss" in metrics and not math.isfinite(metrics["loss"])


def _gathered(example_ids: np.ndarray | None) -> np.ndarray | None:
    """The examples of all processes, in their order."""
    if example_ids is None or jax.process_count() == 1:
        return example_ids
    # As halves, because arrays of JAX have 32 bits.
    halves = np.ascontiguousarray(example_ids, np.int64).view(np.int32)
    parts = np.asarray(multihost_utils.process_allgather(halves))
    ids = np.ascontiguousarray(parts.reshape(-1)).view(np.int64)
    return np.array(list(dict.fromkeys(ids.tolist())), np.int64)  # some processes may work on the same examples


def _examples_text(example_ids: np.ndarray | None) -> str:
    if example_ids is None:
        return ""
    ids = [str(index) for index in example_ids.tolist()]
    more = f" and {len(ids) - NAMED_EXAMPLES} more" if len(ids) > NAMED_EXAMPLES else ""
    return f"; examples {', '.join(ids[:NAMED_EXAMPLES])}{more}"
