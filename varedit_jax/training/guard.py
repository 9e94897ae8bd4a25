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

NAMED_EXAMPLES = 32  # per step; the others are counted
_FEWEST = 10  # losses that a median needs, unless spike_window is smaller


class Guard:
    """Checks the metrics of every step, in order, in every process."""

    def __init__(self, config: GuardConfig, say: Callable[[str], None]) -> None:
        """`say` shows a line to the user."""
        self._config, self._say = config, say
        self._total = 0  # steps of the run that were skipped
        self._row: list[int] = []  # skipped steps since the last good one
        self._losses: collections.deque[float] = collections.deque(maxlen=max(config.spike_window, 1))
        self._high = False  # True if the previous step was reported as a spike

    def recall(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Continues the counts and medians of earlier processes from the lines of metrics.jsonl, in order.

        Only logged steps are in it, so the median is of fewer losses at first.
        """
        for line in lines:
            self._total = int(line.get("skipped_steps") or self._total)
            if line.get("loss") is not None:
                self._losses.append(line["loss"])

    def check(self, step: int, metrics: Mapping[str, Any], example_ids: np.ndarray | None) -> dict[str, float]:
        """Counts and reports a skipped step or a spike of the loss.

        Args:
          step: counted from 0.
          metrics: of the step, on the host and equal in all processes; `loss`, `gradient_norm` and `skipped` are read.
            Without `skipped`, a step counts as skipped if its loss is not finite.
          example_ids: int [B], the examples of this process. A skipped step gathers those of all processes, all of
            which must make this call.

        Returns:
          Metrics to be logged: `skipped_steps` of the run so far, and, for a spike, `loss_spike`, the loss over the
          median of the last steps.

        Raises:
          UserError: too many steps in a row were skipped.
        """
        spike: dict[str, float] = {}
        if was_skipped(metrics):
            self._skipped(step, metrics, example_ids)
        else:
            self._row = []
            spike = self._spike(step, float(metrics["loss"]), example_ids) if "loss" in metrics else {}
        return {"skipped_steps": float(self._total), **spike}

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
        # A ratio means nothing for a loss that can be negative.
        if not factor or known < min(_FEWEST, self._config.spike_window) or not 0 < median * factor < loss:
            return {}
        self._high = True
        if not before:  # one line per spike, however many steps it lasts
            process = f" (of process {jax.process_index()})" if jax.process_count() > 1 else ""
            self._say(
                f"step {step} has a loss of {loss:.4g}, {loss / median:.1f} times the median {median:.4g} of the last "
                f"{known} steps{_examples_text(example_ids)}{process}"
            )
        return {"loss_spike": loss / median}


def was_skipped(metrics: Mapping[str, Any]) -> bool:
    """Returns True if a step with these metrics, on the host, was not finite."""
    if "skipped" in metrics:
        return float(metrics["skipped"]) > 0
    return "loss" in metrics and not math.isfinite(metrics["loss"])


def _gathered(example_ids: np.ndarray | None) -> np.ndarray | None:
    """Returns the examples of all processes, in order of the processes."""
    if example_ids is None or jax.process_count() == 1:
        return example_ids
    # As halves, because JAX's arrays have 32 bits.
    halves = np.ascontiguousarray(example_ids, np.int64).view(np.int32)
    parts = np.asarray(multihost_utils.process_allgather(halves))
    ids = np.ascontiguousarray(parts.reshape(-1)).view(np.int64)
    return np.array(list(dict.fromkeys(ids.tolist())), np.int64)  # processes can share examples


def _examples_text(example_ids: np.ndarray | None) -> str:
    if example_ids is None:
        return ""
    ids = [str(index) for index in example_ids.tolist()]
    more = f" and {len(ids) - NAMED_EXAMPLES} more" if len(ids) > NAMED_EXAMPLES else ""
    return f"; examples {', '.join(ids[:NAMED_EXAMPLES])}{more}"
