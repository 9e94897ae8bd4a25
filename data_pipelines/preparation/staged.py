"""Staged records: the bytes of what passed the filters, from reading to the shards.

    scan/00000/records-00 ... records-15    records of a part, by the first bits of their keys

A shard has the records of a range of keys, so it reads one or a few of each part's files; they are deleted as soon as
no shard needs them, and staging and shards together take hardly more than the data once.
"""

import contextlib
import pathlib
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from data_pipelines.preparation.fingerprints import Facts, PartFiles
from data_pipelines.record import Record, decode
from varedit_jax.errors import UserError

BUCKETS = 16  # files of a part
_RANGE = 2**64 // BUCKETS  # of keys


def _path(part: PartFiles, bucket: int) -> pathlib.Path:
    return part.records.with_name(f"{part.records.name}-{bucket:02d}")


def shards_of(keys: NDArray[np.uint64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns which of `counts` shards each key belongs to, int64 [N]: ranges of keys of the same length."""
    return ((keys >> np.uint64(32)) * counts.astype(np.uint64) >> np.uint64(32)).astype(np.int64)


def shard_buckets(index: int, count: int) -> range:
    """Returns the buckets that shard `index` of `count` reads."""
    first, end = (-(-at * 2**32 // count) << 32 for at in (index, index + 1))  # keys
    return range(first // _RANGE, -(-end // _RANGE))


class StagedWriter(contextlib.ExitStack):
    """Writes the records of a part."""

    def __init__(self, part: PartFiles) -> None:
        super().__init__()
        self._part = part
        self._files: dict[int, BinaryIO] = {}

    def write(self, data: bytes, row: NDArray[Any]) -> None:
        """Appends an encoded record, and notes in its row, FACTS [], where it is."""
        bucket = int(row["key"]) // _RANGE
        if bucket not in self._files:
            self._files[bucket] = self.enter_context(_path(self._part, bucket).open("wb"))
        row["nbytes"], row["offset"], row["checksum"] = len(data), self._files[bucket].tell(), zlib.crc32(data)
        self._files[bucket].write(data)


class StagedRecords:
    """Records of all parts by number, with random access."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    def __getitem__(self, number: int) -> Record:
        """Returns a record. Raises UserError if its bytes are not those that were written."""
        part, row = self._facts.parts[self._facts.place(number)[0]], self._facts.row(number)
        path = _path(part, int(row["key"]) // _RANGE)
        with path.open("rb") as file:  # kept open, it would hold its space after it is deleted
            file.seek(int(row["offset"]))
            data = file.read(int(row["nbytes"]))
        if zlib.crc32(data) != row["checksum"]:
            raise UserError(f"{path} is damaged; remove {path.parent.parent.parent} and run the same command again")
        return decode(data)


def give_back(parts: Sequence[PartFiles], buckets: Iterable[int]) -> None:
    """Deletes the records of some buckets."""
    for bucket in buckets:
        for part in parts:
            _path(part, bucket).unlink(missing_ok=True)
