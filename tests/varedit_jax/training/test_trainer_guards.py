"""The training loop with losses that are not finite, and with spikes."""

import pathlib
import time
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.varedit_jax.training.runs import BATCH, OPTIMIZER, Run, every, example, init_state, loss_fn, step_fn
from varedit_jax.config import GuardConfig
from varedit_jax.errors import UserError
from varedit_jax.training.checkpoint import Checkpoints
from varedit_jax.training.metrics import read_metrics
from varedit_jax.training.replay import read_inputs
from varedit_jax.training.state import TrainState
from varedit_jax.weights.run_directory import checkpoint_steps


def test_a_loss_that_stays_nan(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Single bad steps pass; too many in a row end the run, and are not saved."""

    def broken_at(*bad: int) -> Callable:
        def broken(state: TrainState, batch: Any, key: jax.Array) -> Any:
            step = int(jax.device_get(state.step))
            state, metrics = step_fn(state, batch, key)
            return state, metrics | ({"loss": np.float32("nan")} if step in bad else {})

        return broken

    Run(tmp_path / "now and then", step_fn=broken_at(0, 3, 4, 5, 6, 7, 8, 9, 10, 11))()
    assert "step 11 was skipped: loss nan; 9 in a row, 10 in all" in capsys.readouterr().err
    cadence = every(save_every=12)
    with pytest.raises(
        UserError, match="10 steps in a row, 2 to 11, were not finite, the last one with loss nan; .* lower"
    ):
        Run(tmp_path / "always", step_fn=broken_at(*range(2, 12)), cadence=cadence)()
    assert checkpoint_steps(tmp_path / "always") == []


@jax.jit(donate_argnums=0)
def guarded_step(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update, or none if it is not finite, like an editor's step."""
    loss, grads = jax.value_and_grad(loss_fn)(state.params, batch, key)
    grads = jax.tree.map(lambda leaf: jnp.where(batch["y"][0, 0] == GRADIENT_POISON, jnp.nan, leaf), grads)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    new = TrainState(step=state.step, params=optax.apply_updates(state.params, updates), opt_state=opt_state)
    new = jax.tree.map(lambda changed, old: jnp.where(finite, changed, old), new, state)
    metrics = {"loss": loss, "gradient_norm": norm, "skipped": 1 - finite.astype(jnp.float32)}
    return new.replace(step=state.step + 1), metrics


GRADIENT_POISON = 77.0


def named(poisoned: dict[int, str]) -> grain.DatasetIterator:
    """The batches with the numbers of their examples, in order; batch n is poisoned in one of two ways."""

    def make(index: int) -> dict[str, np.ndarray]:
        entry = example(index) | {"example_ids": np.int64(index)}
        how = poisoned.get(index // BATCH)
        if how == "batch" and index % BATCH == 3:
            entry["x"][5] = np.nan
        if how == "gradient":
            entry["y"][0] = GRADIENT_POISON
        return entry

    source = grain.MapDataset.range(10**6).map(make)
    return iter(source.to_iter_dataset().batch(BATCH, drop_remainder=True))


def test_exactly_the_poisoned_steps_are_skipped(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By batch and by gradient: the run survives, they are named, and their batches are kept; a run that is stopped
    among them continues the count."""
    poisoned = {2: "batch", 5: "gradient", 6: "batch"}
    run = Run(tmp_path, step_fn=guarded_step, steps=9, cadence=every(log_every=1, save_every=0))
    run(batches=named(poisoned), stop_after=6)
    state, _ = run(batches=named(poisoned))
    lines = [line for line in read_metrics(tmp_path) if "loss" in line]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 0, 0, 1, 1, 0, 0]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1, 2, 3, 3, 3]
    assert [line["loss"] is None for line in lines] == [step in (2, 6) for step in range(9)]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))
    assert int(state.opt_state[1][0].count) == 6  # the others did not count
    said = capsys.readouterr().err
    for step in poisoned:
        ids = ", ".join(map(str, range(step * BATCH, (step + 1) * BATCH)))
        assert f"step {step} was skipped: loss " in said and f"; examples {ids}; " in said
    assert sorted(path.name for path in (tmp_path / "replay").iterdir()) == ["step_2", "step_5", "step_6"]
    _, batch, ids = read_inputs(tmp_path / "replay" / "step_6", "example_ids")
    assert ids is not None and ids.tolist() == list(range(48, 56))
    assert np.isnan(batch["x"][3, 5]) and np.isfinite(batch["x"]).sum() == batch["x"].size - 1


def test_the_last_good_checkpoint_survives_too_many_bad_steps(tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path, step_fn=guarded_step, cadence=every(log_every=1, save_every=4))
    with pytest.raises(UserError, match="3 steps in a row, 5 to 7, were not finite"):
        run(batches=named(dict.fromkeys(range(5, 12), "batch")), guard=GuardConfig(nonfinite_limit=3))
    assert checkpoint_steps(tmp_path) == [4]
    state, _ = run(batches=named({}))
    assert int(state.step) == 12 and np.isfinite(jax.device_get(state.params["linear"]["kernel"])).all()


def test_a_jump_of_the_loss_is_said(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    def jumping(state: TrainState, batch: Any, key: jax.Array) -> Any:
        step = int(jax.device_get(state.step))
        return step_fn(state, batch, key)[0], {"loss": np.float32(5.0 if step == 4 else 1.0)}

    Run(tmp_path, step_fn=jumping, steps=6, cadence=every(log_every=2, save_every=0))(
        batches=named({}), guard=GuardConfig(spike_window=3)
    )
    ids = ", ".join(map(str, range(32, 40)))
    assert (
        f"step 4 has a loss of 5, 5.0 times the median 1 of the last 3 steps; examples {ids}" in capsys.readouterr().err
    )
    assert [line["loss_spike"] for line in read_metrics(tmp_path) if "loss_spike" in line] == [5.0]


def test_a_slow_start_is_no_hang(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making the state, the first batch and compiling take longer than a step may, at the first start and the next."""
    ends: list[int] = []
    monkeypatch.setattr("os._exit", ends.append)

    def slow(function: Any) -> Any:
        def run(*arguments: Any) -> Any:
            time.sleep(1.2)
            return function(*arguments)

        return run

    restore = Checkpoints.restore
    monkeypatch.setattr(Checkpoints, "restore", slow(restore))
    guard = GuardConfig(hang_minutes=0.8 / 60)
    for steps in (1, 2):
        run = Run(tmp_path, steps=2, step_fn=slow(step_fn), cadence=every(save_every=1))
        run(init_state=slow(init_state), guard=guard, stop_after=1, put=slow(jax.device_put))
        assert checkpoint_steps(tmp_path)[-1] == steps and ends == []
