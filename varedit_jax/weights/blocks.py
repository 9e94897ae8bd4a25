"""Blocks of arrays on disk: what reading one takes, and who reads which block for the devices of a mesh.

A host reads every distinct block that its devices hold once. Where the blocks lie across the stored order — a few
columns of every row — it reads rows instead, and the devices exchange them.
"""

import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from varedit_jax.storage.ranges import Range, read_ranges

Block = tuple[tuple[int, int], ...]  # first and last (exclusive) index along each dimension

# Shorter runs of bytes are not read one by one: a disk gives pages of 4 KiB, an object store charges for each request.
_LEAST_RUN = 8 * 2**10
# Rows are read and exchanged only where that saves more than this factor: it takes memory and a compilation.
_WORTHWHILE = 1.05


class RawArray(NamedTuple):
    """An array whose chunks lie uncompressed, in C order, in files: any part of one can be read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]
    place: Callable[[tuple[int, ...]], tuple[pathlib.Path, int]]  # of a chunk's indices: its file, and its first byte

    def bytes_of(self, block: Block) -> int:
        """Returns the bytes that `read` reads."""
        return sum(
            math.prod(high - low for low, high in self._widened(part)) * self.dtype.itemsize
            for _, part in _parts(block, self.chunks)
        )

    def read(self, block: Block) -> np.ndarray:
        """Returns a block. Raises the storage's error, and ValueError for a file that is too short."""
        found = np.empty([high - low for low, high in block], self.dtype)
        for chunk, part in _parts(block, self.chunks):
            path, start = self.place(chunk)
            wide = self._widened(part)
            ranges = [(start + first, length) for first, length in self._runs(wide)]
            data = read_ranges(path, ranges)
            if any(len(piece) != length for piece, (_, length) in zip(data, ranges, strict=True)):
                raise ValueError(f"{path.name} is cut short")
            values = np.frombuffer(b"".join(data), self.dtype).reshape([high - low for low, high in wide])
            inside = tuple(slice(low - base, high - base) for (low, high), (base, _) in zip(part, wide, strict=True))
            origin = [index * size for index, size in zip(chunk, self.chunks, strict=True)]
            target = tuple(
                slice(low + at - begin, high + at - begin)
                for (low, high), at, (begin, _) in zip(part, origin, block, strict=True)
            )
            found[target] = values[inside]
        return found

    def _widened(self, part: Block) -> Block:
        """Returns the part of a chunk that is read for `part`: runs of bytes that are worth a request."""
        wide = list(part)
        for axis in reversed(range(1, len(wide))):
            whole = all(wide[other] == (0, self.chunks[other]) for other in range(axis + 1, len(wide)))
            inner = math.prod(self.chunks[axis + 1 :]) * self.dtype.itemsize
            if whole and (wide[axis][1] - wide[axis][0]) * inner < _LEAST_RUN:
                wide[axis] = (0, self.chunks[axis])
        return tuple(wide)

    def _runs(self, part: Block) -> list[Range]:
        """Returns the ranges of bytes, within a chunk, of a part of it, in order."""
        axis = len(part)
        while axis > 0 and part[axis - 1] == (0, self.chunks[axis - 1]):
            axis -= 1
        axis = max(axis - 1, 0)  # the last one that is not whole is contiguous, too
        strides = [math.prod(self.chunks[other + 1 :]) * self.dtype.itemsize for other in range(len(part))]
        length = math.prod(high - low for low, high in part[axis:]) * self.dtype.itemsize
        first = part[axis][0] * strides[axis] if part else 0
        outer = itertools.product(*(range(low, high) for low, high in part[:axis]))
        return [
            (sum(at * stride for at, stride in zip(index, strides, strict=False)) + first, length) for index in outer
        ]


def bytes_of_chunks(block: Block, shape: Sequence[int], chunks: Sequence[int], itemsize: int) -> int:
    """Returns the bytes of the chunks that a block touches: what is read where chunks are compressed."""
    touched = [
        min(-(-high // size) * size, whole) - low // size * size
        for (low, high), size, whole in zip(block, chunks, shape, strict=True)
    ]
    return math.prod(touched) * itemsize


def _parts(block: Block, chunks: Sequence[int]) -> list[tuple[tuple[int, ...], Block]]:
    """Returns the chunks that a block touches, by their indices, and the part of each, counted from its beginning."""
    along = [
        [
            (index, (max(low - index * size, 0), min(high - index * size, size)))
            for index in range(low // size, -(-high // size))
        ]
        for (low, high), size in zip(block, chunks, strict=True)
    ]
    return [(tuple(i for i, _ in found), tuple(part for _, part in found)) for found in itertools.product(*along)]


def block_of(index: Sequence[slice], shape: Sequence[int]) -> Block:
    """Returns slices without steps as a block."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def slices(block: Block, origin: Block | None = None) -> tuple[slice, ...]:
    """Returns a block as slices, counted from the beginning of `origin` if it is given."""
    starts = [low for low, _ in origin] if origin else [0] * len(block)
    return tuple(slice(low - start, high - start) for (low, high), start in zip(block, starts, strict=True))


def host_of(device: Any) -> int:
    """Returns the process that a device belongs to."""
    return int(device.process_index)


def held(sharding: Sharding, shape: tuple[int, ...]) -> dict[int, dict[Any, Block]]:
    """Returns what each host holds of an array: the block of each of its devices."""
    found: dict[int, dict[Any, Block]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        found.setdefault(host_of(device), {})[device] = block_of(index or (), shape)
    return found


def to_read(blocks: Mapping[Any, Block]) -> list[Block]:
    """Returns the blocks that a host reads for its devices: one, if those that they hold fill it, or each once."""
    distinct = list(dict.fromkeys(blocks.values()))
    around = tuple((min(low for low, _ in part), max(high for _, high in part)) for part in zip(*distinct, strict=True))
    return [around] if _size(around) == sum(map(_size, distinct)) else distinct


def _size(block: Block) -> int:
    return math.prod(high - low for low, high in block)


def choose_reading(shape: tuple[int, ...], sharding: Sharding, cost: Callable[[Block], int]) -> Sharding:
    """Returns the sharding in which an array of `shape` is read: `sharding`, or rows that devices exchange afterwards.

    `cost` gives the bytes that reading a block takes. All hosts choose alike: what counts is the one that reads most.
    """

    def most(candidate: Sharding) -> int:
        return max(sum(map(cost, to_read(blocks))) for blocks in held(candidate, shape).values())

    others = {candidate: most(candidate) for candidate in _rows(shape, sharding)}
    best = min(others, key=others.__getitem__, default=sharding)
    return best if others and most(sharding) > _WORTHWHILE * others[best] else sharding


def _rows(shape: tuple[int, ...], sharding: Sharding) -> list[Sharding]:
    """Returns the shardings that split one dimension alone, over all the axes that `sharding` splits over."""
    if not isinstance(sharding, NamedSharding):
        return []
    dimensions = [entry if isinstance(entry, tuple) else (entry,) for entry in sharding.spec if entry is not None]
    if not dimensions:
        return []
    spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    axes = [axis for entry in dimensions for axis in entry]
    found: list[Sharding] = []
    for dimension, size in enumerate(shape):
        own = spec[dimension] or ()
        own = own if isinstance(own, tuple) else (own,)
        # Its own axes stay outermost, so that each of the others moves by one all-to-all within its groups.
        order = (*own, *(axis for axis in axes if axis not in own))
        if size % math.prod(sharding.mesh.shape[axis] for axis in order) == 0:
            rows = PartitionSpec(*([None] * dimension), order)
            found.append(NamedSharding(sharding.mesh, rows, memory_kind=sharding.memory_kind))
    return found


def place(shape: tuple[int, ...], sharding: Sharding, read: Callable[[Block], np.ndarray]) -> jax.Array:
    """Returns an array on the devices of `sharding`; `read` is called once for each block that this host reads."""
    arrays = []
    for blocks in held(sharding, shape).values():
        own = {device: block for device, block in blocks.items() if device in sharding.addressable_devices}
        if not own:
            continue
        for around in to_read(own):
            values = read(around)
            for device, block in own.items():
                if all(a <= low and high <= b for (low, high), (a, b) in zip(block, around, strict=True)):
                    arrays.append(jax.device_put(values[slices(block, around)], device))
    dtype = arrays[0].dtype
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays, dtype=dtype)


@functools.cache
def _moved(sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=sharding)


def exchange(array: jax.Array, sharding: Sharding) -> jax.Array:
    """Returns an array in another sharding over the same devices."""
    return array if array.sharding == sharding else _moved(sharding)(array)
