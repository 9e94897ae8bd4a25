"""The last stage: writes the kept records to shards, ordered by the hash of their keys and thus shuffled."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipelines.geometry import SIZES
from data_pipelines.preparation.duplicates import left
from data_pipelines.preparation.fingerprints import FACTS, Facts, PartFiles, save_array
from data_pipelines.preparation.split import SPLITS, in_validation
from data_pipelines.preparation.staged import StagedRecords, shard_buckets, shards_of
from data_pipelines.shards import ShardWriter, is_written, shard_path
from varedit_jax.storage.files import replacing

_SHAPE = (*SIZES, "source_turn", "target_turn")
_PLACED = np.dtype([("key", "<u8"), ("number", "<i8"), *((name, FACTS[name]) for name in _SHAPE)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """The number of shards of each split, and the records of each shard."""

    directory: pathlib.Path
    shards: dict[str, int]  # by split

    @property
    def placed(self) -> pathlib.Path:
        """Rows of _PLACED in runs, each sorted by shard."""
        return self.directory / "placed.bin"

    @property
    def offsets(self) -> pathlib.Path:
        """int64 [runs, shards of all splits + 1]: first row in `placed` of each shard's records in a run."""
        return self.directory / "offsets.npy"


def lay_out(
    directory: pathlib.Path, facts: Facts, verdicts: NDArray[np.uint8], validation: float, shard_bytes: int
) -> ShardPlan:
    """Assigns each remaining record to a shard of its split: each has a range of keys, which are hashes."""
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
            shards = starts[split] + shards_of(rows["key"], counts[split])
            order = np.lexsort((numbers, rows["key"], shards))
            placed = np.zeros(len(numbers), _PLACED)
            for name in ("key", *_SHAPE):
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
        """File of the shard."""
        return shard_path(self.output / self.split, self.name, self.index, self.plan.shards[self.split])

    def is_done(self) -> bool:
        """Returns True if the shard is complete."""
        return is_written(self.path)

    @property
    def buckets(self) -> range:
        """Buckets of the staged records that it needs."""
        return shard_buckets(self.index, self.plan.shards[self.split])


def shard_tasks(plan: ShardPlan, parts: Sequence[pathlib.Path], output: pathlib.Path, name: str) -> list[ShardTask]:
    """Returns a task per shard, in an order in which buckets are soon no longer needed."""
    tasks = [
        ShardTask(parts=tuple(parts), plan=plan, output=output, name=name, split=split, index=index)
        for split in SPLITS
        for index in range(plan.shards[split])
    ]
    return sorted(tasks, key=lambda task: (task.buckets.start, -len(task.buckets)))


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
            width, height, target_width, target_height, *turns = (int(row[name]) for name in _SHAPE)
            writer.write(records[int(row["number"])], (width, height), (target_width, target_height), tuple(turns))
