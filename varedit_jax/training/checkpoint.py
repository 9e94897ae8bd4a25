"""Checkpoints of a run: the training state and the data iterator, saved together in one step.

A run's folder holds `config.json` (the configuration it was started with), `checkpoints/<step>/` and `saved.json` (the
step of the last save, so that lost checkpoints are noticed). A step folder appears under its name only when it is
complete, and an older one goes only after that; so a full disk, a crash or a kill while saving leaves the last complete
checkpoint loadable.

What was saved on one mesh by so many processes can be restored on another by another number of them.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import re
import shutil
import types
from collections.abc import Iterator, Mapping
from typing import Any, Self

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from varedit_jax.errors import UserError
from varedit_jax.training.ledger import read_metrics
from varedit_jax.training.record import (
    CONFIG_FILE,
    check_config,
    make_folder,
    read_config,
    room_explained,
    write_config,
    write_json,
)
from varedit_jax.training.state import TrainState

__all__ = [
    "CHECKPOINTS",
    "CONFIG_FILE",
    "Checkpoints",
    "check_config",
    "check_resume",
    "checkpoint_steps",
    "data_place",
    "quiet_orbax",
    "read_config",
    "read_tree",
    "restore_params",
    "restore_state",
    "save_tree",
    "size_text",
    "write_config",
]

CHECKPOINTS = "checkpoints"
SAVED_FILE = "saved.json"

_OURS = re.compile(r"\d+|\d+\.orbax-checkpoint-tmp.*|\..*")  # names in a folder of checkpoints; .nfs... comes with NFS


class Checkpoints:
    """The checkpoints of one run. A context manager: leaving it finishes a save under way."""

    def __init__(self, workdir: str | os.PathLike[str], *, keep: int = 3, keep_every: int = 0) -> None:
        """Opens, and creates where needed, `workdir`/checkpoints.

        Of the checkpoints there, the newest `keep` stay, and those of steps that are multiples of `keep_every` (0: no
        others). Raises UserError if that is not a folder, or holds something other than checkpoints.
        """
        if keep < 1:
            raise UserError(f"keep_checkpoints is {keep}; it must be at least 1")
        if keep_every < 0:
            raise UserError(f"keep_every is {keep_every}; it is a number of steps, or 0 for none")
        quiet_orbax()
        self.folder = pathlib.Path(workdir).absolute() / CHECKPOINTS
        # The save that was begun last, until it is known to be complete: its step, and whether that was looked at.
        self._saving: tuple[int, bool] | None = None
        make_folder(self.folder)
        foreign = [path for path in sorted(self.folder.iterdir()) if not _OURS.fullmatch(path.name)]
        if foreign:
            raise UserError(f"{foreign[0]} is no checkpoint; use another --workdir, where no one else keeps files")
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(keep), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
                ),
                cleanup_tmp_directories=True,  # of processes that were killed
                enable_async_checkpointing=True,
            ),
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, iterator: grain.DatasetIterator, *, looked: bool = True) -> None:
        """Saves `state` and the position of `iterator` as they are now; the writing goes on in the background.

        `looked` is False where evaluation or pictures of this very step are still to be made. An error of the previous
        save surfaces here. Raises UserError if the disk is full.
        """
        self.wait()
        self._check_room(state)
        with room_explained(f"checkpoint of step {step}", self.folder):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_fields(state)),
                    data=grain.checkpoint.CheckpointSave(iterator),
                ),
            )
        self._saving = step, looked

    def restore(self, abstract_state: TrainState, iterator: grain.DatasetIterator) -> TrainState:
        """The newest checkpoint: returns its state and sets `iterator` to the batch that comes next.

        `abstract_state` is a tree of jax.ShapeDtypeStruct (as of jax.eval_shape); the state comes back with their
        shardings, or on one device where they have none. If it has an average of the parameters (`ema`) and the
        checkpoint does not, the average starts from the parameters; the other way round it is dropped. Raises UserError
        if there is no checkpoint, if it belongs to another model or to a newer version, or if it is damaged.
        """
        step = self.latest()
        if step is None:
            raise UserError(f"there is no checkpoint in {self.folder}")
        if step not in checkpoint_steps(self.folder.parent):
            raise UserError(
                f"{self.folder / str(step)} is no checkpoint of a run: it holds {_listing(self.folder / str(step))} "
                f"instead of state and data; use another --workdir"
            )
        state = restore_state(self.folder.parent, abstract_state, step)
        place = data_place(self.folder.parent, step)
        with _damage_explained(self.folder, step):
            iterator.set_state(place)
            iterator.start_prefetch()
        return state

    def wait(self) -> None:
        """Returns when the last save is complete. Raises UserError if the disk was full."""
        with room_explained("checkpoint", self.folder):
            self._manager.wait_until_finished()
            if self._saving is not None:
                self._note(*self._saving)
        self._saving = None

    def looked(self) -> bool:
        """Whether nothing is left to be done at the step of the newest checkpoint but the next step."""
        return _saved(self.folder.parent).get("looked") is not False

    def mark_looked(self) -> None:
        """Notes that nothing is left there."""
        self._note(self.latest(), True)

    def _note(self, step: int | None, looked: bool) -> None:
        if jax.process_index() == 0:
            write_json(self.folder.parent / SAVED_FILE, {"step": step, "looked": looked})

    def _check_room(self, state: TrainState) -> None:
        """Refuses to start a save that the disk has no room for."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(_fields(state)))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"a checkpoint takes up to {size_text(needed)}, but only {size_text(free)} are free in {self.folder}; "
                f"make room and run the same command again{_going_on(self.latest())}"
            )

    def __enter__(self) -> Self:
        """Self."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        """Finishes a save under way; does not hide the error that ends the block behind another."""
        try:
            self.wait()
        except UserError:
            if error is None:
                raise
        finally:
            self._manager.close()


def restore_state(folder: str | os.PathLike[str], abstract_state: TrainState, step: int) -> TrainState:
    """The state alone of the checkpoint of `step` of a run: as `Checkpoints.restore`, with the same errors."""
    quiet_orbax()
    checkpoints = pathlib.Path(folder).absolute() / CHECKPOINTS
    _check_version(checkpoints.parent)
    wanted = _fields(abstract_state)
    starts_ema = "ema" in wanted and not _stored(checkpoints, step).get("ema")
    if starts_ema:
        del wanted["ema"]
    _check_same(checkpoints, step, wanted)
    restored = _read(checkpoints, step, wanted)
    if starts_ema:
        places = jax.tree.map(lambda leaf: _placed(leaf).sharding, abstract_state.ema)
        # Copies: the state is donated to each step, and no array can be given away twice.
        types = jax.tree.map(lambda leaf: leaf.dtype, abstract_state.ema)
        copy = jax.jit(
            lambda tree: jax.tree.map(lambda x, dtype: jnp.copy(x).astype(dtype), tree, types), out_shardings=places
        )
        restored["ema"] = copy(restored["params"])
    return dataclasses.replace(abstract_state, **restored)


def restore_params(
    folder: str | os.PathLike[str], abstract_params: Any, step: int | None = None, *, ema: bool = False
) -> Any:
    """The parameters alone of a run's checkpoint; nothing of the optimizer is read.

    Args:
      folder: folder of a run (the one with config.json and checkpoints/).
      abstract_params: tree of jax.ShapeDtypeStruct; shardings as in `Checkpoints.restore`.
      step: which checkpoint; None is the newest.
      ema: their running average instead of the parameters themselves.

    Raises:
      UserError: no such folder, no checkpoint in it, no such step, another model's parameters, no average, a newer
        version's checkpoint, or damaged files.
    """
    quiet_orbax()
    root = pathlib.Path(folder).absolute()
    if not root.is_dir():
        raise UserError(f"there is no folder {folder}")
    steps = checkpoint_steps(root)
    if not steps:
        raise UserError(
            f"{folder} is not the folder of a run with a checkpoint: it has no {CHECKPOINTS}/<step>/; "
            f"it holds {_listing(root)}"
        )
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    _check_version(root)
    checkpoints = root / CHECKPOINTS
    field = "ema" if ema else "params"
    if ema and not _stored(checkpoints, step).get(field):
        raise UserError(
            f"{checkpoints / str(step)} has no average of the parameters, for the run kept none "
            f"(optimizer.ema_decay); take the parameters themselves"
        )
    _check_same(checkpoints, step, {field: abstract_params})
    return _read(checkpoints, step, {field: abstract_params})[field]


def data_place(folder: str | os.PathLike[str], step: int) -> dict[str, Any]:
    """The state of the data iterator in a run's checkpoint: what this process saved, or what all did.

    Raises UserError if it is damaged, or was saved by another number of processes, and not all at the same place.
    """
    checkpoints = pathlib.Path(folder).absolute() / CHECKPOINTS
    with _damage_explained(checkpoints, step):
        files = {path.name: path.read_text() for path in (checkpoints / str(step) / "data").glob("process_*-of-*.json")}
        if not files:
            raise ValueError("it does not say which batch comes next")
        own = f"process_{jax.process_index()}-of-{jax.process_count()}.json"
        if own not in files and len(set(files.values())) > 1:
            raise UserError(
                f"{checkpoints / str(step)} was saved by {len(files)} processes, each at its own place in the data; "
                f"there are {jax.process_count()} now: go on with as many"
            )
        return json.loads(files.get(own, next(iter(files.values()))))


def save_tree(folder: pathlib.Path, state: TrainState) -> None:
    """Writes a state alone to a folder of its own, as `read_tree` reads it. Returns when it is complete."""
    quiet_orbax()
    with room_explained("state", folder.parent), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.StandardSave(_fields(state)), force=True)


def read_tree(folder: pathlib.Path, abstract_state: TrainState) -> TrainState:
    """Reads what `save_tree` wrote. Raises UserError if it is damaged."""
    quiet_orbax()
    with _damage_explained(folder.parent, folder.name):
        return dataclasses.replace(abstract_state, **_read_fields(folder.absolute(), _fields(abstract_state)))


def checkpoint_steps(folder: str | os.PathLike[str]) -> list[int]:
    """Steps of the complete checkpoints of the run in `folder`, ascending; empty if there are none."""
    found = pathlib.Path(folder).glob(f"{CHECKPOINTS}/*/state/_METADATA")
    return sorted(int(path.parts[-3]) for path in found if path.parts[-3].isdecimal())


def check_resume(workdir: str | os.PathLike[str], resume: bool | None) -> None:
    """Refuses to go on, or to start anew, where that cannot be what is wanted.

    Args:
      workdir: folder of a run, or of one to be.
      resume: True: there has to be a checkpoint; False: there must be none; None: if there is none, the run must not
        have had one, for then it would silently start from nothing.

    Raises:
      UserError: says what to do instead.
    """
    root = pathlib.Path(workdir)
    steps = checkpoint_steps(root)
    if resume is False and steps:
        raise UserError(
            f"{workdir} has a checkpoint of step {steps[-1]}, but --resume=no starts a new run; use another "
            f"--workdir, or --resume=auto to go on with this one"
        )
    if steps or resume is False:
        return
    if resume:
        raise UserError(
            f"there is no checkpoint in {workdir} to go on from, and --resume=yes starts no new run; give the "
            f"folder of the run as --workdir, or --resume=auto"
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
    """What saved.json says; nothing, if it cannot be read."""
    try:
        return dict(json.loads((root / SAVED_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """An abstract array that says where it goes: where it says nothing, to the first device of this process."""
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each array, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(leaf.shape), np.dtype(leaf.dtype))
        for path, leaf in leaves
    }


def _fields(state: TrainState) -> dict[str, Any]:
    """The fields of a state that there are, by name: what is saved."""
    return {name: value for name, value in vars(state).items() if value is not None}


def _check_version(root: pathlib.Path) -> None:
    """Raises UserError if the run was written by a newer version."""
    if (root / CONFIG_FILE).exists():
        read_config(root)


def _stored(checkpoints: pathlib.Path, step: int) -> dict[str, Any]:
    """What a checkpoint holds: trees of what is known of each array, by field of TrainState."""
    with _damage_explained(checkpoints, step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        metadata = checkpointer.metadata(checkpoints / str(step) / "state").item_metadata
        if metadata is None:
            raise ValueError("it does not say what it holds")
        return dict(metadata.tree)


def _check_same(checkpoints: pathlib.Path, step: int, wanted_fields: Mapping[str, Any]) -> None:
    """Raises UserError naming the first array that differs between a checkpoint and these fields of a TrainState."""
    found = _stored(checkpoints, step)
    stored: dict[str, Any] = {}
    wanted: dict[str, Any] = {}
    # The parameters first: what differs there differs in their moments, too.
    for field in sorted(wanted_fields, key=lambda name: name != "params"):
        stored |= _shapes({field: found.get(field)})
        wanted |= _shapes({field: wanted_fields[field]})
    for path in dict.fromkeys([*wanted, *stored]):
        if stored.get(path) != wanted.get(path):
            field, _, name = path.partition("/")
            what = f"parameter {name}" if field == "params" else f"array {path}"
            raise UserError(
                f"{checkpoints / str(step)} is a checkpoint of another model: {what} is "
                f"{_shape_text(stored.get(path))} there and {_shape_text(wanted.get(path))} in this model"
            )


def _read(checkpoints: pathlib.Path, step: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """These fields (abstract trees) of a checkpoint's state, and nothing else of it."""
    with _damage_explained(checkpoints, step):
        return _read_fields(checkpoints / str(step) / "state", fields)


def _read_fields(folder: pathlib.Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    item = jax.tree.map(_placed, dict(fields))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(
            folder,
            args=ocp.args.PyTreeRestore(
                item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
            ),
        )
    return dict(restored)


def _shape_text(found: tuple[tuple[int, ...], np.dtype] | None) -> str:
    return "absent" if found is None else f"{found[1]}{list(found[0])}"


def size_text(count: float) -> str:
    """Bytes as text, in MB or GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _listing(folder: pathlib.Path) -> str:
    """What a folder holds, in a few words."""
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return "nothing"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _going_on(step: int | None) -> str:
    return "" if step is None else f"; it goes on from step {step}"


@contextlib.contextmanager
def _damage_explained(checkpoints: pathlib.Path, step: int | str) -> Iterator[None]:
    """Turns a failure to read a complete checkpoint into a UserError that says how to get past it."""
    try:
        yield
    except Exception as error:
        # Orbax wraps a failed read in a bare Exception; other types, such as one for lack of memory, are no damage.
        damage = isinstance(error, (OSError, ValueError, KeyError, TypeError)) or type(error) is Exception
        if not damage or isinstance(error, UserError):
            raise
        reason = re.split(r"\n|\. See full | \[tensorstore_spec", str(error).strip())[0]
        raise UserError(
            f"{checkpoints / str(step)} cannot be read ({reason}); if its files are damaged, delete that folder to go "
            f"on from the checkpoint before it"
        ) from error


def quiet_orbax() -> None:
    """Keeps Orbax's log lines off the screen: what it has to say to the user reaches him as an error."""
    logger = logging.getLogger("absl")
    if _not_from_orbax not in logger.filters:
        logger.addFilter(_not_from_orbax)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname
