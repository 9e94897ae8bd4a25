"""The training loop stops on signals at any time, and saves by steps and by time."""

import itertools
import os
import pathlib
import signal
import time
import types
from typing import Any

import jax
import numpy as np
import optax
import pytest

from tests.varedit_jax.training.runs import (
    Outcome,
    Run,
    assert_same,
    assert_same_outcome,
    every,
    init_state,
    outcome,
    step_fn,
)
from varedit_jax.training import trainer
from varedit_jax.training.state import TrainState
from varedit_jax.training.stop import poll
from varedit_jax.weights.run_directory import checkpoint_steps


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(
    whole: Outcome, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """The running step is finished and saved; the exit code is the signal's; the same command resumes."""

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
    assert f"resuming from the checkpoint of step 7 in {tmp_path}" in capsys.readouterr().err


def test_a_second_interrupt_does_not_wait(tmp_path: pathlib.Path) -> None:
    """Ctrl-C twice ends a step that hangs."""

    def hanging(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path, step_fn=hanging)()


@pytest.mark.parametrize("at", [0, 4, 12])
def test_a_signal_in_an_evaluation(whole: Outcome, tmp_path: pathlib.Path, at: int) -> None:
    """It is interrupted, the state is saved, and the resumed run repeats it; the last one, too."""
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
    """A checkpoint is saved before a later stage is compiled."""
    seen: list[list[str]] = []

    @jax.jit(donate_argnums=0)
    def second(*arguments: Any) -> Any:  # runs as Python code when it is compiled
        deadline = time.monotonic() + 20
        while not (tmp_path / "checkpoints" / "7").exists() and time.monotonic() < deadline:
            time.sleep(0.01)  # saving continues during the compilation
        seen.append(sorted(path.name for path in (tmp_path / "checkpoints").iterdir()))
        os.kill(os.getpid(), signal.SIGTERM)
        return step_fn.__wrapped__(*arguments)

    class TwoStages:
        """The second begins at step 7."""

        def stage(self, number: int) -> int:
            return int(number >= 7)

        def step(self, number: int) -> Any:
            return second if number >= 7 else step_fn

    run = Run(tmp_path)
    with pytest.raises(SystemExit):
        run(stages=TwoStages())
    assert seen == [["5", "7"]]
    assert checkpoint_steps(tmp_path) == [7, 8]  # the step that was compiled has been made
    assert_same_outcome(outcome(run, *run()), whole)


def test_a_signal_before_the_first_step(tmp_path: pathlib.Path) -> None:
    """Nothing is saved, and nothing looks like a run that lost its checkpoints."""

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


def test_saves_by_time(whole: Outcome, tmp_path: pathlib.Path) -> None:
    """The run does not depend on the number of saves."""
    cadence = every(log_every=1, eval_every=4, save_every=0, save_minutes=1e-9, keep_checkpoints=1, keep_every=4)
    run = Run(tmp_path / "often", cadence=cadence)
    run(stop_after=6)
    assert checkpoint_steps(run.workdir) == [4, 6]
    assert_same_outcome(outcome(run, *run()), whole)
    assert checkpoint_steps(run.workdir) == [4, 8, 12]


def test_saves_when_minutes_have_passed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes count from the last save; here each reading of the clock advances it by a second."""
    seconds = itertools.count()
    monkeypatch.setattr(trainer, "time", types.SimpleNamespace(monotonic=lambda: float(next(seconds))))
    Run(tmp_path, cadence=every(save_every=6, save_minutes=3.5 / 60, keep_checkpoints=20))()
    assert checkpoint_steps(tmp_path) == [4, 6, 10, 12]


def test_processes_save_when_the_first_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 0 decides for all when to save and when to check again."""
    now = 0.0
    asked: list[list[int]] = []

    def broadcast(values: np.ndarray) -> np.ndarray:
        asked.append(values.tolist())
        return np.array([now >= 60, 5], np.int32)

    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.experimental.multihost_utils.broadcast_one_to_all", broadcast)
    timer = trainer.SaveTimer(1.0)
    saved = []
    for step in range(40):
        now = step * 2.0
        if timer.due(step):
            saved.append(step)
            timer.saved()
    assert saved == [30, 35]  # the stand-in is never restarted
    assert asked[:3] == [[0, 1], [0, 3], [0, 3]]  # steps of 2 s: after 3 of them a tenth of a minute is over
    assert len(asked) == 8
