"""The training loop of editors and tokenizers: `Trainer`, whose methods are the events of a step in order."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils

from varedit_jax.config import Cadence, GuardConfig
from varedit_jax.errors import UserError
from varedit_jax.parallel.agreement import together
from varedit_jax.parallel.processes import check_same, say
from varedit_jax.storage.lock import Lock
from varedit_jax.storage.orbax import check_directory
from varedit_jax.storage.paths import PathLike, resolve
from varedit_jax.training import checkpoint, run_config
from varedit_jax.training.goodput import Goodput, Stopwatch
from varedit_jax.training.guard import Guard, was_skipped
from varedit_jax.training.metrics import MetricsWriter, StepReport, Work, read_metrics
from varedit_jax.training.profile import Profiler
from varedit_jax.training.replay import Inputs
from varedit_jax.training.stages import SingleStage, Stages
from varedit_jax.training.state import TrainState
from varedit_jax.training.stop import Stopped, StopSignal, poll
from varedit_jax.training.verify import Corrupted, Examples, Repeated, Verifier
from varedit_jax.training.watchdog import FIRST_BATCH, Watchdog
from varedit_jax.types import Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A training run: pure functions and data, the same in all its processes."""

    steps: int  # updates of the whole run, not of one process
    key: jax.Array  # a PRNG key, the same in every process
    abstract_state: TrainState  # shapes, types and shardings of the state: jax.eval_shape of `init_state`
    init_state: Callable[[], TrainState]  # makes the state of step 0; called only for a new run
    # Compiled steps (state, batch, key) -> (state, metrics), free to donate the state. Metrics are scalars or vectors
    # [K], the same in all processes; the guard reads `loss`, `gradient_norm` and `skipped`.
    stages: Stages | SingleStage
    batches: grain.DatasetIterator  # endless, of dicts of numpy arrays with the examples of this process, [B, ...]
    put: Callable[[dict[str, np.ndarray]], Any]  # places a batch on the devices, explicitly, as arrays of all processes
    record: Mapping[str, Any]  # the configuration of the run as a dict, for config.json
    cadence: Cadence
    guard: GuardConfig = GuardConfig()
    examples: Examples | None = None  # of a batch, for `guard.verify_every`
    evaluate: Callable[[TrainState], Metrics] | None = None  # metrics on held-out data: eval/NAME
    sample: Callable[[TrainState, int], Mapping[str, np.ndarray]] | None = None  # uint8 [y, x, 3] by name
    learning_rate: Callable[[int], float] | None = None  # of a step, for the log
    work: Work | Callable[[int, Any], Work] | None = None  # cost of an example, by (step, batch) where it differs
    data_metrics: Callable[[], Mapping[str, float]] = dict  # counts of the data pipeline, logged as they are
    data_digest: Callable[[], str] = str  # of data and plan, which have to be the same in all processes
    ids_field: str = ""  # field of a batch with the numbers of its examples, int [B]: for messages, not for `put`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """Settings of a single process, from its flags."""

    workdir: PathLike  # directory of the run, which all processes see
    stop_after: int | None = None  # steps of this process after which it saves and ends
    resume: bool | None = None  # True: only resume; False: only start a new run; None: resume if possible
    profile_steps: tuple[int, int] = (0, 0)  # steps [first, last) that are traced into `workdir`/profile
    dump_step: int | None = None  # a step whose state and batch are written to `workdir`/replay


class Trainer:
    """Trains up to `job.steps` updates, resuming from the newest checkpoint in the work directory if there is one.

    Step n, counted from 0, is the update that turns a state of `step` n into one of n + 1. Its order:

      1. with the state before the update: `evaluate_and_sample`, `save` (state and iterator in one call), where
         due; all before the data iterator moves, so that a checkpoint names the next batch
      2. `next_batch` takes the next batch and puts it on the devices
      3. `update` dispatches the step, with the key fold_in(key, n); no implicit transfer may happen in it
      4. it also fetches and logs the metrics of step n - 1, while step n runs

    Nothing is evaluated or sampled at step 0 unless `cadence.evaluate_first` says so.
    After the last step: evaluate, sample and save once more. What is due depends on n alone (`save_minutes` aside,
    which affects saving only), so a run that was stopped and resumed equals an uninterrupted one, bit for bit. A run
    that resumes at step n repeats an evaluation of step n, because the metrics that an earlier process logged for n
    and later are dropped.

    SIGTERM and SIGINT, at any time, end the step, save, and exit with 128 + the signal's number. An evaluation or a
    sample that calls `stop.poll` is interrupted, and repeated when the run resumes. A compilation cannot be
    interrupted, and a cluster may kill the process before it ends (a preempted TPU after about 10 s): so a checkpoint
    is saved before a later stage is compiled. A kill without a signal loses the steps since the last checkpoint. A
    second signal does not wait for the step.

    The batch of a step that was skipped because it was not finite is written to `workdir`/replay (replay.py).
    """

    def __init__(self, job: Job, launch: Launch, watchdog: Watchdog | None = None) -> None:
        """Reads and writes nothing before `run`.

        `watchdog` is one that has watched since before the job was set up; without it, `run` starts one.
        """
        self.job, self.launch = job, launch
        self._given_watchdog = watchdog
        self.state: TrainState
        self.step = 0  # number of the next update
        self._clock = Stopwatch()
        self._stage: int | None = None  # of the last step
        self._compiled: set[Any] = set()  # shapes of batches that the stage is compiled for

    def run(self) -> TrainState:
        """Returns the state after `job.steps` updates, or after `launch.stop_after` of this process.

        Raises:
          UserError: the work directory holds another run, is in use, or lost its checkpoints; the disk is full; the
            data ends; too many steps in a row are not finite (none of them is saved).
          SystemExit: after a signal, when all is saved; code 75 when the watchdog ends a run that hangs.
        """
        job = self.job
        with contextlib.ExitStack() as stack:
            self._open(stack)
            self.restore()
            if self.step >= job.steps and self._checkpoints.evaluated():
                say(f"the run in {self.launch.workdir} is finished: it has made {self.step} of {job.steps} steps")
                return self.state
            self._open_log(stack)
            stop_after = self.launch.stop_after
            last = job.steps if stop_after is None else min(job.steps, self.step + stop_after)
            while self.step < last and not self._stop.requested() and self.evaluate_and_sample():
                self.save_where_due()
                self.update(self.next_batch())
            self.finish()
        return self.state

    def _open(self, stack: contextlib.ExitStack) -> None:
        """Locks and checks the work directory, and starts watching for signals and hangs."""
        job, workdir = self.job, resolve(self.launch.workdir)
        self._watchdog = self._given_watchdog or stack.enter_context(Watchdog(job.guard, workdir))
        check_directory(workdir)
        with together():
            stack.enter_context(Lock(workdir, held=jax.process_index() == 0))
        run_config.check_alike(job.record)
        run_config.identify(workdir)
        checkpoint.agreed_steps(workdir)
        with together():
            run_config.check_config(workdir, job.record)
            checkpoint.check_resume(workdir, self.launch.resume)
        self._stop = stack.enter_context(StopSignal(self._watchdog.beat))
        self._checkpoints = stack.enter_context(
            checkpoint.Checkpoints(workdir, keep=job.cadence.keep_checkpoints, keep_every=job.cadence.keep_every)
        )

    def restore(self) -> None:
        """Restores state and iterator from the newest checkpoint, or makes the state of step 0."""
        if self._checkpoints.latest() is not None:
            with self._phase("restore"):
                self.state = self._checkpoints.restore(self.job.abstract_state, self.job.batches)
        else:
            self.state = self.job.init_state()
        check_same("data, bad.jsonl or left_out.json", self.job.data_digest())
        self.first_step = self.step = int(jax.device_get(self.state.step))
        self._key = jax.device_put(self.job.key, self.state.step.sharding)

    def _open_log(self, stack: contextlib.ExitStack) -> None:
        """Opens everything that is written while training; the guard recalls what earlier processes logged."""
        job, workdir, step = self.job, self.launch.workdir, self.step
        logged = read_metrics(workdir)
        self._writer = stack.enter_context(contextlib.closing(MetricsWriter(workdir, first_step=step, steps=job.steps)))
        goodput = stack.enter_context(contextlib.closing(Goodput(workdir, self._clock, step)))
        if jax.process_index() == 0:
            run_config.write_config(workdir, job.record)
        if self._checkpoints.latest() is not None:
            self._writer.say(f"resuming from the checkpoint of step {step} in {workdir}")
        elif logged:
            self._writer.say(f"a run in {workdir} ended before it saved a checkpoint; it starts from nothing again")
        self._inputs = Inputs(workdir)
        self._verifier = Verifier(job.examples)
        self._guard = Guard(job.guard, self._writer.say)
        self._guard.recall(line for line in logged if line["step"] < step)
        self._report = StepReport(
            self._writer,
            self._clock,
            job.cadence.log_every,
            job.steps,
            job.learning_rate,
            check=self._check,
            goodput=goodput,
        )
        self._profiler = Profiler(workdir, *self.launch.profile_steps)
        stack.callback(self._profiler.close)
        self._timer = SaveTimer(job.cadence.save_minutes)

    def evaluate_and_sample(self) -> bool:
        """Evaluates and samples, where due. Returns False if interrupted because the run is to stop."""
        job, step = self.job, self.step
        if step == 0 and not job.cadence.evaluate_first:
            return True
        try:
            if job.evaluate is not None and _due(step, job.cadence.eval_every, job.steps):
                self._report.finish()
                with self._phase("evaluate"):
                    self._writer.scalars(step, job.evaluate(self.state))
                poll()
            if job.sample is not None and _due(step, job.cadence.sample_every, job.steps):
                self._report.finish()
                with self._phase("sample"):
                    self._writer.images(step, job.sample(self.state, step))
                poll()
        except Stopped:
            return False
        return True

    def save_where_due(self) -> None:
        """Saves if due by steps, by time or before a later stage's compilation, unless this step was just restored."""
        every = self.job.cadence.save_every
        stage, before = self.job.stages.stage(self.step), self._stage
        if stage != before:
            self._stage, self._compiled = stage, set()
        later_stage = before not in (None, stage) and every > 0
        if self.step > self.first_step and (
            _due(self.step, every, self.job.steps) or later_stage or self._timer.due(self.step)
        ):
            self.save()

    def save(self, evaluated: bool = True) -> None:
        """Saves state and iterator; `evaluated` is False if this step's evaluation or sample is still due."""
        self._report.finish()  # so that a run that is not finite ends before it is saved
        with self._phase("save"):
            self._writer.flush()
            self._checkpoints.save(self.step, self.state, self.job.batches, evaluated=evaluated)
        self._timer.saved()

    def next_batch(self) -> tuple[Any, np.ndarray | None]:
        """Returns the next batch on the devices, and the numbers of its examples."""
        job = self.job
        with self._phase("data"):
            if self._stage is None or not self._compiled:
                self._watchdog.beat(FIRST_BATCH)
            batch = next(job.batches, None)
            if batch is None:
                raise UserError(
                    f"the data ended after {self.step} of {job.steps} steps; training needs an endless iterator"
                )
            self._inputs.keep(self.step, batch)
            ids = batch.get(job.ids_field)
            return job.put({name: value for name, value in batch.items() if name != job.ids_field}), ids

    def update(self, placed: tuple[Any, np.ndarray | None]) -> None:
        """Dispatches the step of a batch from `next_batch`, and logs the previous step while this one runs."""
        (batch, ids), job, step = placed, self.job, self.step
        shapes = tuple(sorted((name, value.shape) for name, value in batch.items()))
        if step == self.launch.dump_step:
            self._inputs.dump(step, "requested", self.state)
        self._profiler.step(step, self.state)
        run, repeated = job.stages.step(step), self._repeat(batch)
        with self._phase("step" if shapes in self._compiled else "compile"), jax.transfer_guard("disallow"):
            self.state, metrics = run(self.state, batch, jax.random.fold_in(self._key, self.state.step))
        self._compiled.add(shapes)
        if repeated is not None:
            with self._verifying():
                repeated.compare(self.state, metrics)
        self._watchdog.beat("step")
        work = job.work(step, batch) if callable(job.work) else job.work
        self._report.later(step, metrics, len(jax.tree.leaves(batch)[0]), ids, work)
        self.step += 1

    def _repeat(self, batch: Any) -> Repeated | None:
        """Makes the step on a copy of the state where it is due to be verified."""
        step, every = self.step, self.job.guard.verify_every
        if step == 0 or not _due(step, every, 0):
            return None
        self._report.finish()
        with self._verifying():
            key = jax.random.fold_in(self._key, self.state.step)
            return self._verifier.begin(step, self.job.stages.step(step), self.state, batch, key)

    @contextlib.contextmanager
    def _verifying(self) -> Iterator[None]:
        """Dumps the inputs of the step if the block finds it to be corrupted; the run ends, and is not saved."""
        try:
            with self._phase("verify"):
                yield
        except Corrupted as error:
            try:
                self._inputs.dump(self.step, "corrupted", error.state)
            except UserError as failure:  # what was found matters more
                self._writer.say(str(failure))
            raise

    def finish(self) -> None:
        """Evaluates, samples and saves after the last step, and reports where the run ended."""
        self._report.finish()
        step, steps = self.step, self.job.steps
        evaluated = step < steps or self.evaluate_and_sample()
        if step > self.first_step:
            self.save(evaluated)
            self._checkpoints.wait()
        elif step == steps and evaluated:
            self._checkpoints.mark_evaluated()
        signal = self._stop.signal
        if signal is not None or step < steps:
            by = "" if signal is None else f" by {signal.name}"
            saved = ", which is saved" if step else ""
            self._writer.say(f"stopped{by} at step {step} of {steps}{saved}; run the same command again to resume")
        if signal is not None:
            raise SystemExit(128 + signal)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Times the block as a phase, and tells the watchdog."""
        self._watchdog.beat(name)
        with self._clock.time(name):
            yield
        self._watchdog.beat()

    def _check(self, step: int, metrics: Metrics, ids: np.ndarray | None) -> dict[str, float]:
        """Dumps the inputs of a bad step, and returns the metrics of the guard and of the data pipeline."""
        if was_skipped(metrics):
            self._inputs.dump(step, "not finite")
        return {**self._guard.check(step, metrics, ids), **self.job.data_metrics()}


def _due(step: int, every: int, steps: int) -> bool:
    """Returns True if an event of every `every` steps is due at `step`; at the end every event is."""
    return every > 0 and (step % every == 0 or step == steps)


class SaveTimer:
    """Decides when a checkpoint is due by time, by the clock of process 0.

    That takes a broadcast, which waits for the running step. So process 0 also broadcasts how many steps to wait until
    the next check: about a tenth of the time between two saves.
    """

    def __init__(self, minutes: float) -> None:
        """Starts the timer; never due if `minutes` is 0."""
        self._seconds = minutes * 60
        self._saved = time.monotonic()
        self._checked: tuple[int, float] | None = None  # step and time of the last check
        self._next = 0  # step of the next one

    def due(self, step: int) -> bool:
        """Returns True if a checkpoint is due before `step`; call it for every step, in every process."""
        if self._seconds <= 0 or step < self._next:
            return False
        now = time.monotonic()
        wait = 1
        if self._checked is not None and step > self._checked[0]:
            per_step = (now - self._checked[1]) / (step - self._checked[0])
            wait = max(1, min(1000, int(self._seconds / 10 / max(per_step, 1e-6))))
        self._checked = step, now
        due = now - self._saved >= self._seconds
        if jax.process_count() > 1:
            answer = multihost_utils.broadcast_one_to_all(np.array([due, wait], np.int32))
            due, self._next = bool(answer[0]), step + int(answer[1])
        return due

    def saved(self) -> None:
        """Restarts the timer."""
        self._saved = time.monotonic()
