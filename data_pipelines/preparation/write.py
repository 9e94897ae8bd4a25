"""The last step: records that stayed, in shards whose order is that of their hashes, which is no order."""

import collections
import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from numpy.typing import NDArray

from data_pipelines.preparation.duplicates import left
from data_pipelines.preparation.fingerprints import Facts, PartFiles, save_array
from data_pipelines.preparation.split import SPLITS, in_validation
from data_pipelines.record import Record, decode
from data_pipelines.shards import ShardWriter, is_written, shard_path
from varedit_jax.storage.files import replacing

_OPEN = 128  # parts that are open at a time

_PLACED = np.dtype([("key", "<u8"), ("number", "<i8"), ("width", "<i4"), ("height", "<i4")])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """Number of shards of each split, and the records that go into each."""

    directory: pathlib.Path
    shards: dict[str, int]  # by split

    @property
    def placed(self) -> pathlib.Path:
        """Rows of _PLACED: runs, in each of which a shard's records follow one another."""
        return self.directory / "placed.bin"

    @property
    def offsets(self) -> pathlib.Path:
        """[runs, shards of all splits + 1] int64: where in `placed` each shard's records of a run begin."""
        return self.directory / "offsets.npy"


def lay_out(
    directory: pathlib.Path, facts: Facts, verdicts: NDArray[np.uint8], validation: float, shard_bytes: int
) -> ShardPlan:
    """Decides where each record that is left goes: the hash of its key says which shard of its split."""
    nbytes = np.zeros(len(SPLITS), np.int64)
    records = np.zeros(len(SPLITS), np.int64)
    for _, rows in left(facts, verdicts):
        split = in_validation(rows["original"], validation).astype(np.int64)
        nbytes += np.bincount(split, rows["nbytes"], len(SPLITS)).astype(np.int64)
        records += np.bincount(split, minlength=len(SPLITS))
    counts = np.where(records > 0, np.maximum(1, -(-nbytes // shard_bytes)), 0)
    counts = np.minimum(counts, 99_999)
    plan = ShardPlan(directory=directory, shards=dict(zip(SPLITS, counts.tolist(), strict=True)))
    starts = np.concatenate([[0], np.cumsum(counts)])
    runs = []
    with replacing(plan.placed) as file:
        for numbers, rows in left(facts, verdicts):
            split = in_validation(rows["original"], validation).astype(np.int64)
            shards = starts[split] + (rows["key"] % counts[split].astype(np.uint64)).astype(np.int64)
            order = np.lexsort((numbers, rows["key"], shards))
            placed = np.zeros(len(numbers), _PLACED)
            for name in ("key", "width", "height"):
                placed[name] = rows[name]
            placed["number"] = numbers
            runs.append(file.tell() // _PLACED.itemsize + np.searchsorted(shards[order], np.arange(starts[-1] + 1)))
            placed[order].tofile(file)
    save_array(plan.offsets, np.array(runs, np.int64))
    return plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard."""

    parts: tuple[pathlib.Path, ...]
    plan: ShardPlan
    output: pathlib.Path
    name: str
    split: str
    index: int

    @property
    def path(self) -> pathlib.Path:
        """The shard."""
        return shard_path(self.output / self.split, self.name, self.index, self.plan.shards[self.split])

    def is_done(self) -> bool:
        """Returns True if the shard is complete."""
        return is_written(self.path)


def shard_tasks(plan: ShardPlan, parts: Sequence[pathlib.Path], output: pathlib.Path, name: str) -> list[ShardTask]:
    """A task for each shard."""
    return [
        ShardTask(parts=tuple(parts), plan=plan, output=output, name=name, split=split, index=index)
        for split in SPLITS
        for index in range(plan.shards[split])
    ]


def write(task: ShardTask) -> None:
    """Writes a shard."""
    offsets = np.load(task.plan.offsets, mmap_mode="r")
    column = task.index + sum(task.plan.shards[split] for split in SPLITS[: SPLITS.index(task.split)])
    pieces = [
        np.fromfile(task.plan.placed, _PLACED, int(end - start), offset=int(start) * _PLACED.itemsize)
        for start, end in offsets[:, column : column + 2]
    ]
    placed = np.concatenate(pieces)
    placed = placed[np.lexsort((placed["number"], placed["key"]))]
    records = StagedRecords(Facts([PartFiles(directory) for directory in task.parts]))
    with ShardWriter(task.path) as writer:
        for row in placed:
            writer.write(records[int(row["number"])], (int(row["width"]), int(row["height"])))


class StagedRecords:
    """Records of all parts by their number, read in any order."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._readers: collections.OrderedDict[int, ArrayRecordReader] = collections.OrderedDict()

    def __getitem__(self, number: int) -> Record:
        part, row = self._facts.place(number)
        if part not in self._readers:
            if len(self._readers) == _OPEN:
                self._readers.popitem(last=False)[1].close()
            path = str(self._facts.parts[part].records)
            options = "readahead_buffer_size:0,max_parallelism:0"
            self._readers[part] = ArrayRecordReader(path, options, file_reader_buffer_size=32768)
        self._readers.move_to_end(part)
        [data] = self._readers[part].read([row])
        return decode(data)
