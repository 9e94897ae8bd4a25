"""Deduplication: records with the same id, with the same images and instruction, or near-duplicates.

Each kind is searched among the remaining records, and of several duplicates the lowest key is kept. The work is split
into buckets by hash, so that duplicates share a bucket and memory is bounded by a bucket.

Near-duplicates have the same instruction (ignoring case and punctuation) and similar sources and targets, so that two
edits of one image stay. Perceptual hashes of sources that differ in at most n of 64 bits agree in at least one of n + 1
bands, so only records that share a band are compared. A record is dropped if it is similar to one with a lower key.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipelines.preparation.fingerprints import Facts, PartFiles, save_array
from data_pipelines.preparation.perceptual_hash import alike
from data_pipelines.reasons import Reason

BUCKET = 1 << 17  # approximate number of records per bucket
_BLOCK = 256  # records compared with as many others of their band at once
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd; spreads bands over buckets

Pairs = NDArray[np.int64]  # [n, 2]: numbers of a dropped record and of the one it duplicates


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchTask:
    """One bucket of the search for one kind of duplicates."""

    reason: Reason  # SAME_ID, EXACT or NEAR
    parts: tuple[pathlib.Path, ...]
    verdicts: pathlib.Path  # uint8 per record; 0 for remaining ones
    near_bits: int
    bucket: int
    buckets: int
    found: pathlib.Path  # Pairs, as .npy

    def is_done(self) -> bool:
        """Returns True if the bucket has been searched."""
        return self.found.exists()


def search(task: SearchTask) -> None:
    """Searches a bucket for duplicates."""
    facts = Facts([PartFiles(directory) for directory in task.parts])
    found = _near(facts, task) if task.reason is Reason.NEAR else _same(facts, task)
    save_array(task.found, found)


def left(facts: Facts, verdicts: NDArray[np.uint8]) -> Iterator[tuple[NDArray[np.int64], NDArray]]:
    """Yields numbers and rows of the remaining records, one piece at a time."""
    for first, rows in facts.pieces():
        numbers = np.flatnonzero(verdicts[first : first + len(rows)] == 0)
        yield numbers + first, rows[numbers]


def _same(facts: Facts, task: SearchTask) -> Pairs:
    """Returns all but the lowest of the records with the same hash."""
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
    """Returns the near-duplicates of a bucket."""
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
    order = np.lexsort((numbers, rest[0], blocks))  # the lowest key of a block first
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
    """Returns records of a block, sorted by key, that are near-duplicates of an earlier one; with the first such one.

    `looks` are perceptual hashes of sources and targets, uint64 [n], and their colors, uint8 [n, 12].
    """
    source_shapes, target_shapes, source_colors, target_colors = looks
    found = []
    for begin in range(1, len(numbers), _BLOCK):
        some = slice(begin, min(begin + _BLOCK, len(numbers)))
        twin = np.full(some.stop - begin, -1, np.int64)
        for other in range(0, some.stop, _BLOCK):
            open_ = begin + np.flatnonzero(twin < 0)  # soon none, if many are alike
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
