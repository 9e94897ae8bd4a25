"""The training loop, of editors and tokenizers alike."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils

from varedit_jax.config import Cadence, GuardConfig
from varedit_jax.errors import UserError
from varedit_jax.parallel.processes import say
from varedit_jax.training import checkpoint, run_config
from varedit_jax.training.goodput import Goodput, Stopwatch
from varedit_jax.training.guard import Guard, was_skipped
from varedit_jax.training.lock import Lock
from varedit_jax.training.metrics import Ledger, Report, Work, read_metrics
from varedit_jax.training.profile import Profiler
from varedit_jax.training.replay import EXAMPLE_IDS, Inputs
from varedit_jax.training.state import TrainState
from varedit_jax.training.stop import Stopped, StopSignal, poll
from varedit_jax.training.watchdog import Watchdog
from varedit_jax.types import Metrics

__all__ = ["Metrics", "StepFn", "train"]

StepFn = Callable[[TrainState, Any, jax.Array], tuple[TrainState, Metrics]]


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
    resume: bool | None = None,
    guard: GuardConfig | None = None,
    work: Work | Callable[[int, Any], Work] | None = None,
    profile_steps: tuple[int, int] = (0, 0),
    dump_step: int | None = None,
    data_metrics: Callable[[], Mapping[str, float]] | None = None,
) -> TrainState:
    """Trains up to `steps` updates, going on from the newest checkpoint in `workdir` if there is one.

    Step n, counted from 0, is the update that turns a state of `step` n into one of n + 1. Its order:

      1. with the state before the update: evaluate, sample, save (state and iterator in one call), where they are
         due; all before the data iterator moves, so that a checkpoint names the batch that comes next
      2. take the next batch and put it on the devices
      3. dispatch the update, with the key fold_in(key, n); no implicit transfer may happen in it
      4. fetch and write down the metrics of step n - 1, while step n runs

    After the last step: evaluate, sample and save once more. What is due is a matter of n alone (`save_minutes` aside,
    which changes nothing else), and so a run that was stopped and resumed equals one that was not, bit for bit. A run
    that goes on at step n repeats an evaluation of step n, because the ledger drops whatever an earlier process wrote
    for n and later.

    SIGTERM and SIGINT, at any moment, end the step, save, and exit with 128 + the signal's number. An evaluation or a
    sample that calls `stop.poll` is broken off, and repeated when the run goes on. A compilation cannot be broken off,
    and a cluster may kill the process before it has ended (a preempted TPU after about 10 s): so where `step_fn` gives
    another function than before, a checkpoint is saved before that is compiled, and nothing is lost then. A kill
    without a signal loses what was done since the last checkpoint. A second signal does not wait for the step.

    A batch with an entry `example_ids` (int [B]) has it for those who watch: it is taken out before `put`. The batch of
    a step that was skipped because it was not finite is written to `workdir`/replay (replay.py).

    Args:
      workdir: directory of the run, which all processes see.
      steps: updates of the whole run, not of this process.
      key: a PRNG key, the same in every process of the run.
      abstract_state: shapes, types and shardings of the state (jax.eval_shape of `init_state`).
      init_state: makes the state of step 0; called only for a new run.
      step_fn: n -> the function of step n, (state, batch, key) -> (state, metrics); compiled, and free to donate the
        state. Metrics are scalars or vectors [K], the same in all processes; the guard reads `loss`, `gradient_norm`
        and `skipped`.
      batches: endless iterator over dicts of numpy arrays with the examples of this process in front, [B, ...].
      put: places such a batch on the devices, explicitly; as arrays of the whole batch where there are several
        processes.
      run_record: the configuration of the run as a dict, for config.json.
      cadence: when to log, evaluate, sample and save.
      evaluate: metrics of a state on held-out data; written down as eval/NAME.
      sample: (state, step) -> uint8 images [y, x, 3] by name.
      learning_rate: of a step, for the log.
      stop_after: end, after saving, when this process has made so many steps.
      resume: True: only go on with a run; False: only start a new one; None: whichever it is, but do not start from
        nothing where checkpoints were lost.
      guard: what is too many skipped steps, a jump of the loss, too long without a step; None: as GuardConfig has it.
      work: what an example costs, for TFLOP/s and MFU; a function of step and batch where stages or aspects differ.
      profile_steps: steps [first, last) that are traced into `workdir`/profile.
      dump_step: a step whose state and batch are written to `workdir`/replay.
      data_metrics: what the pipeline of `batches` counts, to be written down beside the metrics of a step.

    Returns:
      The state after `steps` updates, or after `stop_after`.

    Raises:
      UserError: `workdir` holds another run, is in use, or lost its checkpoints; a full disk; data that ends; too many
        steps in a row that are not finite, before any of them is saved.
      SystemExit: after a signal, when all is saved; code 75 when the watchdog ends a run that hangs.
    """
    clock = Stopwatch()
    guard = guard or GuardConfig()
    with contextlib.ExitStack() as stack:
        stack.enter_context(Lock(workdir))
        run_config.check_config(workdir, run_record)
        checkpoint.check_resume(workdir, resume)
        watchdog = stack.enter_context(Watchdog(guard.hang_minutes, workdir))
        stop = stack.enter_context(StopSignal(watchdog.beat))
        checkpoints = stack.enter_context(
            checkpoint.Checkpoints(workdir, keep=cadence.keep_checkpoints, keep_every=cadence.keep_every)
        )

        @contextlib.contextmanager
        def phase(name: str) -> Iterator[None]:
            watchdog.beat(name)
            with clock.time(name):
                yield
            watchdog.beat()

        resumed = checkpoints.latest() is not None
        if resumed:
            with phase("restore"):
                state = checkpoints.restore(abstract_state, batches)
        else:
            state = init_state()
        start = int(jax.device_get(state.step))
        if start >= steps and checkpoints.looked():
            say(f"the run in {workdir} is finished: it has made {start} of {steps} steps")
            return state
        key = jax.device_put(key, state.step.sharding)
        written = read_metrics(workdir)
        ledger = stack.enter_context(contextlib.closing(Ledger(workdir, first_step=start, steps=steps)))
        goodput = stack.enter_context(Goodput(workdir, clock, start))
        if jax.process_index() == 0:
            run_config.write_config(workdir, run_record)
        if resumed:
            ledger.say(f"going on from the checkpoint of step {start} in {workdir}")
        elif written:
            ledger.say(f"a run in {workdir} ended before it saved a checkpoint; it starts from nothing again")

        inputs = Inputs(workdir)
        checks = _Checks(Guard(guard, ledger.say), inputs, data_metrics or dict)
        checks.guard.recall(line for line in written if line["step"] < start)
        report = Report(ledger, clock, cadence.log_every, steps, learning_rate, guard=checks, goodput=goodput)
        profiler = Profiler(workdir, *profile_steps)
        stack.callback(profiler.close)
        timer = _Timer(cadence.save_minutes)

        def look(step: int) -> bool:
            """Evaluates and samples, where due. False if it was broken off because the run is to stop."""
            try:
                if evaluate is not None and _due(step, cadence.eval_every, steps):
                    report.finish()
                    with phase("evaluate"):
                        ledger.record(step, {f"eval/{name}": value for name, value in evaluate(state).items()})
                    poll()
                if sample is not None and _due(step, cadence.sample_every, steps):
                    report.finish()
                    with phase("sample"):
                        ledger.images(step, sample(state, step))
                    poll()
            except Stopped:
                return False
            return True

        def save(step: int, looked: bool = True) -> None:
            report.finish()  # so that a run with broken numbers ends before it is saved
            with phase("save"):
                checkpoints.save(step, state, batches, looked=looked)
            timer.saved()

        last = steps if stop_after is None else min(steps, start + stop_after)
        step = start
        run: StepFn | None = None
        compiled: set[Any] = set()  # shapes of batches that `run` was compiled for
        while step < last and not stop.requested() and look(step):
            run, before = step_fn(step), run
            anew = before is not None and run is not before and cadence.save_every > 0
            if step > start and (_due(step, cadence.save_every, steps) or anew or timer.due(step)):
                save(step)

            with phase("data"):
                batch = next(batches, None)
                if batch is None:
                    raise UserError(f"the data ended after {step} of {steps} steps; training needs an endless iterator")
                inputs.keep(step, batch)
                example_ids = batch.get(EXAMPLE_IDS)
                batch = put({name: value for name, value in batch.items() if name != EXAMPLE_IDS})
                examples = len(jax.tree.leaves(batch)[0])
            shapes = tuple(sorted((name, value.shape) for name, value in batch.items()))
            if run is not before:
                compiled.clear()
            if step == dump_step:
                inputs.dump(step, "asked for", state)
            profiler.step(step, state)
            with phase("step" if shapes in compiled else "compile"), jax.transfer_guard("disallow"):
                state, metrics = run(state, batch, jax.random.fold_in(key, state.step))
            compiled.add(shapes)
            watchdog.beat("step")
            report.later(step, metrics, examples, example_ids, work(step, batch) if callable(work) else work)
            step += 1

        report.finish()
        looked = step < steps or look(step)
        if step > start:
            save(step, looked)
            checkpoints.wait()
        elif step == steps and looked:
            checkpoints.mark_looked()
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


@dataclasses.dataclass(frozen=True)
class _Checks:
    """The guard, with the inputs of bad steps written down for it, and what the data pipeline counts."""

    guard: Guard
    inputs: Inputs
    data_metrics: Callable[[], Mapping[str, float]]

    def check(self, step: int, metrics: Metrics, example_ids: np.ndarray | None) -> dict[str, float]:
        """As Guard.check."""
        if was_skipped(metrics):
            self.inputs.dump(step, "not finite")
        return {**self.guard.check(step, metrics, example_ids), **self.data_metrics()}


class _Timer:
    """Says when a checkpoint is due by the clock. Clocks differ, so that of process 0 counts for all.

    Asking it takes a broadcast, which waits for the step that runs. So its answer tells also how many steps to wait
    before asking again, about a tenth of the time between two saves.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = minutes * 60
        self._saved = time.monotonic()
        self._asked: tuple[int, float] | None = None  # step and time of the last question
        self._next = 0  # step of the next one

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due before `step`; to be asked of every step, in every process."""
        if self._seconds <= 0 or step < self._next:
            return False
        now = time.monotonic()
        wait = 1
        if self._asked is not None and step > self._asked[0]:
            a_step = (now - self._asked[1]) / (step - self._asked[0])
            wait = max(1, min(1000, int(self._seconds / 10 / max(a_step, 1e-6))))
        self._asked = step, now
        due = now - self._saved >= self._seconds
        if jax.process_count() > 1:
            answer = multihost_utils.broadcast_one_to_all(np.array([due, wait], np.int32))
            due, self._next = bool(answer[0]), step + int(answer[1])
        return due

    def saved(self) -> None:
        """Begins anew."""
        self._saved = time.monotonic()
