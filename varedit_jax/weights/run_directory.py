"""The directory of a training run: its configuration, and the parameters in its checkpoints."""

import contextlib
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from varedit_jax.errors import UserError
from varedit_jax.storage.disk import is_machine_error, read_explained, reason
from varedit_jax.storage.files import read_json
from varedit_jax.storage.orbax import checkpointer, ocp
from varedit_jax.storage.paths import PathLike, child_names, is_remote, resolve

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
FORMAT_VERSION = 1  # of a run's directory, in its config.json; older directories do not state it


class DamagedCheckpoint(UserError):
    """A complete checkpoint that cannot be read."""


def read_config(directory: PathLike) -> dict[str, Any]:
    """The configuration in the config.json of a run's directory.

    Raises UserError if there is none, it is broken, or a newer version wrote it.
    """
    path = resolve(directory) / CONFIG_FILE
    try:
        with read_explained(str(path)):
            values = read_json(path)
    except UserError:
        raise
    except NotADirectoryError as error:
        raise UserError(f"{directory} is a file, where a directory of weights or of a run should be") from error
    except FileNotFoundError as error:
        raise UserError(f"{directory} is not the directory of a run: it has no {CONFIG_FILE}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a configuration, but {type(values).__name__}")
    version = values.pop("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(
            f"{directory} was written by a newer version of this program: its format is {version!r}, and this version "
            f"knows none above {FORMAT_VERSION}; update varedit_jax"
        )
    return values


def checkpoint_steps(directory: PathLike) -> list[int]:
    """Steps of the complete checkpoints of the run in `directory`, ascending; empty if there are none."""
    checkpoints = resolve(directory) / CHECKPOINTS
    # In an object store, where nothing is renamed, Orbax marks what is complete.
    last = "commit_success.txt" if is_remote(checkpoints) else "state/_METADATA"
    names = [name for name in child_names(checkpoints) if name.isdecimal()]
    return sorted(int(name) for name in names if (checkpoints / name / last).exists())


def placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """The abstract array with a sharding: its own, or else the first device of this process."""
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _shapes(tree: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each array, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(leaf.shape), np.dtype(leaf.dtype))
        for path, leaf in leaves
    }


def check_version(root: pathlib.Path) -> None:
    """Raises UserError if the run was written by a newer version."""
    if (root / CONFIG_FILE).exists():
        read_config(root)


def stored_fields(checkpoints: pathlib.Path, step: int) -> dict[str, Any]:
    """Metadata of the arrays of a checkpoint, as trees by field of TrainState."""
    with damage_explained(checkpoints, step), checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        metadata = reader.metadata(checkpoints / str(step) / "state").item_metadata
        if metadata is None:
            raise ValueError("it does not say what it holds")
        return dict(metadata.tree)


def check_same(checkpoints: pathlib.Path, step: int, wanted_fields: Mapping[str, Any]) -> None:
    """Raises UserError naming the first array that differs between a checkpoint and these fields of a TrainState."""
    found = stored_fields(checkpoints, step)
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


def read_checkpoint(checkpoints: pathlib.Path, step: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """These fields (abstract trees) of a checkpoint's state, and nothing else of it."""
    with damage_explained(checkpoints, step):
        return read_fields(checkpoints / str(step) / "state", fields)


def read_fields(directory: pathlib.Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """These fields (abstract trees) of the state in `directory`, and nothing else of it."""
    item = jax.tree.map(placed, dict(fields))
    with checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        restored = reader.restore(
            directory,
            args=ocp.args.PyTreeRestore(
                item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
            ),
        )
    return dict(restored)


def _shape_text(found: tuple[tuple[int, ...], np.dtype] | None) -> str:
    return "absent" if found is None else f"{found[1]}{list(found[0])}"


@contextlib.contextmanager
def damage_explained(checkpoints: pathlib.Path, step: int | str) -> Iterator[None]:
    """Turns a failure to read a complete checkpoint into a DamagedCheckpoint, which says how to get past it."""
    try:
        yield
    except Exception as error:
        # Orbax 0.12.8 wraps a failed read in a bare Exception; other types, such as for lack of memory, are no damage.
        damage = isinstance(error, (OSError, ValueError, KeyError, TypeError)) or type(error) is Exception
        if not damage or isinstance(error, UserError):
            raise
        if is_machine_error(error):
            raise UserError(
                f"cannot read {checkpoints / str(step)}: {reason(error)}; run the same command again"
            ) from error
        words = re.split(r"\n|\. See full | \[tensorstore_spec", str(error).strip())[0]
        raise DamagedCheckpoint(
            f"{checkpoints / str(step)} cannot be read ({words}); if its files are damaged, delete that directory "
            f"to resume from the checkpoint before it"
        ) from error
