"""A run whose directory version 0.1.0 wrote is resumed: state, data and logs."""

import json
import pathlib
import shutil
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from varedit_jax.config import Cadence, OptimizerConfig
from varedit_jax.training.goodput import read_goodput
from varedit_jax.training.metrics import read_metrics
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.stages import SingleStage
from varedit_jax.training.state import TrainState
from varedit_jax.training.trainer import Job, Launch, Trainer
from varedit_jax.types import Metrics
from varedit_jax.weights.run_directory import checkpoint_steps

# Stopped after 3 of 6 steps. Never written anew: it stands for the directories that people have.
STORED = pathlib.Path(__file__).parents[2] / "data" / "runs" / "toy_0_1_0"
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2), 6)


def init_state() -> TrainState:
    params = {"linear": {"kernel": jnp.eye(4, dtype=jnp.float32), "bias": jnp.zeros((4,))}}
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=OPTIMIZER.init(params))


@jax.jit
def step_fn(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, Metrics]:
    def loss_fn(params: Any) -> jax.Array:
        y_BC = batch["x"] @ params["linear"]["kernel"] + params["linear"]["bias"][None]
        return jnp.mean((y_BC - 1) ** 2)

    loss, gradients = jax.value_and_grad(loss_fn)(state.params)
    updates, opt_state = OPTIMIZER.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), {"loss": loss, "x": batch["x"][:, 0]}


def batches() -> grain.DatasetIterator:
    source = grain.MapDataset.range(40).seed(7).shuffle().repeat()
    values = source.map(lambda index: {"x": np.full((4,), index, np.float32)})
    return iter(values.to_iter_dataset().batch(2, drop_remainder=True))


def test_a_run_of_0_1_0_is_resumed(tmp_path: pathlib.Path) -> None:
    """From its own parameters, at its next batch; what it logged stays."""
    workdir = tmp_path / "run"
    shutil.copytree(STORED, workdir)
    assert checkpoint_steps(workdir) == [3]
    seen: list[Any] = []
    job = Job(
        steps=6,
        key=jax.random.key(1),
        abstract_state=jax.eval_shape(init_state),
        init_state=init_state,
        stages=SingleStage(step_fn),
        batches=batches(),
        put=jax.device_put,
        record={"name": "toy"},
        cadence=Cadence(log_every=1, eval_every=3, sample_every=0, save_every=3, keep_checkpoints=1),
        evaluate=lambda state: seen.append(jax.device_get(state.params)) or {"norm": 1.0},
    )
    state = Trainer(job, Launch(workdir=workdir, resume=True)).run()
    # What the program of 0.1.0 printed of its last state.
    np.testing.assert_allclose(seen[0]["linear"]["bias"], np.full(4, -0.02813189), rtol=1e-6)
    np.testing.assert_allclose(seen[0]["linear"]["kernel"].diagonal(), np.full(4, 0.9700002), rtol=1e-6)
    assert int(state.step) == 6 and checkpoint_steps(workdir) == [6]
    order = batches()
    expected = [next(order)["x"][:, 0].tolist() for _ in range(6)][3:]
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert [[line["x/scale_0"], line["x/scale_1"]] for line in lines[3:]] == expected
    assert lines[:3] == [
        line for line in map(json.loads, (STORED / "metrics.jsonl").read_text().splitlines()) if "loss" in line
    ]
    assert [moment.step for moment in read_goodput(workdir)][-1] == 6
