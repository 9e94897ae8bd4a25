"""Blocks of arrays on disk: what reading one takes, and who reads which block for the devices of a mesh.

A host reads every distinct block that its devices hold once. Where the blocks lie across the stored order — a few
columns of every row — it reads rows instead, and the devices exchange them. Rows may be those of neighboring
dimensions taken as one, and be filled up to a number that divides over the devices.
"""

import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from varedit_jax.storage.ranges import Range, read_ranges

Block = tuple[tuple[int, int], ...]  # first and last (exclusive) index along each dimension

# Shorter runs of bytes are not read one by one: a disk gives pages of 4 KiB, an object store charges for each request.
_LEAST_RUN = 8 * 2**10
# Rows are read and exchanged only where that saves more than this factor: it takes memory and a compilation.
_WORTHWHILE = 1.05
# Arrays are read, checked and converted in parts: several times this is in memory beside the array itself. Larger
# buffers than 32 MiB would be new memory for every part (glibc's largest threshold), and a third of the time.
_PART_BYTES = 16 * 2**20


class RawArray(NamedTuple):
    """An array whose chunks lie uncompressed, in C order, in files: any part of one can be read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]
    place: Callable[[tuple[int, ...]], tuple[pathlib.Path, int]]  # of a chunk's indices: its file, and its first byte

    def merged(self, first: int, last: int) -> "RawArray | None":
        """Returns the array with the dimensions from `first` to `last` as one; None if its chunks do not allow that."""
        if self.chunks[first + 1 : last + 1] != self.shape[first + 1 : last + 1]:
            return None
        zeros = (0,) * (last - first)

        def place(chunk: tuple[int, ...]) -> tuple[pathlib.Path, int]:
            return self.place((*chunk[: first + 1], *zeros, *chunk[first + 1 :]))

        shape, chunks = merge(self.shape, first, last), merge(self.chunks, first, last)
        return RawArray(shape, self.dtype, chunks, place)

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


def merge(sizes: Sequence[int], first: int, last: int) -> tuple[int, ...]:
    """Returns the sizes with those from `first` to `last` as one."""
    return (*sizes[:first], math.prod(sizes[first : last + 1]), *sizes[last + 1 :])


def slices(block: Block, origin: Block | None = None) -> tuple[slice, ...]:
    """Returns a block as slices, counted from the beginning of `origin` if it is given."""
    starts = [low for low, _ in origin] if origin else [0] * len(block)
    return tuple(slice(low - start, high - start) for (low, high), start in zip(block, starts, strict=True))


def host_of(device: Any) -> int:
    """Returns the process that a device belongs to."""
    return int(device.process_index)


class Stored(Protocol):
    """An array on disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    def bytes_of(self, block: Block) -> int:
        """Returns the bytes that reading a block takes."""

    def merged(self, first: int, last: int) -> Self | None:
        """Returns the array with neighboring dimensions as one, if that is possible."""


class Reading(NamedTuple):
    """How an array is read: as an array of another shape, in another sharding, that is then exchanged."""

    shape: tuple[int, ...]  # with merged dimensions, filled up
    sharding: Sharding
    first: int  # the dimensions first to last are one
    last: int
    exchanged: NamedSharding | None  # of `shape` afterwards; None if nothing is exchanged


def held(sharding: Sharding, shape: tuple[int, ...], stored: tuple[int, ...]) -> dict[int, dict[Any, Block]]:
    """Returns what each host holds of an array filled up from `stored` to `shape`: the block of each of its devices."""
    found: dict[int, dict[Any, Block]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        ranges = [part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True)]
        block = tuple((min(low, size), min(high, size)) for (low, high), size in zip(ranges, stored, strict=True))
        found.setdefault(host_of(device), {})[device] = block
    return found


def to_read(blocks: Mapping[Any, Block]) -> list[Block]:
    """Returns the blocks that a host reads for its devices: one, if those that they hold fill it, or each once."""
    distinct = [block for block in dict.fromkeys(blocks.values()) if size_of(block)]
    if not distinct:
        return []
    around = tuple((min(low for low, _ in part), max(high for _, high in part)) for part in zip(*distinct, strict=True))
    return [around] if size_of(around) == sum(map(size_of, distinct)) else distinct


def size_of(block: Block) -> int:
    """Returns the number of values in a block."""
    return math.prod(high - low for low, high in block)


def choose_reading(leaf: Stored, sharding: Sharding, itemsize: int) -> Reading:
    """Returns how an array is read for `sharding`: directly, or as rows that the devices exchange afterwards.

    All hosts choose alike: what counts is the one that reads most.
    """

    def most(leaf: Stored, reading: Reading) -> int:
        hosts = held(reading.sharding, reading.shape, leaf.shape).values()
        return max(sum(map(leaf.bytes_of, to_read(blocks))) for blocks in hosts)

    direct = Reading(leaf.shape, sharding, 0, 0, None)
    hosts = held(sharding, leaf.shape, leaf.shape).values()
    holds = max(sum(map(size_of, to_read(blocks))) for blocks in hosts) * itemsize
    least = most(leaf, direct) / _WORTHWHILE
    if least <= holds:
        return direct
    chosen = direct
    for reading in _rows(leaf.shape, sharding):
        view = leaf.merged(reading.first, reading.last)
        if view is not None and (found := most(view, reading)) < least:
            chosen, least = reading, found
    return chosen


def _rows(shape: tuple[int, ...], sharding: Sharding) -> list[Reading]:
    """Returns the ways to split one dimension, or several as one, over all the axes that `sharding` splits over."""
    if not isinstance(sharding, NamedSharding):
        return []
    spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    split = [() if entry is None else entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    found = []
    for first, own in enumerate(split):
        moves = [axis for axes in split for axis in axes if axis not in own and sharding.mesh.shape[axis] > 1]
        if len(moves) != 1:  # one all-to-all; two axes at once would be gathered whole
            continue
        order = (*own, *moves)  # its own axes stay outermost
        parts = math.prod(sharding.mesh.shape[axis] for axis in order)
        for last in range(first, len(shape)):
            if any(split[first + 1 : last + 1]):
                break
            rows = math.prod(shape[first : last + 1])
            filled = -(-rows // parts) * parts
            if filled != rows and (own or filled > 2 * rows):
                continue
            new = (*shape[:first], filled, *shape[last + 1 :])
            after = PartitionSpec(*spec[: first + 1], *spec[last + 1 :])
            found.append(
                Reading(
                    new,
                    NamedSharding(sharding.mesh, PartitionSpec(*[None] * first, order)),
                    first,
                    last,
                    NamedSharding(sharding.mesh, after),
                )
            )
    return found


def parts_of(block: Block, chunks: Sequence[int], itemsize: int) -> Iterator[Block]:
    """Yields a block in parts of at most `_PART_BYTES`, or of one chunk, outermost dimensions first."""
    whole = size_of(block) * itemsize
    for axis, ((low, high), chunk) in enumerate(zip(block, chunks, strict=True)):
        if whole > _PART_BYTES and low // chunk < (high - 1) // chunk:
            step = max(_PART_BYTES * (high - low) // whole // chunk, 1) * chunk
            for start in range(low // chunk * chunk, high, step):
                part = (max(start, low), min(start + step, high))
                yield from parts_of((*block[:axis], part, *block[axis + 1 :]), chunks, itemsize)
            return
    yield block


def _zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros at an address that a CPU device takes as it is, without a copy."""
    size, alignment = math.prod(shape) * np.dtype(dtype).itemsize, 64
    memory = np.zeros(size + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + size].view(dtype).reshape(shape)


def place(
    stored: tuple[int, ...],
    reading: Reading,
    split: Callable[[Block], Iterable[Block]],
    read: Callable[[Block], np.ndarray],
    dtype: Any,
) -> jax.Array:
    """Returns the array of `reading` on its devices.

    `read` is called once for each part, as `split` gives them, of the blocks that this host reads. Beside such a part
    the host has what its devices get: devices with the same block share it, and a CPU goes on using it.
    """
    arrays = []
    for own in held(reading.sharding, reading.shape, stored).values():
        here = {device: block for device, block in own.items() if device in reading.sharding.addressable_devices}
        shape = reading.sharding.shard_shape(reading.shape)
        pieces = {block: _zeros(shape, dtype) for block in here.values()}
        for around in to_read(here):
            for part in split(around):
                values = read(part)
                for block, piece in pieces.items():
                    both = _overlap(part, block)
                    if size_of(both):
                        piece[slices(both, block)] = values[slices(both, part)]
        arrays += [jax.device_put(pieces[block], device) for device, block in here.items()]
    return jax.make_array_from_single_device_arrays(reading.shape, reading.sharding, arrays, dtype=dtype)


def _overlap(one: Block, other: Block) -> Block:
    """Returns what two blocks share; of size 0 if that is nothing."""
    bounds = ((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return tuple((low, max(low, high)) for low, high in bounds)


@functools.cache
def exchange_of(shape: tuple[int, ...], sharding: Sharding, reading: Reading) -> Callable[[jax.Array], jax.Array]:
    """Returns the compiled exchange of what `reading` placed: to an array of `shape` and `sharding`."""

    def exchange(rows: jax.Array) -> jax.Array:
        columns = jax.lax.with_sharding_constraint(rows, reading.exchanged)
        count = math.prod(shape[reading.first : reading.last + 1])
        return jax.lax.slice_in_dim(columns, 0, count, axis=reading.first).reshape(shape)

    return jax.jit(exchange, out_shardings=sharding)
