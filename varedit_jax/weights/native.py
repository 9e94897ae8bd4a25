"""Trees of parameters on disk, one slice at a time: read in every form, written as an Orbax checkpoint.

Forms of a part (tokenizer, text, transformer) in a directory:

    {part}.safetensors          names are paths, slashes between
    {part}/                     an Orbax checkpoint of the tree, a directory per array and a raw file per chunk, so that
                                a stack of blocks can be written and read block by block
    checkpoints/{step}/state    of a training run; the newest step

An array X of int8 comes with its scales, X_scale (quantized.py). Both together are read as one array of float32, unless
they are asked for.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import tensorstore as ts

from varedit_jax.errors import UserError
from varedit_jax.quantized import dequantized
from varedit_jax.storage import files
from varedit_jax.storage.disk import is_machine_error, read_explained
from varedit_jax.storage.orbax import checkpointer, ocp
from varedit_jax.storage.paths import PathLike, is_remote, kvstore, resolve
from varedit_jax.types import Params
from varedit_jax.weights import blocks, manifest, run_directory
from varedit_jax.weights.names import flat, tree
from varedit_jax.weights.pth import LazyTensor
from varedit_jax.weights.reader import SAFETENSORS, open_weights

_CHUNK_BYTES = 64 * 2**20  # of the Orbax checkpoint's files: what a reader of one shard has to read at least
_ZARR_TYPES = {np.dtype(np.float32): "<f4", np.dtype(np.float16): "<f2", np.dtype(np.float64): "<f8"}
_ZARR_TYPES |= {np.dtype(ml_dtypes.bfloat16): "bfloat16", np.dtype(np.int8): "|i1"}
SCALE = "_scale"  # behind the name of an array of int8: that of its scales


class Leaf(NamedTuple):
    """An array of a tree: shape, type and, if it is on disk, how to read it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    source: Any = None  # supports [index], and np.asarray of what comes back
    name: str = ""  # file and path, for messages
    raw: blocks.RawArray | None = None  # the same where it is not compressed: reads nothing beside a block

    def read(self, index: int | tuple[slice, ...] | None = None) -> np.ndarray:
        """All of it, one entry along its leading axis, or a block. Raises UserError if it is missing or cut short."""
        found = self.source if index is None else self.source[index]
        if isinstance(found, StoredInt8):
            return np.asarray(found)
        if not isinstance(found, ts.TensorStore):
            return found
        try:
            with read_explained(self.name):
                return found.read().result()
        except ValueError as error:
            raise UserError(f"{self.name} is damaged: {str(error).split(' [')[0]}") from error

    def as_float32(self, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """All of it, or a block, in memory as float32. UserError as of `read`, and for NaN and infinite values."""
        values = np.array(self.read(index), np.float32)
        manifest.check_finite(values, self.name)
        return values

    def read_block(self, block: blocks.Block, dtype: np.dtype) -> np.ndarray:
        """A block of it in memory, rounded to `dtype`.

        UserError as of `read`, and for values that are NaN or infinite, or become so.
        """
        if self.raw is None:
            values = np.asarray(self.read(blocks.slices(block)))
        else:
            try:
                with read_explained(self.name):
                    values = self.raw.read(block)
            except (OSError, ValueError) as error:
                raise UserError(f"{self.name} is damaged: {error}") from error
        if values.dtype == dtype:
            manifest.check_finite(values, self.name)
            return values
        with np.errstate(over="ignore"):  # what becomes infinite is refused
            rounded = values.astype(np.float32, copy=False).astype(dtype, copy=False)
        if not manifest.is_finite(rounded):
            manifest.check_finite(values, self.name)
            manifest.check_finite(rounded, f"{self.name}, as {np.dtype(dtype)},")
        return rounded

    def parts_of(self, block: blocks.Block) -> Iterator[blocks.Block]:
        """Yields a block in parts that are read one by one."""
        return blocks.parts_of(block, self._chunks(), self.dtype.itemsize)

    def _chunks(self) -> tuple[int, ...]:
        """Sizes of what is read at once; 1 where any values can be."""
        if self.raw is not None and is_remote(self.raw.place((0,) * len(self.shape))[0]):
            return self.raw.chunks  # a request each
        if self.raw is not None or not isinstance(self.source, ts.TensorStore):
            return (1,) * len(self.shape)
        return tuple(int(size or 1) for size in self.source.chunk_layout.read_chunk.shape or ())

    def merged(self, first: int, last: int) -> "Leaf | None":
        """The array with the dimensions from `first` to `last` as one, for `read_block`; None if that cannot be."""
        if first == last:
            return self
        raw = self.raw and self.raw.merged(first, last)
        return self._replace(shape=raw.shape, raw=raw) if raw else None

    def bytes_of(self, block: blocks.Block) -> int:
        """Bytes on disk that reading a block takes."""
        if self.raw is not None:
            return self.raw.bytes_of(block)
        chunks = self._chunks() if isinstance(self.source, ts.TensorStore) else self.shape
        return blocks.bytes_of_chunks(block, self.shape, chunks, self.dtype.itemsize)


@dataclasses.dataclass(frozen=True)
class StoredInt8:
    """An array on disk as int8 values and float32 scales; the source of a `Leaf`, it gives what they stand for."""

    values: Leaf
    scale: Leaf

    def __getitem__(self, index: int | tuple[slice, ...]) -> np.ndarray:
        """One entry along the leading axis, or a block."""
        own = index
        if isinstance(index, tuple):  # scales are 1 along the axes that are summed over
            sizes = zip(index, self.values.shape, self.scale.shape, strict=True)
            own = tuple(part if size == whole else slice(None) for part, whole, size in sizes)
        return dequantized(np.asarray(self.values.read(index)), np.asarray(self.scale.read(own)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it."""
        found = dequantized(np.asarray(self.values.read()), np.asarray(self.scale.read()))
        return found.astype(dtype or found.dtype, copy=False)


def _with_scales(found: dict[str, Leaf]) -> dict[str, Leaf]:
    """Arrays of a part, those of int8 as one with their scales. Raises UserError for int8 without scales that fit."""
    whole = {name for name, leaf in found.items() if leaf.dtype == np.int8}
    leaves = {name: leaf for name, leaf in found.items() if name.removesuffix(SCALE) not in whole or name in whole}
    for name in whole:
        values, scale = found[name], found.get(name + SCALE)
        if scale is None:
            raise UserError(f"{values.name} is int8 without its scales {name}{SCALE}; convert the weights again")
        fits = scale.dtype == np.float32 and len(scale.shape) == len(values.shape)
        if not fits or any(own not in (1, size) for own, size in zip(scale.shape, values.shape, strict=True)):
            raise UserError(
                f"{scale.name} is {scale.dtype} of shape {list(scale.shape)}, which does not fit the int8 array of "
                f"shape {list(values.shape)}; convert the weights again"
            )
        leaves[name] = Leaf(values.shape, scale.dtype, StoredInt8(values, scale), values.name)
    return leaves


def is_part(directory: PathLike, part: str) -> bool:
    """Returns True if a directory of weights holds the part."""
    root = resolve(directory)
    return (root / f"{part}.safetensors").is_file() or (root / part / "_METADATA").is_file()


def find_part(directory: PathLike, part: str, *, ema: bool = False, step: int | None = None) -> dict[str, Leaf]:
    """The arrays of a part by path, whatever their shapes; none is read yet.

    Of a run those of the newest checkpoint, or of that of `step`; with `ema` those of the EMA that it kept. Raises
    UserError for a missing or damaged part, and for an EMA that the run did not keep.
    """
    root = resolve(directory)
    with read_explained(str(root)):
        return _with_scales(_find_part(root, part, ema, step))


def _find_part(root: pathlib.Path, part: str, ema: bool, step: int | None) -> dict[str, Leaf]:
    where = _form(root, part, step)
    store = {"driver": "ocdbt", "base": kvstore(where), "path": ""}
    if ema:
        found = _open_orbax(where, store, ("ema", part)) if where.name == "state" else {}
        if not found:
            raise UserError(f"{root} holds no EMA of its {part}, as runs with optimizer.ema_decay keep one")
        return found
    if where.suffix == SAFETENSORS:
        return {
            name: Leaf(x.shape, x.dtype, x.load(), f"{where}: {name}", _in_file(where, x))
            for name, x in open_weights(where).items()
        }
    if where.name == part:
        return _open_orbax(where, kvstore(where), ())
    return _open_orbax(where, store, ("params", part))


def _form(root: pathlib.Path, part: str, step: int | None = None) -> pathlib.Path:
    """The file or directory that holds a part. Raises UserError if there is none, or it is not complete."""
    files.check_complete(root)
    if step is not None:
        return root / run_directory.CHECKPOINTS / str(step) / "state"
    if (root / f"{part}.safetensors").is_file():
        return root / f"{part}.safetensors"
    if (root / part / "_METADATA").is_file():
        return root / part
    if steps := run_directory.checkpoint_steps(root):
        return root / run_directory.CHECKPOINTS / str(steps[-1]) / "state"
    raise UserError(f"{root} holds no {part} weights ({part}.safetensors is missing), and no checkpoint of a run")


def open_part(
    directory: PathLike, part: str, expected: Params, *, ema: bool = False, step: int | None = None
) -> dict[str, Leaf]:
    """As `find_part`, of exactly the arrays of the tree `expected` (of jax.ShapeDtypeStruct).

    Raises UserError for a missing or damaged part, and for one of another model, naming every array that differs with
    both shapes.
    """
    found, wanted = find_part(directory, part, ema=ema, step=step), flat(expected)
    different = [
        f"{name} has shape {found[name].shape if name in found else 'nothing'}, "
        f"expected is {tuple(wanted[name].shape) if name in wanted else 'nothing'}"
        for name in dict.fromkeys([*wanted, *found])
        if name not in found or name not in wanted or tuple(found[name].shape) != tuple(wanted[name].shape)
    ]
    if different:
        raise UserError(
            f"{_form(resolve(directory), part, step)} is of another model: {'; '.join(different)}; "
            f"use the configuration that it was trained with"
        )
    return {name: found[name] for name in wanted}


def load_part(directory: PathLike, part: str, expected: Params) -> Params:
    """One part in memory, as float32 numpy arrays in the tree `expected`. Raises UserError as `open_part` does."""
    leaves = open_part(directory, part, expected)
    return tree({path: leaf.as_float32() for path, leaf in leaves.items()})


def load_sharded(leaf: Leaf, like: jax.ShapeDtypeStruct) -> jax.Array:
    """An array on the devices of `like.sharding` (the first local device if it is None), rounded to the type of `like`.

    Every process reads as many bytes as its own devices hold, each once; where these lie in pieces, it reads others,
    and the devices exchange them: so all processes call it for the same arrays in the same order. It returns when the
    array is there, so that no two of them lie in the memory of a host. Raises UserError as `Leaf.read_block`.
    """
    sharding = like.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    reading = blocks.choose_reading(leaf, sharding, leaf.dtype.itemsize)
    view = leaf.merged(reading.first, reading.last) or leaf
    read = functools.partial(view.read_block, dtype=np.dtype(like.dtype))
    placed = blocks.place(view.shape, reading, view.parts_of, read, like.dtype)
    if reading.exchanged is not None:
        placed = blocks.exchange_of(leaf.shape, sharding, reading)(placed)
    return placed.block_until_ready()


def _in_file(path: pathlib.Path, tensor: LazyTensor) -> blocks.RawArray | None:
    """A tensor that lies whole in a local file."""
    if is_remote(path) or tensor.start is None:
        return None
    start = tensor.start
    return blocks.RawArray(tensor.shape, tensor.dtype, tensor.shape, lambda _: (path, start))


def _in_chunks(directory: pathlib.Path, array: ts.TensorStore) -> blocks.RawArray | None:
    """An array of raw chunks in files of their own; None if its chunks are of another kind."""
    stored = array.spec().to_json()["metadata"]
    if stored.get("compressor") or stored.get("filters") or stored.get("order", "C") != "C":
        return None
    separator = stored.get("dimension_separator", ".")

    def place(chunk: tuple[int, ...]) -> tuple[pathlib.Path, int]:
        return directory / (separator.join(map(str, chunk)) or "0"), 0

    return blocks.RawArray(tuple(array.shape), array.dtype.numpy_dtype, tuple(stored["chunks"]), place)


def _open_orbax(where: pathlib.Path, store: dict[str, Any], prefix: tuple[str, ...]) -> dict[str, Leaf]:
    """Arrays of a checkpoint whose path begins with `prefix`, by the rest of their path."""
    try:
        entries = json.loads((where / "_METADATA").read_text())["tree_metadata"].values()
        paths = [tuple(key["key"] for key in entry["key_metadata"]) for entry in entries]
        found = {}
        for path in (path for path in paths if path[: len(prefix)] == prefix):
            spec = {
                "driver": "zarr",
                "kvstore": store | {"path": f"{store['path']}{'.'.join(path)}/"},
                "fill_missing_data_reads": False,
                "recheck_cached_data": "open",
            }
            array = ts.open(spec, open=True, read=True).result()
            name = "/".join(path[len(prefix) :])
            raw = None if prefix else _in_chunks(where / ".".join(path), array)
            found[name] = Leaf(tuple(array.shape), array.dtype.numpy_dtype, array, f"{where}: {name}", raw)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if is_machine_error(error):
            raise
        raise UserError(f"{where} is damaged or not a checkpoint: {str(error).split(' [')[0]}") from error
    return found


class OrbaxPart:
    """Writes the Orbax checkpoint of a part, slice by slice."""

    def __init__(self, directory: pathlib.Path, leaves: Mapping[str, Leaf]) -> None:
        """`leaves` are the arrays by path. Nothing is written before `create`."""
        self.directory, self._leaves = directory, dict(leaves)
        self._arrays: dict[str, ts.TensorStore] = {}

    def create(self) -> None:
        """Creates the checkpoint with empty arrays, in place of what an earlier attempt may have begun."""
        # Orbax writes the description of the tree, with a scalar for each array; the arrays then replace these.
        numbers = tree({path: np.zeros((), leaf.dtype) for path, leaf in self._leaves.items()})
        with checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as writer:
            writer.save(self.directory, args=ocp.args.PyTreeSave(numbers), force=True)
        for path, leaf in self._leaves.items():
            files.remove_directory(self._array_path(path))
            self._open(path, leaf)

    def _array_path(self, path: str) -> pathlib.Path:
        return self.directory / path.replace("/", ".")

    def _open(self, path: str, create: Leaf | None = None) -> ts.TensorStore:
        spec: dict[str, Any] = {"driver": "zarr", "kvstore": kvstore(self._array_path(path))}
        if create:
            spec["metadata"] = {
                "shape": list(create.shape),
                "chunks": list(_chunks(create.shape, create.dtype.itemsize, stacked=is_stack(path))),
                "dtype": _ZARR_TYPES[create.dtype],
                "compressor": None,  # weights do not compress
                "dimension_separator": ".",
            }
        else:
            spec["store_data_equal_to_fill_value"] = True  # so that a missing file is damage, never zeros
        return ts.open(spec, create=create is not None).result()

    def write(self, path: str, index: int | None, tensor: np.ndarray) -> None:
        """Writes an array, or one entry along its leading axis, durably."""
        if path not in self._arrays:
            self._arrays[path] = self._open(path)
        array = self._arrays[path]
        (array if index is None else array[index]).write(tensor).result()


def is_stack(path: str) -> bool:
    """Returns True if the leading axis of the array at `path` is that of blocks or layers."""
    return path.startswith(("blocks/", "layers/"))


def _chunks(shape: tuple[int, ...], itemsize: int, stacked: bool) -> tuple[int, ...]:
    """Chunks of at most `_CHUNK_BYTES`: one entry of a stack, halved along its longest axis while it is too large."""
    chunks = [1, *shape[1:]] if stacked else list(shape)
    while math.prod(chunks) * itemsize > _CHUNK_BYTES:
        longest = max(range(len(chunks)), key=lambda axis: chunks[axis])
        chunks[longest] = -(-chunks[longest] // 2)
    return tuple(max(size, 1) for size in chunks)
