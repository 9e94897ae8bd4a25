"""A small run of the training loop, to be started repeatedly in one directory, and its results."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from varedit_jax.config import Cadence, OptimizerConfig
from varedit_jax.training.checkpoint import restore_state
from varedit_jax.training.metrics import read_metrics
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.stages import SingleStage
from varedit_jax.training.state import TrainState
from varedit_jax.training.trainer import Job, Launch, Trainer
from varedit_jax.weights.run_directory import checkpoint_steps

WIDTH = 300  # large enough that an update in place would show in a checkpoint being written
BATCH = 8
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=3, weight_decay=0.1), 12)


def every(**fields: Any) -> Cadence:
    """Returns a cadence without evaluation and samples by default; those asked for begin at step 0."""
    return Cadence(**{"eval_every": 0, "sample_every": 0, "evaluate_first": True, **fields})


LAUNCH_FIELDS = [field.name for field in dataclasses.fields(Launch)]


def init_state() -> TrainState:
    """A linear model."""
    params = {"linear": {"kernel": jax.random.normal(jax.random.key(3), (WIDTH, WIDTH)), "bias": jnp.zeros((WIDTH,))}}
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=OPTIMIZER.init(params))


def loss_fn(params: Any, batch: Any, key: jax.Array) -> jax.Array:
    """Mean square error with noise on the input."""
    x_BC = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
    y_BC = x_BC @ params["linear"]["kernel"] + params["linear"]["bias"][None]
    return jnp.mean((y_BC - batch["y"]) ** 2)


@jax.jit(donate_argnums=0)
def step_fn(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update, its state donated."""
    loss, grads = jax.value_and_grad(loss_fn)(state.params, batch, key)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "first": batch["x"][0, 0], "draw": jax.random.uniform(key)}
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics


def example(index: int) -> dict[str, np.ndarray]:
    """Example number `index`."""
    rng = np.random.default_rng(index)
    return {"x": rng.normal(size=WIDTH).astype(np.float32), "y": rng.normal(size=WIDTH).astype(np.float32)}


def batches() -> grain.DatasetIterator:
    """Endless shuffled batches; an epoch is 5 steps."""
    source = grain.MapDataset.source(np.arange(BATCH * 5)).seed(7).shuffle().repeat()
    return iter(source.map(lambda index: example(int(index))).to_iter_dataset().batch(BATCH, drop_remainder=True))


@dataclasses.dataclass
class Run:
    """A run that can be started repeatedly in one directory."""

    workdir: pathlib.Path | str
    steps: int = 12
    step_fn: Callable = step_fn
    record: dict = dataclasses.field(default_factory=lambda: {"model": {"width": WIDTH}, "steps": 12})
    cadence: Cadence = every(log_every=1, eval_every=4, save_every=5, keep_checkpoints=2)

    def __call__(self, **arguments: Any) -> tuple[TrainState, grain.DatasetIterator]:
        """Starts it; returns the state and the iterator it read. `arguments` are fields of Job or Launch."""
        launch = {name: arguments.pop(name) for name in LAUNCH_FIELDS if name in arguments}
        job = {
            "steps": self.steps,
            "key": jax.random.key(1),
            "abstract_state": jax.eval_shape(init_state),
            "init_state": init_state,
            "stages": SingleStage(self.step_fn),
            "batches": batches(),
            "put": jax.device_put,
            "evaluate": lambda state: {"norm": jax.jit(optax.tree.norm)(state.params)},
            "record": self.record,
            "cadence": self.cadence,
            "ids_field": "example_ids",
            **arguments,
        }
        return Trainer(Job(**job), Launch(workdir=self.workdir, **launch)).run(), job["batches"]

    def latest(self) -> TrainState:
        """The state in the newest checkpoint, as another process would read it."""
        return restore_state(self.workdir, jax.eval_shape(init_state), checkpoint_steps(self.workdir)[-1])


def assert_same(ours: Any, theirs: Any) -> None:
    """Two trees are equal, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ours), jax.device_get(theirs))


def without_times(workdir: pathlib.Path | str) -> list[dict[str, Any]]:
    """Metrics that do not depend on the clock or the machine."""
    return [
        {name: value for name, value in line.items() if not name.startswith(("time/", "memory/"))}
        for line in read_metrics(workdir)
    ]


@dataclasses.dataclass
class Outcome:
    """The results of a run."""

    state: TrainState
    metrics: list[dict[str, Any]]
    iterator_state: dict[str, Any]
    next_batch: dict[str, np.ndarray]


def outcome(run: Run, state: TrainState, iterator: grain.DatasetIterator) -> Outcome:
    """Returns the results of `run`, and the next batch."""
    return Outcome(jax.device_get(state), without_times(run.workdir), iterator.get_state(), next(iterator))


def assert_same_outcome(ours: Outcome, theirs: Outcome) -> None:
    """Parameters, optimizer state, metrics and data iterator are equal, bit for bit."""
    assert_same(ours.state, theirs.state)
    assert ours.metrics == theirs.metrics
    assert ours.iterator_state == theirs.iterator_state
    assert_same(ours.next_batch, theirs.next_batch)
