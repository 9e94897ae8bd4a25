"""Records that are there twice: the same id, the same images and instruction, or nearly the same.

Each kind is looked for among the records that are left, the lowest key of several stays, and the work is cut into
buckets by hash, so that what is compared lies in one bucket and memory is that of a bucket.

Near-duplicates have the same instruction (case and punctuation aside), and sources and targets that look alike, so that
two edits of one image stay. Shapes of sources that differ in at most n of 64 bits agree in one of n + 1 bands whole;
so only records that share a band are compared. A record leaves if it is like one with a lower key.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipelines.preparation.fingerprints import Facts, PartFiles, save_array
from data_pipelines.preparation.perceptual_hash import alike
from data_pipelines.reasons import Reason

BUCKET = 1 << 17  # records of a bucket, about
_BLOCK = 256  # records compared with as many others of their band at a time
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd; spreads bands over buckets

Pairs = NDArray[np.int64]  # [n, 2]: number of a record that leaves, and of the one that it is like


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchTask:
    """One bucket of one kind of duplicates."""

    reason: Reason  # SAME_ID, EXACT or NEAR
    parts: tuple[pathlib.Path, ...]
    verdicts: pathlib.Path  # uint8 a record; those with 0 are left so far
    near_bits: int
    bucket: int
    buckets: int
    found: pathlib.Path  # Pairs, as .npy

    def is_done(self) -> bool:
        """Returns True if it has been searched."""
        return self.found.exists()


def search(task: SearchTask) -> None:
    """Finds the duplicates of a bucket."""
    facts = Facts([PartFiles(directory) for directory in task.parts])
    found = _near(facts, task) if task.reason is Reason.NEAR else _same(facts, task)
    save_array(task.found, found)


def left(facts: Facts, verdicts: NDArray[np.uint8]) -> Iterator[tuple[NDArray[np.int64], NDArray]]:
    """Numbers and rows of records that no step left out so far, a piece at a time."""
    for first, rows in facts.pieces():
        numbers = np.flatnonzero(verdicts[first : first + len(rows)] == 0)
        yield numbers + first, rows[numbers]


def _same(facts: Facts, task: SearchTask) -> Pairs:
    """Records with the same hash: all but the lowest leave."""
    name = "key" if task.reason is Reason.SAME_ID else "content"
    pieces = []
    for numbers, rows in left(facts, np.load(task.verdicts, mmap_mode="r")):
        mine = rows[name] % task.buckets == task.bucket
        pieces.append((rows[name][mine], rows["key"][mine], numbers[mine]))
    hashes, keys, numbers = (np.concatenate(column) for column in zip(*pieces, strict=True))
    order = np.lexsort((numbers, keys, hashes))
    hashes, numbers = hashes[order], numbers[order]
    begins = np.concatenate([[True], hashes[1:] != hashes[:-1]])[: len(hashes)]
    firsts = numbers[begins][np.cumsum(begins) - 1]
    return np.stack([numbers, firsts], axis=1)[~begins]


def _near(facts: Facts, task: SearchTask) -> Pairs:
    bands = task.near_bits + 1
    edges = [64 * band // bands for band in range(bands + 1)]
    columns = ("key", "source_shape", "target_shape", "source_colors", "target_colors")
    pieces = []
    for numbers, rows in left(facts, np.load(task.verdicts, mmap_mode="r")):
        for band in range(bands):
            width = edges[band + 1] - edges[band]
            shapes = (rows["source_shape"] >> np.uint64(edges[band])) & np.uint64((1 << width) - 1)
            blocks = (rows["words"] ^ np.uint64(band)) * _MIX ^ (shapes * _MIX)
            mine = (blocks >> np.uint64(20)) % np.uint64(task.buckets) == task.bucket
            pieces.append((blocks[mine], numbers[mine], *(rows[name][mine] for name in columns)))
    blocks, numbers, *rest = (np.concatenate(column) for column in zip(*pieces, strict=True))
    order = np.lexsort((numbers, rest[0], blocks))  # in a block, the lowest key first
    blocks, numbers, *rest = (column[order] for column in (blocks, numbers, *rest))
    ends = np.flatnonzero(np.concatenate([blocks[1:] != blocks[:-1], [True]])[: len(blocks)]) + 1
    starts = np.concatenate([[0], ends[:-1]])[: len(ends)]
    found = []
    for start, end in zip(starts, ends, strict=True):
        if end - start > 1:
            block = slice(start, end)
            found.append(_compare(numbers[block], [column[block] for column in rest[1:]], task.near_bits))
    return np.concatenate([np.zeros((0, 2), np.int64), *found])


def _compare(numbers: NDArray[np.int64], looks: Sequence[NDArray], bits: int) -> Pairs:
    """Records of a block, the lowest key first, that are like one before them; with the first such one.

    `looks` are shapes of sources and of targets, uint64 [n], and their colors, uint8 [n, 12].
    """
    source_shapes, target_shapes, source_colors, target_colors = looks
    found = []
    for begin in range(1, len(numbers), _BLOCK):
        some = slice(begin, min(begin + _BLOCK, len(numbers)))
        twin = np.full(some.stop - begin, -1, np.int64)
        for other in range(0, some.stop, _BLOCK):
            open_ = begin + np.flatnonzero(twin < 0)  # with many that are all alike, soon none
            if not len(open_):
                break
            before = np.arange(other, min(other + _BLOCK, some.stop))
            near = np.bitwise_count(source_shapes[open_, None] ^ source_shapes[None, before]) <= bits
            rows, columns = np.nonzero(near & (before[None] < open_[:, None]))
            for shapes, colors in ((source_shapes, source_colors), (target_shapes, target_colors)):
                a, b = open_[rows], before[columns]
                like = alike(shapes[a], shapes[b], colors[a], colors[b], bits)
                rows, columns = rows[like], columns[like]
            seen, first = np.unique(rows, return_index=True)
            twin[open_[seen] - begin] = numbers[before[columns[first]]]
        found.append(np.stack([numbers[some], twin], axis=1)[twin >= 0])
    return np.concatenate([np.zeros((0, 2), np.int64), *found])
