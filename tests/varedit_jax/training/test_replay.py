"""Replay of one step on its dumped inputs."""

import pathlib
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varedit_jax.config import Cadence, OptimizerConfig
from varedit_jax.errors import UserError
from varedit_jax.training.metrics import read_metrics
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.replay import MOST, Inputs, read_inputs, replay
from varedit_jax.training.stages import SingleStage
from varedit_jax.training.state import TrainState
from varedit_jax.training.trainer import Job, Launch, Trainer

OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=3), 6)
KEY = jax.random.key(5)


def init_state() -> TrainState:
    """A linear model."""
    params = {"kernel": jax.random.normal(jax.random.key(3), (20, 20))}
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=OPTIMIZER.init(params))


@jax.jit(donate_argnums=0)
def step_fn(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update; its metrics depend on the parameters, the moments, the batch, the key and the step."""

    def loss_fn(params: Any) -> jax.Array:
        return jnp.mean((batch["x"] @ params["kernel"] + jax.random.normal(key, batch["x"].shape)) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    new = TrainState(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)
    return new, {"loss": loss, "update": optax.tree.norm(updates), "step_number": state.step}


def batches() -> grain.DatasetIterator:
    """Endless batches of 4 examples that have a number."""

    def make(index: int) -> dict[str, Any]:
        x = np.random.default_rng(index).normal(size=20).astype(np.float32)
        return {"x": np.where(index == 22, np.nan, x).astype(np.float32), "example_ids": np.int64(index)}

    return iter(grain.MapDataset.range(10**6).map(make).to_iter_dataset().batch(4))


ARGUMENTS: dict[str, Any] = {
    "key": KEY,
    "abstract_state": jax.eval_shape(init_state),
    "step_fn": lambda number: step_fn,
    "put": jax.device_put,
    "ids_field": "example_ids",
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of 6 steps: state and inputs of step 4 are dumped, and those of 5, whose loss is NaN."""
    directory = tmp_path_factory.mktemp("run")
    job = Job(
        steps=6,
        key=KEY,
        abstract_state=ARGUMENTS["abstract_state"],
        init_state=init_state,
        stages=SingleStage(step_fn),
        batches=batches(),
        put=jax.device_put,
        record={"name": "toy"},
        cadence=Cadence(log_every=1, eval_every=0, sample_every=0, save_every=3),
        ids_field="example_ids",
    )
    Trainer(job, Launch(workdir=directory, dump_step=4)).run()
    return directory


def test_a_replayed_step_is_the_one_of_the_run(workdir: pathlib.Path) -> None:
    """Metrics are equal, exactly."""
    said: list[str] = []
    metrics = replay(workdir / "replay" / "step_4", say=said.append, **ARGUMENTS)
    (line,) = [line for line in read_metrics(workdir) if line["step"] == 4]
    assert {name: float(value) for name, value in metrics.items()} == {name: line[name] for name in metrics}
    assert line["step_number"] == 4 and line["loss"] > 0
    assert said == ["replaying step 4 from the state before it", "its examples are 16, 17, 18, 19"]


def test_a_step_without_a_state_starts_from_a_checkpoint(workdir: pathlib.Path) -> None:
    said: list[str] = []
    metrics = replay(workdir / "replay" / "step_5", say=said.append, **ARGUMENTS)
    assert np.isnan(metrics["loss"])
    assert metrics["step_number"] == 3
    assert said[0] == "replaying step 5 from the checkpoint of step 3"


def test_what_is_dumped(workdir: pathlib.Path) -> None:
    """The batch as it came, and why."""
    step, batch, ids = read_inputs(workdir / "replay" / "step_5", "example_ids")
    expected = [next(iterator) for iterator in [batches()] for _ in range(6)][5]
    assert step == 5 and ids is not None
    np.testing.assert_array_equal(ids, expected["example_ids"])
    np.testing.assert_array_equal(batch["x"], expected["x"])
    assert set(batch) == {"x"} and batch["x"].dtype == np.float32
    assert '"reason": "not finite"' in (workdir / "replay" / "step_5" / "step.json").read_text()
    assert not (workdir / "replay" / "step_5" / "state").exists()


def test_not_every_bad_step_is_dumped(tmp_path: pathlib.Path) -> None:
    for process in range(2):
        inputs = Inputs(tmp_path)
        for step in range(7 * process, 7 * (process + 1)):
            inputs.keep(step, {"x": np.zeros(2)})
            inputs.dump(step, "not finite")
    assert len(list((tmp_path / "replay").iterdir())) == MOST == 10


def test_a_directory_that_cannot_be_replayed(workdir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"holds no inputs of a step; give a directory as RUN/replay/step_12"):
        replay(workdir, **ARGUMENTS)
    inputs = Inputs(tmp_path)
    inputs.keep(3, {"x": np.zeros(2)})
    inputs.dump(3, "not finite")
    directory = tmp_path / "replay" / "step_3"
    with pytest.raises(UserError, match="has no checkpoint of step 3 or before; make .* with --dump_step=3"):
        replay(directory, **ARGUMENTS)
    file = directory / "inputs_process_0-of-1.npz"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match=r"inputs_process_0-of-1.npz cannot be read"):
        read_inputs(directory)
    file.rename(directory / "inputs_process_0-of-4.npz")
    with pytest.raises(UserError, match=r"holds inputs_process_0-of-4.npz, but inputs_process_0-of-1.npz is needed"):
        read_inputs(directory)


def test_features_in_bfloat16_come_back(tmp_path: pathlib.Path) -> None:
    """NumPy's files do not know the type."""
    features = np.arange(6, dtype=np.float32).reshape(2, 3).astype(jnp.bfloat16)
    inputs = Inputs(tmp_path)
    inputs.keep(3, {"text_features": features})
    inputs.dump(3, "requested")
    batch = read_inputs(tmp_path / "replay" / "step_3")[1]
    np.testing.assert_array_equal(jax.device_put(batch)["text_features"], features)
