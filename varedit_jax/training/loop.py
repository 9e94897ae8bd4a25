"""The training loop, of editors and tokenizers alike."""

import contextlib
import dataclasses
import os
import signal
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any, Self

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils

from varedit_jax.errors import UserError
from varedit_jax.training import checkpoint
from varedit_jax.training.ledger import Ledger, Stopwatch, say
from varedit_jax.training.report import Metrics, Report
from varedit_jax.training.state import TrainState

StepFn = Callable[[TrainState, Any, jax.Array], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cadence:
    """How often things happen, in steps; 0 is never."""

    log_every: int = 10
    eval_every: int = 0
    sample_every: int = 0
    save_every: int = 500
    keep: int = 3  # newest checkpoints that are kept


def train(
    *,
    workdir: str | os.PathLike[str],
    steps: int,
    key: jax.Array,
    abstract_state: TrainState,
    init_state: Callable[[], TrainState],
    step_fn: Callable[[int], StepFn],
    batches: grain.DatasetIterator,
    put: Callable[[dict[str, np.ndarray]], Any],
    run_record: Mapping[str, Any],
    cadence: Cadence,
    evaluate: Callable[[TrainState], Metrics] | None = None,
    sample: Callable[[TrainState, int], Mapping[str, np.ndarray]] | None = None,
    learning_rate: Callable[[int], float] | None = None,
    stop_after: int | None = None,
) -> TrainState:
    """Trains up to `steps` updates, going on from the newest checkpoint in `workdir` if there is one.

    Step n, counted from 0, is the update that turns a state of `step` n into one of n + 1. Its order:

      1. with the state before the update: evaluate, sample, save (state and iterator in one call), where they are
         due; all before the data iterator moves, so that a checkpoint names the batch that comes next
      2. take the next batch and put it on the devices
      3. dispatch the update, with the key fold_in(key, n); no implicit transfer may happen in it
      4. fetch and write down the metrics of step n - 1, while step n runs

    After the last step: evaluate, sample and save once more. What is due is a matter of n alone, and so a run that
    was stopped and resumed equals one that was not, bit for bit. A run that goes on at step n repeats an evaluation
    of step n, because the ledger drops whatever an earlier process wrote for n and later.

    SIGTERM and SIGINT finish the step, save, and exit with 128 + the signal's number; a second SIGINT does not wait.

    Args:
      workdir: folder of the run, which all processes see.
      steps: updates of the whole run, not of this process.
      key: a PRNG key, the same in every process of the run.
      abstract_state: shapes, types and shardings of the state (jax.eval_shape of `init_state`).
      init_state: makes the state of step 0; called only for a new run.
      step_fn: n -> the function of step n, (state, batch, key) -> (state, metrics); compiled, and free to donate the
        state. Metrics are scalars or vectors [K]; a `loss` among them is watched for being finite.
      batches: endless iterator over dicts of numpy arrays with the examples of this process in front, [B, ...].
      put: places such a batch on the devices, explicitly.
      run_record: the configuration of the run as a dict, for config.json.
      cadence: when to log, evaluate, sample and save.
      evaluate: metrics of a state on held-out data; written down as eval/NAME.
      sample: (state, step) -> uint8 pictures [y, x, 3] by name.
      learning_rate: of a step, for the log.
      stop_after: end, after saving, when this process has made so many steps.

    Returns:
      The state after `steps` updates, or after `stop_after`.

    Raises:
      UserError: `workdir` holds another run; a full disk; data that ends; a loss that stays infinite or NaN.
      SystemExit: after a signal, when all is saved.
    """
    clock = Stopwatch()
    checkpoint.check_config(workdir, run_record)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(_StopSignal())
        checkpoints = stack.enter_context(checkpoint.Checkpoints(workdir, keep=cadence.keep))
        resumed = checkpoints.latest() is not None
        state = checkpoints.restore(abstract_state, batches) if resumed else init_state()
        start = int(jax.device_get(state.step))
        if start >= steps:
            say(f"the run in {workdir} is finished: it has made {start} of {steps} steps")
            return state
        ledger = stack.enter_context(contextlib.closing(Ledger(workdir, first_step=start, steps=steps)))
        if jax.process_index() == 0:
            checkpoint.write_config(workdir, run_record)
        if resumed:
            ledger.say(f"going on from the checkpoint of step {start} in {workdir}")

        report = Report(ledger, clock, cadence.log_every, steps, learning_rate)

        def look(step: int) -> None:
            """Evaluates and samples, where due."""
            if evaluate is not None and _due(step, cadence.eval_every, steps):
                report.finish()
                with clock.time("evaluate"):
                    ledger.record(step, {f"eval/{name}": value for name, value in evaluate(state).items()})
            if sample is not None and _due(step, cadence.sample_every, steps):
                report.finish()
                with clock.time("sample"):
                    ledger.pictures(step, sample(state, step))

        def save(step: int) -> None:
            report.finish()  # so that a run with broken numbers ends before it is saved
            with clock.time("save"):
                checkpoints.save(step, state, batches)

        last = steps if stop_after is None else min(steps, start + stop_after)
        step = start
        run: StepFn | None = None
        while step < last and not stop.requested(step):
            look(step)
            if step > start and _due(step, cadence.save_every, steps):
                save(step)

            with clock.time("data"):
                batch = next(batches, None)
                if batch is None:
                    raise UserError(f"the data ended after {step} of {steps} steps; training needs an endless iterator")
                examples = len(jax.tree.leaves(batch)[0]) * jax.process_count()
                batch = put(batch)
            run, before = step_fn(step), run
            with clock.time("step" if run is before else "compile"), jax.transfer_guard("disallow"):
                state, metrics = run(state, batch, jax.random.fold_in(key, state.step))
            report.later(step, metrics, examples)
            step += 1

        report.finish()
        if step == steps:
            look(step)
        if step > start:
            save(step)
            checkpoints.wait()
        if stop.signal is not None or step < steps:
            by = "" if stop.signal is None else f" by {stop.signal.name}"
            saved = ", which is saved" if step else ""
            ledger.say(f"stopped{by} at step {step} of {steps}{saved}; run the same command again to go on")
        if stop.signal is not None:
            raise SystemExit(128 + stop.signal)
    return state


def _due(step: int, every: int, steps: int) -> bool:
    """Whether something that happens every so many steps happens now; at the end everything does."""
    return every > 0 and (step % every == 0 or step == steps)


class _StopSignal:
    """Notes SIGTERM and SIGINT, for the loop to end between two steps.

    With several processes all of them have to stop at one step; there JAX's preemption service tells when.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def requested(self, step: int) -> bool:
        """Whether to stop before `step`."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def __enter__(self) -> Self:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
