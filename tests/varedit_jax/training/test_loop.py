"""The training loop: resumed equals uninterrupted, and what the user is told."""

import dataclasses
import itertools
import os
import pathlib
import shutil
import signal
import socket
import time
import types
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varedit_jax.config import GuardConfig, OptimizerConfig
from varedit_jax.errors import UserError
from varedit_jax.training import loop as loop_lib
from varedit_jax.training.checkpoint import checkpoint_steps, restore_state
from varedit_jax.training.goodput import read_goodput
from varedit_jax.training.ledger import read_metrics
from varedit_jax.training.loop import Cadence, train
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.replay import read_inputs
from varedit_jax.training.report import Work
from varedit_jax.training.state import TrainState
from varedit_jax.training.stop import poll

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

    def latest(self) -> TrainState:
        """The state in the newest checkpoint, as another process would read it."""
        return restore_state(self.workdir, jax.eval_shape(init_state), checkpoint_steps(self.workdir)[-1])


def assert_same(ours: Any, theirs: Any) -> None:
    """Two trees are equal, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ours), jax.device_get(theirs))


def without_times(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Metrics that do not depend on the clock or the machine."""
    return [
        {name: value for name, value in line.items() if not name.startswith(("time/", "memory/"))}
        for line in read_metrics(workdir)
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
    """Times, the learning rate and what the data count stand beside the metrics."""
    cadence = Cadence(log_every=2, save_every=0)
    counts = iter(range(100))
    Run(tmp_path, steps=4, cadence=cadence)(
        learning_rate=lambda step: 0.5 * step, data_metrics=lambda: {"data/bad/cut_short": float(next(counts))}
    )
    lines = read_metrics(tmp_path)
    bad = [line["data/bad/cut_short"] for line in lines]
    assert bad == sorted(set(bad))  # asked for anew at every line
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
    cadence = Cadence(save_every=12)
    with pytest.raises(
        UserError, match="10 steps in a row, 2 to 11, were not finite, the last one with loss nan; .* lower"
    ):
        Run(tmp_path / "always", step_fn=broken_at(*range(2, 12)), cadence=cadence)()
    assert checkpoint_steps(tmp_path / "always") == []


@jax.jit(donate_argnums=0)
def guarded_step(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update, or none where it is not finite, as the step of an editor does it."""
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
    among them goes on with its count."""
    poisoned = {2: "batch", 5: "gradient", 6: "batch"}
    run = Run(tmp_path, step_fn=guarded_step, steps=9, cadence=Cadence(log_every=1, save_every=0))
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
    _, batch, ids = read_inputs(tmp_path / "replay" / "step_6")
    assert ids is not None and ids.tolist() == list(range(48, 56))
    assert np.isnan(batch["x"][3, 5]) and np.isfinite(batch["x"]).sum() == batch["x"].size - 1


def test_the_last_good_checkpoint_survives_too_many_bad_steps(tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path, step_fn=guarded_step, cadence=Cadence(log_every=1, save_every=4))
    with pytest.raises(UserError, match="3 steps in a row, 5 to 7, were not finite"):
        run(batches=named(dict.fromkeys(range(5, 12), "batch")), guard=GuardConfig(nonfinite_limit=3))
    assert checkpoint_steps(tmp_path) == [4]
    state, _ = run(batches=named({}))
    assert int(state.step) == 12 and np.isfinite(jax.device_get(state.params["linear"]["kernel"])).all()


def test_a_jump_of_the_loss_is_said(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    def jumping(state: TrainState, batch: Any, key: jax.Array) -> Any:
        step = int(jax.device_get(state.step))
        return step_fn(state, batch, key)[0], {"loss": np.float32(5.0 if step == 4 else 1.0)}

    Run(tmp_path, step_fn=jumping, steps=6, cadence=Cadence(log_every=2, save_every=0))(
        batches=named({}), guard=GuardConfig(spike_window=3)
    )
    ids = ", ".join(map(str, range(32, 40)))
    assert (
        f"step 4 has a loss of 5, 5.0 times the median 1 of the last 3 steps; examples {ids}" in capsys.readouterr().err
    )
    assert [line["loss_spike"] for line in read_metrics(tmp_path) if "loss_spike" in line] == [5.0]


@pytest.mark.parametrize("at", [0, 4, 12])
def test_a_signal_in_an_evaluation(whole: Outcome, tmp_path: pathlib.Path, at: int) -> None:
    """It is broken off, what was reached is saved, and it is made again when the run goes on; the last one, too."""
    calls: list[int] = []

    def evaluate(state: TrainState) -> dict[str, Any]:
        calls.append(int(state.step))
        if calls.count(at) == 1 and calls[-1] == at:
            os.kill(os.getpid(), signal.SIGTERM)
            poll()
            raise AssertionError("the evaluation went on")
        return {"norm": jax.jit(optax.tree.norm)(state.params)}

    run = Run(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        run(evaluate=evaluate)
    assert exit_.value.code == 128 + signal.SIGTERM
    assert checkpoint_steps(tmp_path)[-1:] == ([at] if at else [])
    if at:
        assert_same(int(run.latest().step), at)
    state, iterator = run(evaluate=evaluate)
    assert calls == [step for step in (0, 4, 8, 12) for _ in range(1 + (step == at))]
    assert_same_outcome(outcome(run, state, iterator), whole)
    run(evaluate=evaluate)
    assert calls[-1] == 12 and calls.count(12) == 1 + (at == 12)  # finished is finished


def test_a_signal_during_compilation(whole: Outcome, tmp_path: pathlib.Path) -> None:
    """What a later stage's compilation could lose has been saved before it begins."""
    seen: list[list[str]] = []

    @jax.jit(donate_argnums=0)
    def second(*arguments: Any) -> Any:  # runs as Python code when it is compiled
        deadline = time.monotonic() + 20
        while not (tmp_path / "checkpoints" / "7").exists() and time.monotonic() < deadline:
            time.sleep(0.01)  # the writing goes on beside the compilation
        seen.append(sorted(path.name for path in (tmp_path / "checkpoints").iterdir()))
        os.kill(os.getpid(), signal.SIGTERM)
        return step_fn.__wrapped__(*arguments)

    run = Run(tmp_path)
    with pytest.raises(SystemExit):
        run(step_fn=lambda number: step_fn if number < 7 else second)
    assert seen == [["5", "7"]]
    assert checkpoint_steps(tmp_path) == [7, 8]  # the step that was compiled has been made
    assert_same_outcome(outcome(run, *run()), whole)


def test_a_signal_before_the_first_step(tmp_path: pathlib.Path) -> None:
    """There is nothing to save, and nothing that looks like a run which lost something."""

    def struck() -> TrainState:
        os.kill(os.getpid(), signal.SIGTERM)
        return init_state()

    with pytest.raises(SystemExit) as exit_:
        Run(tmp_path, steps=1)(init_state=struck)
    assert exit_.value.code == 143 and checkpoint_steps(tmp_path) == []
    assert int(Run(tmp_path, steps=1)()[0].step) == 1


def test_a_second_sigterm_does_not_wait(tmp_path: pathlib.Path) -> None:
    def hanging(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit_:
        Run(tmp_path, step_fn=hanging)()
    assert exit_.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_saves_by_the_clock(whole: Outcome, tmp_path: pathlib.Path) -> None:
    """However often they come, the run is the same."""
    cadence = Cadence(log_every=1, eval_every=4, save_every=0, save_minutes=1e-9, keep=1, keep_every=4)
    run = Run(tmp_path / "often", cadence=cadence)
    run(stop_after=6)
    assert checkpoint_steps(run.workdir) == [4, 6]
    assert_same_outcome(outcome(run, *run()), whole)
    assert checkpoint_steps(run.workdir) == [4, 8, 12]


def test_saves_when_minutes_have_passed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes since the last save, whatever made it: here a second goes by whenever the time is asked for."""
    seconds = itertools.count()
    monkeypatch.setattr(loop_lib, "time", types.SimpleNamespace(monotonic=lambda: float(next(seconds))))
    Run(tmp_path, cadence=Cadence(save_every=6, save_minutes=3.5 / 60, keep=20))()
    assert checkpoint_steps(tmp_path) == [4, 6, 10, 12]


def test_processes_save_when_the_first_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their clocks differ; the answer, and when to ask again, is that of process 0."""
    now = 0.0
    asked: list[list[int]] = []

    def broadcast(values: np.ndarray) -> np.ndarray:
        asked.append(values.tolist())
        return np.array([now >= 60, 5], np.int32)

    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.experimental.multihost_utils.broadcast_one_to_all", broadcast)
    timer = loop_lib._Timer(1.0)
    saved = []
    for step in range(40):
        now = step * 2.0
        if timer.due(step):
            saved.append(step)
            timer.saved()
    assert saved == [30, 35]  # the stand-in never begins anew
    assert asked[:3] == [[0, 1], [0, 3], [0, 3]]  # steps of 2 s: after 3 of them a tenth of a minute is over
    assert len(asked) == 8


def test_resume_is_what_was_asked_for(tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path, steps=2, cadence=Cadence(save_every=1))
    with pytest.raises(UserError, match=r"there is no checkpoint in .* to go on from, and --resume=yes starts no new"):
        run(resume=True)
    run(resume=False, stop_after=1)
    with pytest.raises(UserError, match="has a checkpoint of step 1, but --resume=no starts a new run"):
        run(resume=False)
    assert int(run(resume=True)[0].step) == 2
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="has lost its checkpoints: a checkpoint of step 2 was saved"):
        run()
    assert not (tmp_path / "checkpoints").exists()


def test_starting_from_nothing_is_said(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps were made, but the process died before it saved any."""

    def dying(state: TrainState, batch: Any, key: jax.Array) -> Any:
        if int(jax.device_get(state.step)) == 3:
            raise ZeroDivisionError
        return step_fn(state, batch, key)

    with pytest.raises(ZeroDivisionError):
        Run(tmp_path, step_fn=dying)()
    words = f"a run in {tmp_path} ended before it saved a checkpoint; it starts from nothing again"
    assert words not in capsys.readouterr().err
    Run(tmp_path)(stop_after=1)
    assert words in capsys.readouterr().err


def test_what_a_run_leaves_for_those_who_measure(tmp_path: pathlib.Path) -> None:
    """A profile of the steps that were asked for, goodput, and FLOP/s."""
    work = Work(flops=10**6, flops_with_encoders=10**6, tokens=5, devices=1, chip=None)
    Run(tmp_path, steps=4, cadence=Cadence(log_every=1, save_every=2))(work=work, profile_steps=(1, 2))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    lines = [line for line in read_metrics(tmp_path) if "loss" in line]
    assert all(line["time/tokens_per_second"] > 0 and line["time/tflops_per_chip"] > 0 for line in lines)
    last = read_goodput(tmp_path)[-1]
    assert last.step == 4
    assert {kind for kind, seconds in last.seconds.items() if seconds > 0} >= {"productive", "compile", "checkpoint"}


def test_a_new_shape_is_compiled_and_not_a_slow_step(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a batch of another aspect; each shape once."""
    phases: list[str] = []
    beat = loop_lib.Watchdog.beat

    def listen(watchdog: loop_lib.Watchdog, phase: str = "") -> None:
        phases.append(phase)
        beat(watchdog, phase)

    monkeypatch.setattr(loop_lib.Watchdog, "beat", listen)
    rows = [BATCH, BATCH, 2 * BATCH, BATCH, 2 * BATCH]
    source = grain.MapDataset.range(len(rows)).map(
        lambda step: jax.tree.map(lambda *x: np.stack(x), *[example(index) for index in range(rows[step])])
    )
    Run(tmp_path, steps=len(rows), cadence=Cadence(save_every=0))(batches=iter(source.to_iter_dataset()))
    kinds = [phase for phase in phases if phase in ("compile", "step")][::2]  # and one when the step is made
    assert kinds == ["compile", "step", "compile", "step", "step"]


def test_a_folder_in_use(tmp_path: pathlib.Path) -> None:
    """A second run in it is refused while the first one lasts."""

    def evaluate(state: TrainState) -> dict[str, Any]:
        del state
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on {socket.gethostname()}; wait"):
            Run(tmp_path)()
        return {}

    Run(tmp_path, steps=1)(evaluate=evaluate)
    Run(tmp_path, steps=2)()


def test_a_run_that_hangs_is_ended(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that come, and evaluations that poll, are signs of life; a step that never ends is not."""
    ends: list[int] = []
    monkeypatch.setattr("os._exit", ends.append)

    def evaluate(state: TrainState) -> dict[str, Any]:
        if int(state.step) == 0:
            poll()
            ends.clear()  # of a start that took long on a busy machine
            for _ in range(20):
                time.sleep(0.1)
                poll()
            assert not ends
        return {}

    def hanging(*arguments: Any) -> Any:
        deadline = time.monotonic() + 30
        while not ends and time.monotonic() < deadline:
            time.sleep(0.1)
        return step_fn(*arguments)

    guard = GuardConfig(hang_minutes=1.5 / 60)
    Run(tmp_path, steps=1, step_fn=hanging)(evaluate=evaluate, guard=guard)
    assert ends[0] == 75


def test_no_implicit_transfer_in_a_step(tmp_path: pathlib.Path) -> None:
    """A batch that was not put on the devices is found out, instead of slowing every step."""
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        Run(tmp_path)(put=lambda batch: batch)
