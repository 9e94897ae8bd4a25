"""The training loop: resumed equals uninterrupted, and what the user is told."""

import dataclasses
import os
import pathlib
import signal
import time
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varedit_jax.config import OptimizerConfig
from varedit_jax.errors import UserError
from varedit_jax.training.checkpoint import checkpoint_steps
from varedit_jax.training.ledger import read_metrics
from varedit_jax.training.loop import Cadence, train
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.state import TrainState

WIDTH = 300  # large enough that an update in place would show in a checkpoint being written
BATCH = 8
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=3, weight_decay=0.1), 12)


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
    """A run that can be started again and again in one folder."""

    workdir: pathlib.Path
    steps: int = 12
    step_fn: Callable = step_fn
    record: dict = dataclasses.field(default_factory=lambda: {"model": {"width": WIDTH}, "steps": 12})
    cadence: Cadence = Cadence(log_every=1, eval_every=4, save_every=5, keep=2)

    def __call__(self, **arguments: Any) -> tuple[TrainState, grain.DatasetIterator]:
        """Starts it; returns the state and the iterator it read."""
        iterator = batches()
        state = train(
            **{
                "workdir": self.workdir,
                "steps": self.steps,
                "key": jax.random.key(1),
                "abstract_state": jax.eval_shape(init_state),
                "init_state": init_state,
                "step_fn": lambda number: self.step_fn,
                "batches": iterator,
                "put": jax.device_put,
                "evaluate": lambda state: {"norm": jax.jit(optax.tree.norm)(state.params)},
                "run_record": self.record,
                "cadence": self.cadence,
                **arguments,
            }
        )
        return state, iterator


def assert_same(ours: Any, theirs: Any) -> None:
    """Two trees are equal, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ours), jax.device_get(theirs))


def without_times(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Metrics that do not depend on the clock."""
    return [
        {name: value for name, value in line.items() if not name.startswith("time/")} for line in read_metrics(workdir)
    ]


@dataclasses.dataclass
class Outcome:
    """What a run left."""

    state: TrainState
    metrics: list[dict[str, Any]]
    iterator_state: dict[str, Any]
    next_batch: dict[str, np.ndarray]


def outcome(run: Run, state: TrainState, iterator: grain.DatasetIterator) -> Outcome:
    """What `run` left, and the batch that would come next."""
    return Outcome(jax.device_get(state), without_times(run.workdir), iterator.get_state(), next(iterator))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What an uninterrupted run leaves."""
    run = Run(tmp_path_factory.mktemp("whole"))
    return outcome(run, *run())


def assert_same_outcome(ours: Outcome, theirs: Outcome) -> None:
    """Parameters, optimizer state, metrics and data iterator are equal, bit for bit."""
    assert_same(ours.state, theirs.state)
    assert ours.metrics == theirs.metrics
    assert ours.iterator_state == theirs.iterator_state
    assert_same(ours.next_batch, theirs.next_batch)


def test_stopped_and_resumed_equals_uninterrupted(whole: Outcome, tmp_path: pathlib.Path) -> None:
    """Three processes, stopped mid-epoch, do what one does."""
    run = Run(tmp_path)
    assert int(run(stop_after=3)[0].step) == 3
    assert int(run(stop_after=4)[0].step) == 7
    assert_same_outcome(outcome(run, *run()), whole)


def test_every_step_has_its_batch_and_its_key(whole: Outcome) -> None:
    lines = [line for line in whole.metrics if "loss" in line]
    assert [line["step"] for line in lines] == list(range(12))
    assert len({line["first"] for line in lines}) == 12
    draws = [float(jax.random.uniform(jax.random.fold_in(jax.random.key(1), step))) for step in range(12)]
    assert [line["draw"] for line in lines] == draws


def test_killed_and_resumed_equals_uninterrupted(whole: Outcome, tmp_path: pathlib.Path) -> None:
    """A process that dies three steps after its last save, without any farewell, is made good."""
    calls = 0

    def dying(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 8:
            raise ZeroDivisionError("power cut")
        return step_fn(*arguments)

    with pytest.raises(ZeroDivisionError, match="power cut"):
        Run(tmp_path, step_fn=dying)()
    assert [line["step"] for line in read_metrics(tmp_path) if "loss" in line][-1] > 5
    run = Run(tmp_path)
    assert_same_outcome(outcome(run, *run()), whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(
    whole: Outcome, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """The step that runs is finished and saved; the exit code tells of the signal; rerunning goes on."""

    def struck(state: TrainState, batch: Any, key: jax.Array) -> Any:
        if int(jax.device_get(state.step)) == 6:
            os.kill(os.getpid(), number)
        return step_fn(state, batch, key)

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as exit_:
        Run(tmp_path, step_fn=struck)()
    assert exit_.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert f"stopped by {number.name} at step 7 of 12, which is saved; run the same command" in capsys.readouterr().err
    run = Run(tmp_path)
    assert_same_outcome(outcome(run, *run()), whole)
    assert f"going on from the checkpoint of step 7 in {tmp_path}" in capsys.readouterr().err


def test_a_second_interrupt_does_not_wait(tmp_path: pathlib.Path) -> None:
    """Ctrl-C twice ends a step that hangs."""

    def hanging(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path, step_fn=hanging)()


def test_a_finished_run_says_so(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is trained or written again; with more steps it goes on."""
    run = Run(tmp_path, steps=2)
    state, _ = run()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again, _ = run()
    assert_same(again, state)
    assert f"the run in {tmp_path} is finished: it has made 2 of 2 steps" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    longer, _ = Run(tmp_path, steps=3)()
    assert int(longer.step) == 3


def test_order_of_a_step(tmp_path: pathlib.Path) -> None:
    """Looking and saving come before the batch is taken; metrics are fetched after the next step is dispatched."""
    events: list[str] = []

    class Watched(grain.DatasetIterator):
        """Notes when it moves, and when its place is asked for."""

        def __init__(self) -> None:
            super().__init__()
            self._inner = batches()

        def __next__(self) -> Any:
            events.append("next")
            return next(self._inner)

        def get_state(self) -> Any:
            events.append("save")
            return self._inner.get_state()

        def set_state(self, state: Any) -> None:
            self._inner.set_state(state)

    class Lagging:
        """A metric that notes when it is fetched."""

        def __init__(self, step: int) -> None:
            self._step = step

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            events.append(f"fetch {self._step}")
            return np.zeros((), np.float32)

    def noting(state: TrainState, batch: Any, key: jax.Array) -> Any:
        step = int(jax.device_get(state.step))
        events.append(f"step {step}")
        return step_fn(state, batch, key)[0], {"loss": Lagging(step)}

    def evaluate(state: TrainState) -> dict[str, float]:
        events.append(f"evaluate {int(state.step)}")
        return {}

    def sample(state: TrainState, step: int) -> dict[str, np.ndarray]:
        events.append(f"sample {step}")
        return {"sheet": np.zeros((2, 2, 3), np.uint8)}

    Run(tmp_path, steps=4, step_fn=noting, cadence=Cadence(log_every=9, eval_every=2, sample_every=3, save_every=2))(
        batches=Watched(), evaluate=evaluate, sample=sample
    )
    assert events == [
        *("evaluate 0", "sample 0", "next", "step 0"),
        *("next", "step 1", "fetch 0", "fetch 1"),
        *("evaluate 2", "save", "next", "step 2", "fetch 2"),
        *("sample 3", "next", "step 3", "fetch 3"),
        *("evaluate 4", "sample 4", "save"),
    ]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        f"sheet_{step:07d}.png" for step in (0, 3, 4)
    ]


def test_what_a_logged_line_has(tmp_path: pathlib.Path) -> None:
    """Times and the learning rate stand beside the metrics."""
    cadence = Cadence(log_every=2, save_every=0)
    Run(tmp_path, steps=4, cadence=cadence)(learning_rate=lambda step: 0.5 * step)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [0, 2, 3]  # the last step is always there
    assert [line["learning_rate"] for line in lines] == [0.0, 1.0, 1.5]
    for line in lines:
        assert 0 <= line["time/data_share"] <= 1 and 0 <= line["time/goodput"] <= 1
        assert line["time/step_seconds"] > 0 and line["time/examples_per_second"] > 0


def test_another_configuration_is_refused(tmp_path: pathlib.Path) -> None:
    """A run's folder is for that run."""
    Run(tmp_path)(stop_after=1)
    with pytest.raises(UserError, match="with model.width = 300, but this one has 400; use another --workdir"):
        Run(tmp_path, record={"model": {"width": 400}, "steps": 12})()


def test_data_that_ends(tmp_path: pathlib.Path) -> None:
    """An iterator that is not endless is the user's mistake to put right."""
    source = grain.MapDataset.source(np.arange(BATCH * 2)).map(lambda index: example(int(index)))
    with pytest.raises(UserError, match="the data ended after 2 of 12 steps"):
        Run(tmp_path)(batches=iter(source.to_iter_dataset().batch(BATCH)))


def test_a_loss_that_stays_nan(tmp_path: pathlib.Path) -> None:
    """Single bad steps pass; too many in a row end the run, and are not saved."""

    def broken_at(*bad: int) -> Callable:
        def broken(state: TrainState, batch: Any, key: jax.Array) -> Any:
            step = int(jax.device_get(state.step))
            state, metrics = step_fn(state, batch, key)
            return state, metrics | ({"loss": np.float32("nan")} if step in bad else {})

        return broken

    Run(tmp_path / "now and then", step_fn=broken_at(0, 3, 4, 5, 6, 7, 8, 9, 10, 11))()
    with pytest.raises(UserError, match="the loss was nan in 10 steps in a row, up to step 11; lower"):
        Run(tmp_path / "always", step_fn=broken_at(*range(2, 12)), cadence=Cadence(save_every=12))()
    assert checkpoint_steps(tmp_path / "always") == []


def test_no_implicit_transfer_in_a_step(tmp_path: pathlib.Path) -> None:
    """A batch that was not put on the devices is found out, instead of slowing every step."""
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        Run(tmp_path)(put=lambda batch: batch)
