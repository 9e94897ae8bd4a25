"""Checkpoints of a run: the training state and the data iterator, saved together in one step.

A run's directory holds `config.json` (the configuration it was started with), `checkpoints/<step>/` and `saved.json`
(the step of the last save, so that lost checkpoints are noticed). A step directory appears under its name only when it
is complete, and an older one is removed only after that; so a full disk, a crash or a kill while saving leaves the last
complete checkpoint loadable.

A checkpoint can be restored on another mesh, by another number of processes. Its files have checksums (checksums.py);
one that is damaged is moved to `damaged/<step>`, and the one before it is restored.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import re
import time
from typing import Any, Self

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from varedit_jax.errors import UserError
from varedit_jax.parallel.agreement import Answer, agreed, named, together
from varedit_jax.parallel.processes import say
from varedit_jax.storage import disk, files
from varedit_jax.storage.disk import explained, read_explained
from varedit_jax.storage.orbax import check_directory, checkpointer, quiet_orbax, support_object_stores
from varedit_jax.storage.paths import PathLike, child_names, children, resolve
from varedit_jax.training import checksums
from varedit_jax.training.metrics import read_metrics
from varedit_jax.training.state import TrainState
from varedit_jax.weights.run_directory import (
    CHECKPOINTS,
    CONFIG_FILE,
    DamagedCheckpoint,
    check_same,
    check_version,
    checkpoint_steps,
    damage_explained,
    placed,
    read_checkpoint,
    read_fields,
    stored_fields,
)

SAVED_FILE = "saved.json"
DAMAGED = "damaged"  # directory of checkpoints that were set aside
_POLL_SECONDS = 0.2

# Names in a directory of checkpoints; .nfs... comes with NFS.
_OURS = re.compile(r"\d+|\d+\.orbax-checkpoint-tmp.*|\..*")


class Checkpoints:
    """The checkpoints of one run. A context manager: leaving it finishes a save under way."""

    def __init__(self, workdir: PathLike, *, keep: int = 3, keep_every: int = 0) -> None:
        """Opens, and creates where needed, `workdir`/checkpoints.

        Keeps the newest `keep` checkpoints, and those of steps that are multiples of `keep_every` (0: no others).
        Raises UserError if that is not a directory, or holds something other than checkpoints.
        """
        if keep < 1:
            raise UserError(f"keep_checkpoints is {keep}; it must be at least 1")
        if keep_every < 0:
            raise UserError(f"keep_every is {keep_every}; it is a number of steps, or 0 for none")
        quiet_orbax()
        support_object_stores()
        self.directory = resolve(workdir) / CHECKPOINTS
        check_directory(self.directory)
        # Step of the save under way, and True if that step has been evaluated.
        self._saving: tuple[int, bool] | None = None
        self._summing: concurrent.futures.Future[None] | None = None  # its checksums
        self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checksums")
        files.make_directory(self.directory)
        foreign = [name for name in child_names(self.directory) if not _OURS.fullmatch(name)]
        if foreign:
            raise UserError(
                f"{self.directory / foreign[0]} is no checkpoint; use another --workdir, where no one else keeps files"
            )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(keep), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
                ),
                cleanup_tmp_directories=True,  # of processes that were killed
                enable_async_checkpointing=True,
            ),
        )

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, iterator: grain.DatasetIterator, *, evaluated: bool = True) -> None:
        """Saves `state` and the position of `iterator` as they are now; writing continues in the background.

        `evaluated` is False if the evaluation or samples of this step are still due. An error of the previous save
        surfaces here. Raises UserError if the disk is full.
        """
        self.wait()
        self._check_room(state)
        with explained(f"checkpoint of step {step}", self.directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_fields(state)), data=grain.checkpoint.CheckpointSave(iterator)
                ),
            )
        self._saving = step, evaluated
        self._summing = self._pool.submit(self._write_checksums, step)

    def _write_checksums(self, step: int) -> None:
        while self._manager.is_saving_in_progress():
            time.sleep(_POLL_SECONDS)
        if step in checkpoint_steps(self.directory.parent):  # else the save failed, as `wait` says
            checksums.write(self.directory / str(step))

    def restore(self, abstract_state: TrainState, iterator: grain.DatasetIterator) -> TrainState:
        """Returns the state of the newest intact checkpoint, and sets `iterator` to its next batch.

        Damaged ones before it are set aside, with a line about each. Files that had no checksums get them in the
        background.

        `abstract_state` is a tree of jax.ShapeDtypeStruct (as of jax.eval_shape); the state comes back with their
        shardings, or on one device where they have none. If it has an EMA of the parameters (`ema`) and the
        checkpoint does not, the EMA starts from the parameters; in the opposite case it is dropped. Raises UserError
        if there is no checkpoint, or it belongs to another model or a newer version, or all are damaged.
        """
        while True:
            newest = self.directory / str(self.latest())
            if damage := checksums.find_damage(newest):
                self._set_aside(f"{newest} is damaged: {damage}")
                continue
            try:
                unlisted = checksums.unlisted(newest)
                state = self._restore(abstract_state, iterator)
            except DamagedCheckpoint as error:
                if jax.process_count() > 1:  # the others do not know of it, and read on
                    raise
                self._set_aside(str(error))
                continue
            if unlisted:
                say(f"{newest} had no checksums of {len(unlisted)} files, {unlisted[0]} first; they get them now")
                self._summing = self._pool.submit(checksums.write_unlisted, newest, unlisted)
            return state

    def _restore(self, abstract_state: TrainState, iterator: grain.DatasetIterator) -> TrainState:
        step = self.latest()
        if step is None:
            raise UserError(f"there is no checkpoint in {self.directory}")
        if step not in checkpoint_steps(self.directory.parent):
            raise UserError(
                f"{self.directory / str(step)} is no checkpoint of a run: it holds "
                f"{files.listing(self.directory / str(step))} "
                f"instead of state and data; use another --workdir"
            )
        state = restore_state(self.directory.parent, abstract_state, step)
        place = data_place(self.directory.parent, step)
        with damage_explained(self.directory, step):
            iterator.set_state(place)
            iterator.start_prefetch()
        return state

    def _set_aside(self, reason: str) -> None:
        """Moves the newest checkpoint, which is damaged, out of the way. Raises UserError if there is no other."""
        steps = agreed_steps(self.directory.parent)
        if len(steps) < 2:
            raise UserError(
                f"{reason}; there is no checkpoint before it: bring back its files, or start a new run with another "
                f"--workdir"
            )
        target = self.directory.parent / DAMAGED / str(steps[-1])
        with together(), explained("damaged checkpoint's new place", self.directory.parent):
            if jax.process_index() == 0:
                while target.exists():
                    target = target.with_name(f"{target.name}_")
                files.make_directory(target.parent)
                files.move_directory(self.directory / str(steps[-1]), target)
        say(f"{reason}; it is kept in {target.parent}, and the run goes back to the checkpoint of step {steps[-2]}")
        agreed_steps(self.directory.parent)
        self._manager.reload()

    def wait(self) -> None:
        """Returns when the last save is complete, with its checksums. Raises UserError if the disk was full."""
        with explained("checkpoint", self.directory):
            self._manager.wait_until_finished()
            if self._summing is not None:
                summing, self._summing = self._summing, None
                summing.result()
            if self._saving is not None:
                self._note(*self._saving)
        self._saving = None

    def evaluated(self) -> bool:
        """Returns True if evaluation and samples of the newest checkpoint's step have been made."""
        saved = _saved(self.directory.parent)
        return saved.get("evaluated", saved.get("looked")) is not False  # earlier versions wrote `looked`

    def mark_evaluated(self) -> None:
        """Records that the evaluation and samples of the newest checkpoint's step are done."""
        self._note(self.latest(), True)

    def _note(self, step: int | None, evaluated: bool) -> None:
        if jax.process_index() == 0:
            files.write_json(self.directory.parent / SAVED_FILE, {"step": step, "evaluated": evaluated})

    def _check_room(self, state: TrainState) -> None:
        """Raises UserError if the disk has no room for a checkpoint."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(_fields(state)))
        step = self.latest()
        resuming = "" if step is None else f"; it resumes from step {step}"
        disk.check_room(self.directory, needed, "a checkpoint", resuming)

    def __enter__(self) -> Self:
        """Returns self."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        """Finishes a save under way; an error that ends the block takes precedence over one of the save."""
        try:
            self.wait()
        except UserError:
            if kind is None:
                raise
        finally:
            self._pool.shutdown()
            self._manager.close()


def agreed_steps(workdir: PathLike) -> list[int]:
    """Returns the steps of the run's complete checkpoints, ascending, as all processes see them.

    Raises UserError, in all processes, if they still see different ones after a while.
    """

    def explain(answers: list[Answer]) -> str:
        other = next(answer for answer in answers if answer.value != answers[0].value)
        return (
            f"the checkpoints in {resolve(workdir) / CHECKPOINTS} are not the same for all hosts: {named(answers)} "
            f"sees steps {other.value}, process 0 on {answers[0].host} {answers[0].value}; see that the file system "
            f"shows all hosts the same, then run the same command again"
        )

    return list(json.loads(agreed(lambda: json.dumps(checkpoint_steps(workdir)), explain)))


def restore_state(directory: PathLike, abstract_state: TrainState, step: int) -> TrainState:
    """Returns the state of the checkpoint of `step`, like `Checkpoints.restore` and with the same errors."""
    quiet_orbax()
    checkpoints = resolve(directory) / CHECKPOINTS
    check_version(checkpoints.parent)
    wanted = _fields(abstract_state)
    starts_ema = "ema" in wanted and not stored_fields(checkpoints, step).get("ema")
    if starts_ema:
        del wanted["ema"]
    check_same(checkpoints, step, wanted)
    restored = read_checkpoint(checkpoints, step, wanted)
    if starts_ema:
        places = jax.tree.map(lambda leaf: placed(leaf).sharding, abstract_state.ema)
        # Copies, because the state is donated to each step, and no array can be donated twice.
        types = jax.tree.map(lambda leaf: leaf.dtype, abstract_state.ema)
        copy = jax.jit(
            lambda tree: jax.tree.map(lambda x, dtype: jnp.copy(x).astype(dtype), tree, types), out_shardings=places
        )
        restored["ema"] = copy(restored["params"])
    return dataclasses.replace(abstract_state, **restored)


def data_place(directory: PathLike, step: int) -> dict[str, Any]:
    """Returns the state of the data iterator in a run's checkpoint: what this process saved, or what all did.

    Raises UserError if it is damaged, or was saved by another number of processes at different positions.
    """
    checkpoints = resolve(directory) / CHECKPOINTS
    with damage_explained(checkpoints, step):
        saved = {
            path.name: path.read_text() for path in children(checkpoints / str(step) / "data", "process_*-of-*.json")
        }
        if not saved:
            raise ValueError("it does not say which batch comes next")
        own = f"process_{jax.process_index()}-of-{jax.process_count()}.json"
        if own not in saved and len(set(saved.values())) > 1:
            raise UserError(
                f"{checkpoints / str(step)} was saved by {len(saved)} processes, each at its own place in the data; "
                f"there are {jax.process_count()} now: resume with as many"
            )
        return json.loads(saved.get(own, next(iter(saved.values()))))


def save_tree(directory: pathlib.Path, state: TrainState) -> None:
    """Writes a state to a directory of its own, for `read_tree`. Returns when it is complete."""
    with explained("state", directory.parent), checkpointer(ocp.StandardCheckpointHandler()) as saver:
        saver.save(directory, args=ocp.args.StandardSave(_fields(state)), force=True)


def read_tree(directory: pathlib.Path, abstract_state: TrainState) -> TrainState:
    """Reads what `save_tree` wrote. Raises UserError if it is damaged."""
    with damage_explained(directory.parent, directory.name):
        return dataclasses.replace(abstract_state, **read_fields(directory, _fields(abstract_state)))


def check_resume(workdir: PathLike, resume: bool | None) -> None:
    """Raises UserError where resuming, or starting a new run, cannot be intended.

    Args:
      workdir: directory of a run, or of one to be.
      resume: True: there must be a checkpoint; False: there must be none; None: if there is none, the run must never
        have had one, or it would silently start from scratch.

    Raises:
      UserError: says what to do instead.
    """
    root = resolve(workdir)
    steps = checkpoint_steps(root)
    if resume is False and steps:
        raise UserError(
            f"{workdir} has a checkpoint of step {steps[-1]}, but --resume=no starts a new run; use another "
            f"--workdir, or --resume=auto to resume this one"
        )
    if steps or resume is False:
        return
    if resume:
        raise UserError(
            f"there is no checkpoint in {workdir} to resume from, and --resume=yes starts no new run; give the "
            f"directory of the run as --workdir, or --resume=auto"
        )
    made = None
    if (root / SAVED_FILE).exists():
        made = f"a checkpoint of step {_saved(root).get('step', 'an unknown number')} was saved"
    elif (root / CONFIG_FILE).exists() and not (root / CHECKPOINTS).exists():
        lines = [line["step"] + 1 for line in read_metrics(root) if "loss" in line]
        made = f"{max(lines)} steps were made" if lines else None
    if made:
        raise UserError(
            f"{workdir} has lost its checkpoints: {made}, but there is none in {root / CHECKPOINTS}; bring them back, "
            f"use another --workdir, or start from nothing with --resume=no"
        )


def _saved(root: pathlib.Path) -> dict[str, Any]:
    """Returns the content of saved.json; {} if there is none, or it is broken."""
    with read_explained(SAVED_FILE), contextlib.suppress(FileNotFoundError, ValueError, TypeError):
        return dict(json.loads((root / SAVED_FILE).read_text()))
    return {}


def _fields(state: TrainState) -> dict[str, Any]:
    """Returns the fields of a state that are not None, by name: those that are saved."""
    return {name: value for name, value in vars(state).items() if value is not None}
