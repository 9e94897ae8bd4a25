"""The training loop: a resumed run equals an uninterrupted one; messages and refusals."""

import os
import pathlib
import shutil
import socket
import time
from typing import Any

import grain
import jax
import numpy as np
import pytest

from tests.varedit_jax.training.runs import (
    BATCH,
    Outcome,
    Run,
    assert_same,
    assert_same_outcome,
    batches,
    every,
    example,
    outcome,
    step_fn,
)
from varedit_jax.config import GuardConfig
from varedit_jax.errors import UserError
from varedit_jax.training import trainer
from varedit_jax.training.goodput import read_goodput
from varedit_jax.training.metrics import Work, read_metrics
from varedit_jax.training.state import TrainState
from varedit_jax.training.stop import poll


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
    """A process is killed three steps after its last save; the resumed run is the same."""
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


def test_a_finished_run_says_so(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is trained or written again; with more steps it resumes."""
    run = Run(tmp_path, steps=2)
    state, _ = run()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again, _ = run()
    assert_same(again, state)
    assert f"the run in {tmp_path} is finished: it has made 2 of 2 steps" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    longer, _ = Run(tmp_path, steps=3)()
    assert int(longer.step) == 3


@pytest.mark.parametrize("first", [False, True])
def test_order_of_a_step(tmp_path: pathlib.Path, first: bool) -> None:
    """Evaluation and saving precede the next batch; metrics are fetched after the next step is dispatched.

    At step 0 nothing is evaluated or sampled unless asked for.
    """
    events: list[str] = []

    class Watched(grain.DatasetIterator):
        """Records when it moves, and when its position is read."""

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
        """A metric that records when it is fetched."""

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

    cadence = every(log_every=9, eval_every=2, sample_every=3, save_every=2, evaluate_first=first)
    Run(tmp_path, steps=4, step_fn=noting, cadence=cadence)(batches=Watched(), evaluate=evaluate, sample=sample)
    assert events == [
        *(("evaluate 0", "sample 0") if first else ()),
        *("next", "step 0"),
        *("next", "step 1", "fetch 0", "fetch 1"),
        *("evaluate 2", "save", "next", "step 2", "fetch 2"),
        *("sample 3", "next", "step 3", "fetch 3"),
        *("evaluate 4", "sample 4", "save"),
    ]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        f"sheet_{step:07d}.png" for step in ([0] if first else []) + [3, 4]
    ]


def test_what_a_logged_line_has(tmp_path: pathlib.Path) -> None:
    """Times, the learning rate and the counts of the data pipeline are logged with the metrics."""
    cadence = every(log_every=2, save_every=0)
    counts = iter(range(100))
    Run(tmp_path, steps=4, cadence=cadence)(
        learning_rate=lambda step: 0.5 * step, data_metrics=lambda: {"data/bad/cut_short": float(next(counts))}
    )
    lines = read_metrics(tmp_path)
    bad = [line["data/bad/cut_short"] for line in lines]
    assert bad == sorted(set(bad))  # fetched for every line
    assert [line["step"] for line in lines] == [0, 2, 3]  # the last step is always there
    assert [line["learning_rate"] for line in lines] == [0.0, 1.0, 1.5]
    for line in lines:
        assert 0 <= line["time/data_share"] <= 1 and 0 <= line["time/goodput"] <= 1
        assert line["time/step_seconds"] > 0 and line["time/examples_per_second"] > 0


def test_another_configuration_is_refused(tmp_path: pathlib.Path) -> None:
    """The directory of another run is refused."""
    Run(tmp_path)(stop_after=1)
    with pytest.raises(UserError, match="with model.width = 300, but this one has 400; use another --workdir"):
        Run(tmp_path, record={"model": {"width": 400}, "steps": 12})()


def test_data_that_ends(tmp_path: pathlib.Path) -> None:
    """An iterator that ends is a user error."""
    source = grain.MapDataset.source(np.arange(BATCH * 2)).map(lambda index: example(int(index)))
    with pytest.raises(UserError, match="the data ended after 2 of 12 steps"):
        Run(tmp_path)(batches=iter(source.to_iter_dataset().batch(BATCH)))


def test_resume_flag_is_obeyed(tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path, steps=2, cadence=every(save_every=1))
    with pytest.raises(UserError, match=r"there is no checkpoint in .* to resume from, and --resume=yes starts no new"):
        run(resume=True)
    run(resume=False, stop_after=1)
    with pytest.raises(UserError, match="has a checkpoint of step 1, but --resume=no starts a new run"):
        run(resume=False)
    assert int(run(resume=True)[0].step) == 2
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="has lost its checkpoints: a checkpoint of step 2 was saved"):
        run()
    assert not (tmp_path / "checkpoints").exists()


def test_starting_over_is_reported(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_run_leaves_profile_and_goodput(tmp_path: pathlib.Path) -> None:
    """A profile of the requested steps, goodput, and FLOP/s."""
    work = Work(flops=10**6, flops_with_encoders=10**6, tokens=5, devices=1, chip=None)
    Run(tmp_path, steps=4, cadence=every(log_every=1, save_every=2))(work=work, profile_steps=(1, 2))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    lines = [line for line in read_metrics(tmp_path) if "loss" in line]
    assert all(line["time/tokens_per_second"] > 0 and line["time/tflops_per_chip"] > 0 for line in lines)
    last = read_goodput(tmp_path)[-1]
    assert last.step == 4
    assert {kind for kind, seconds in last.seconds.items() if seconds > 0} >= {"productive", "compile", "checkpoint"}


def test_a_new_shape_is_compiled_and_not_a_slow_step(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a batch of another aspect; each shape once."""
    phases: list[str] = []
    beat = trainer.Watchdog.beat

    def listen(watchdog: trainer.Watchdog, phase: str = "") -> None:
        phases.append(phase)
        beat(watchdog, phase)

    monkeypatch.setattr(trainer.Watchdog, "beat", listen)
    rows = [BATCH, BATCH, 2 * BATCH, BATCH, 2 * BATCH]
    source = grain.MapDataset.range(len(rows)).map(
        lambda step: jax.tree.map(lambda *x: np.stack(x), *[example(index) for index in range(rows[step])])
    )
    Run(tmp_path, steps=len(rows), cadence=every(save_every=0))(batches=iter(source.to_iter_dataset()))
    kinds = [phase for phase in phases if phase in ("compile", "step")][::2]  # and one when the step is made
    assert kinds == ["compile", "step", "compile", "step", "step"]


def test_a_directory_in_use(tmp_path: pathlib.Path) -> None:
    """A second run in it is refused while the first one lasts."""

    def evaluate(state: TrainState) -> dict[str, Any]:
        del state
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on {socket.gethostname()}; wait"):
            Run(tmp_path)()
        return {}

    Run(tmp_path, steps=1)(evaluate=evaluate)
    Run(tmp_path, steps=2)()


def test_a_run_that_hangs_is_ended(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches and polls of evaluations reset the watchdog; a step that never ends does not."""
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
        deadline = time.monotonic() + (30 if int(arguments[0].step) else 0)
        while not ends and time.monotonic() < deadline:
            time.sleep(0.1)
        return step_fn(*arguments)

    guard = GuardConfig(hang_minutes=1.5 / 60)
    Run(tmp_path, steps=2, step_fn=hanging)(evaluate=evaluate, guard=guard)
    assert ends[0] == 75


def test_no_implicit_transfer_in_a_step(tmp_path: pathlib.Path) -> None:
    """A batch that is not on the devices is an error, instead of slowing every step."""
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        Run(tmp_path)(put=lambda batch: batch)
