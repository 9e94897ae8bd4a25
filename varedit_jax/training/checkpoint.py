"""Checkpoints of a run: the training state and the data iterator, saved together in one step.

A run's folder holds `config.json` (the configuration it was started with) and `checkpoints/<step>/`. A step folder
appears under its name only when it is complete, and an older one goes only after that; so a full disk, a crash or a
kill while saving leaves the last complete checkpoint loadable.
"""

import contextlib
import errno
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
import numpy as np
import orbax.checkpoint as ocp

from varedit_jax.errors import UserError
from varedit_jax.training.state import TrainState

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"

# Fields of a run's configuration that may change between the processes of one run: none of them changes the model, the
# examples or their order. `steps`, and how they divide, are among them so that a run can be lengthened.
FREE_FIELDS = (
    r"name",
    r"steps",
    r"stages",
    r"optimizer\.decay_steps",
    r"(log|sample|eval|save)_every",
    r"eval_batches",
    r"keep_checkpoints",
    r"sampling\..*",
    r"data\.(directory|read_threads|prefetch_batches|eval_examples)",
    r"model\.transformer\.remat",
    r"init_from",  # read at the first step only
    r"(tokenizer|text|perceptual)_weights",  # where the frozen weights lie, which may move
)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OURS = re.compile(r"\d+|\d+\.orbax-checkpoint-tmp.*|\..*")  # names in a folder of checkpoints; .nfs... comes with NFS
_ABSENT = "absent"


class Checkpoints:
    """The checkpoints of one run, newest `keep` of them. A context manager: leaving it finishes a save under way."""

    def __init__(self, workdir: str | os.PathLike[str], *, keep: int = 3) -> None:
        """Opens, and creates where needed, `workdir`/checkpoints.

        Raises UserError if that is not a folder, or holds something other than checkpoints.
        """
        if keep < 1:
            raise UserError(f"keep_checkpoints is {keep}; it must be at least 1")
        quiet_orbax()
        self.folder = pathlib.Path(workdir).absolute() / CHECKPOINTS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"{error.filename} is a file, where the folder of a run should be") from error
        except OSError as error:
            raise UserError(f"cannot create {self.folder}: {error.strerror}") from error
        foreign = [path for path in sorted(self.folder.iterdir()) if not _OURS.fullmatch(path.name)]
        if foreign:
            raise UserError(f"{foreign[0]} is no checkpoint; use another --workdir, where no one else keeps files")
        self._manager = ocp.CheckpointManager(
            self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, iterator: grain.DatasetIterator) -> None:
        """Saves `state` and the position of `iterator` as they are now; the writing goes on in the background.

        An error of the previous save surfaces here. Raises UserError if the disk is full.
        """
        self.wait()
        self._check_room(state)
        with _explained(f"checkpoint of step {step}", self.folder):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=grain.checkpoint.CheckpointSave(iterator),
                ),
            )

    def restore(self, abstract_state: TrainState, iterator: grain.DatasetIterator) -> TrainState:
        """The newest checkpoint: returns its state and sets `iterator` to the batch that comes next.

        `abstract_state` is a tree of jax.ShapeDtypeStruct (as of jax.eval_shape); the state comes back with their
        shardings, or on one device where they have none. Raises UserError if there is no checkpoint, if it belongs
        to another model, or if it is damaged.
        """
        step = self.latest()
        if step is None:
            raise UserError(f"there is no checkpoint in {self.folder}")
        if step not in checkpoint_steps(self.folder.parent):
            raise UserError(
                f"{self.folder / str(step)} is no checkpoint of a run: it holds {_listing(self.folder / str(step))} "
                f"instead of state and data; use another --workdir"
            )
        _check_same(self.folder, step, abstract_state)
        _check_processes(self.folder, step)
        with _damage_explained(self.folder, step):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(jax.tree.map(_placed, abstract_state)),
                    data=grain.checkpoint.CheckpointRestore(iterator),
                ),
            )
        return restored.state

    def wait(self) -> None:
        """Returns when the last save is complete. Raises UserError if the disk was full."""
        with _explained("checkpoint", self.folder):
            self._manager.wait_until_finished()

    def _check_room(self, state: TrainState) -> None:
        """Refuses to start a save that the disk has no room for."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
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


def restore_params(folder: str | os.PathLike[str], abstract_params: Any, step: int | None = None) -> Any:
    """The parameters alone of a run's checkpoint; nothing of the optimizer is read.

    Args:
      folder: folder of a run (the one with config.json and checkpoints/).
      abstract_params: tree of jax.ShapeDtypeStruct; shardings as in `Checkpoints.restore`.
      step: which checkpoint; None is the newest.

    Raises:
      UserError: no such folder, no checkpoint in it, no such step, another model's parameters, or damaged files.
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
    checkpoints = root / CHECKPOINTS
    _check_same(checkpoints, step, {"params": abstract_params})
    placed = jax.tree.map(_placed, abstract_params)
    restore_args = ocp.checkpoint_utils.construct_restore_args(placed)
    with _damage_explained(checkpoints, step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(
            checkpoints / str(step) / "state",
            args=ocp.args.PyTreeRestore(
                item={"params": placed}, restore_args={"params": restore_args}, partial_restore=True
            ),
        )
    return restored["params"]


def checkpoint_steps(folder: str | os.PathLike[str]) -> list[int]:
    """Steps of the complete checkpoints of the run in `folder`, ascending; empty if there are none."""
    found = pathlib.Path(folder).glob(f"{CHECKPOINTS}/*/state/_METADATA")
    return sorted(int(path.parts[-3]) for path in found if path.parts[-3].isdecimal())


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration in the config.json of a run's folder. Raises UserError if there is none, or it is broken."""
    path = pathlib.Path(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not the folder of a run: it has no {CONFIG_FILE}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a configuration, but {type(values).__name__}")
    return values


def write_config(folder: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Writes a run's configuration to its config.json, replacing it at once or not at all."""
    path = pathlib.Path(folder) / CONFIG_FILE
    draft = path.with_suffix(".draft")
    with _explained(CONFIG_FILE, path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(values, indent=2) + "\n")
        draft.replace(path)


def check_config(workdir: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Refuses to go on in the folder of a run that was configured otherwise (`FREE_FIELDS` aside).

    Passes if `workdir` has no config.json. Raises UserError with the first differing field and both values.
    """
    if not (pathlib.Path(workdir) / CONFIG_FILE).exists():
        return
    # What JSON does to tuples has to be done to both.
    recorded, asked = _flat(read_config(workdir)), _flat(json.loads(json.dumps(values)))
    for field in dict.fromkeys([*asked, *recorded]):
        if any(re.fullmatch(pattern, field) for pattern in FREE_FIELDS):
            continue
        ours, theirs = asked.get(field, _ABSENT), recorded.get(field, _ABSENT)
        if ours != theirs:
            raise UserError(
                f"{workdir} holds a run with {field} = {theirs!r}, but this one has {ours!r}; "
                f"use another --workdir, or the configuration in {pathlib.Path(workdir) / CONFIG_FILE}"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


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


def _check_same(checkpoints: pathlib.Path, step: int, abstract: Any) -> None:
    """Raises UserError naming the first array that differs between a checkpoint and a model.

    `abstract` is a TrainState, or a dict with some of its fields.
    """
    with _damage_explained(checkpoints, step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        metadata = checkpointer.metadata(checkpoints / str(step) / "state").item_metadata
        if metadata is None:
            raise ValueError("it does not say what it holds")
        fields = abstract if isinstance(abstract, dict) else vars(abstract)
        stored = _shapes({name: metadata.tree[name] for name in fields})
    wanted = _shapes(abstract)
    for path in dict.fromkeys([*wanted, *stored]):
        if stored.get(path) != wanted.get(path):
            field, _, name = path.partition("/")
            what = f"parameter {name}" if field == "params" else f"array {path}"
            raise UserError(
                f"{checkpoints / str(step)} is a checkpoint of another model: {what} is "
                f"{_shape_text(stored.get(path))} there and {_shape_text(wanted.get(path))} in this model"
            )


def _check_processes(checkpoints: pathlib.Path, step: int) -> None:
    """Raises UserError if the data iterator was saved by another number of processes."""
    counts = {path.stem.rpartition("-")[2] for path in (checkpoints / str(step) / "data").glob("process_*-of-*.json")}
    if counts and str(jax.process_count()) not in counts:
        raise UserError(
            f"{checkpoints / str(step)} was saved by {counts.pop()} processes, each at its own place in the data; "
            f"there are {jax.process_count()} now: go on with as many"
        )


def _shape_text(found: tuple[tuple[int, ...], np.dtype] | None) -> str:
    return _ABSENT if found is None else f"{found[1]}{list(found[0])}"


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
def _explained(what: str, folder: pathlib.Path) -> Iterator[None]:
    """Turns a failure to write `what` under `folder` for lack of room into a UserError.

    Orbax reports a failed write in its own words, of various types, with the system's error number inside.
    """
    try:
        yield
    except Exception as error:
        found = re.search(r"os_error_code='(\d+)'", str(error))
        code = error.errno if isinstance(error, OSError) else int(found.group(1)) if found else None
        if code not in _NO_ROOM:
            raise
        raise UserError(
            f"writing the {what} failed in {folder}: {os.strerror(code)}; earlier checkpoints are intact; make room "
            f"and run the same command again"
        ) from error


@contextlib.contextmanager
def _damage_explained(checkpoints: pathlib.Path, step: int) -> Iterator[None]:
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
