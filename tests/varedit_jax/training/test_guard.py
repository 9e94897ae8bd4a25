"""Counts, sentences and refusals of the guard."""

import math

import numpy as np
import pytest

from varedit_jax.config import GuardConfig
from varedit_jax.errors import UserError
from varedit_jax.training import guard as guard_lib
from varedit_jax.training.guard import Guard, was_skipped

IDS = np.array([7, 2**40, 3])
GOOD = {"loss": np.float32(1.0), "gradient_norm": np.float32(2.0), "skipped": np.float32(0)}
BAD = {"loss": np.float32("nan"), "gradient_norm": np.float32("inf"), "skipped": np.float32(1)}


def make(**fields: float) -> tuple[Guard, list[str]]:
    """A guard, and what it says."""
    said: list[str] = []
    return Guard(GuardConfig(**fields), said.append), said  # type: ignore[arg-type]


def test_skipped_steps_are_counted_and_named() -> None:
    guard, said = make(nonfinite_limit=3)
    extras = [guard.check(step, BAD if step in (1, 2, 4) else GOOD, IDS) for step in range(6)]
    assert [extra["skipped_steps"] for extra in extras] == [0, 1, 2, 2, 3, 3]
    assert said == [
        "step 1 was skipped: loss nan, gradient_norm inf; examples 7, 1099511627776, 3; 1 in a row, 1 in all",
        "step 2 was skipped: loss nan, gradient_norm inf; examples 7, 1099511627776, 3; 2 in a row, 2 in all",
        "step 4 was skipped: loss nan, gradient_norm inf; examples 7, 1099511627776, 3; 1 in a row, 3 in all",
    ]


def test_too_many_in_a_row_end_the_run() -> None:
    guard, _ = make(nonfinite_limit=3)
    guard.check(4, BAD, None)
    guard.check(5, BAD, None)
    with pytest.raises(UserError, match=r"3 steps in a row, 4 to 6, were not finite, .* loss nan, gradient_norm inf; "):
        guard.check(6, BAD, None)


@pytest.mark.parametrize(
    ("metrics", "skipped"),
    [
        (GOOD, False),
        (BAD, True),
        ({"loss": np.float32(1), "skipped": np.float32(1)}, True),  # the gradient alone
        ({"loss": math.inf}, True),  # a step that does not say
        ({"loss": 1.0}, False),
        ({}, False),
    ],
)
def test_what_counts_as_skipped(metrics: dict[str, float], skipped: bool) -> None:
    assert was_skipped(metrics) is skipped


def test_a_jump_of_the_loss_is_reported_once() -> None:
    """Against the median of the finite losses before it; the next step of the same jump is a metric alone."""
    guard, said = make(spike_factor=2.0, spike_window=20)
    losses = [1.0, 1.2] * 10 + [math.nan, 2.1, 2.5, 4.4, 1.0, 3.0]
    extras = [
        guard.check(step, {"loss": loss, "skipped": float(not math.isfinite(loss))}, IDS)
        for step, loss in enumerate(losses)
    ]
    spikes = {step: extra["loss_spike"] for step, extra in enumerate(extras) if "loss_spike" in extra}
    assert spikes == {22: 2.5 / 1.2, 23: 4.4 / 1.2, 25: 3.0 / 1.2}
    assert [line for line in said if "skipped" not in line] == [
        f"step {step} has a loss of {loss}, {factor} times the median 1.2 of the last 20 steps; examples "
        f"7, 1099511627776, 3"
        for step, loss, factor in ((22, "2.5", "2.1"), (25, "3", "2.5"))
    ]


def test_when_no_jump_is_reported() -> None:
    guard, said = make(spike_factor=2.0)
    extras = [guard.check(step, {"loss": 10.0**step}, None) for step in range(9)]  # too few to know
    guard, _ = make(spike_factor=0.0)
    extras += [guard.check(step, {"loss": loss}, None) for step, loss in enumerate([1.0] * 30 + [99.0])]
    guard, _ = make()
    extras += [guard.check(step, {"loss": loss}, None) for step, loss in enumerate([-1.0] * 30 + [5.0])]
    assert said == [] and not any("loss_spike" in extra for extra in extras)


def test_a_resumed_run_has_its_counts_and_its_median() -> None:
    guard, said = make(spike_window=20)
    guard.recall(
        [{"step": step, "loss": 1.0, "skipped_steps": 2.0} for step in range(20)] + [{"step": 20, "eval/a": 1}]
    )
    assert guard.check(20, {"loss": 3.0}, None) == {"skipped_steps": 2.0, "loss_spike": 3.0}
    assert len(said) == 1


def test_examples_of_all_processes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are gathered in halves, for arrays of JAX have 32 bits; processes that share examples name them once."""

    def gather(halves: np.ndarray) -> np.ndarray:
        assert halves.dtype == np.int32
        return np.stack([halves, halves, np.array([5, 0], np.int32).repeat(3).reshape(2, 3).T.reshape(-1)])

    monkeypatch.setattr("jax.process_count", lambda: 3)
    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", gather)
    guard, said = make()
    guard.check(0, BAD, IDS)
    assert "; examples 7, 1099511627776, 3, 5; 1 in a row" in said[0]


def test_a_large_batch_is_cut_short() -> None:
    guard, said = make()
    guard.check(0, BAD, np.arange(100))
    assert f"{guard_lib.NAMED_EXAMPLES - 1} and {100 - guard_lib.NAMED_EXAMPLES} more; 1 in a row" in said[0]
