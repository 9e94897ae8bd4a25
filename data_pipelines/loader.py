"""From examples to batches: a plan gives the examples of each step (plan.py), and a Grain pipeline reads them.

A batch is a dict of arrays:

    source, target                    uint8 [B, y, x, 3]        images; or, with precomputed features,
    source_features, target_features  float32 [B, h, w, Z]
    text_features                     bfloat16 [B, T, E]        of the instruction, if these were precomputed
    text_ids                          int32 [B, T]              the instruction, padded with 0: T is `data.text_tokens`,
                                                                or, in training, one of `data.text_buckets`
    text_length                       int32 [B]                 number of tokens without padding
    example_ids                       int64 [B]                 indices of the examples in the split
    kinds                             int32 [B]                 of edits, for evaluation alone: indices into
                                                                `source.kinds`; -1 for none

A bad example never ends a run: it is counted and logged to the quarantine, and its row repeats the next usable example
of the batch (in the order of the global batch; of a later batch if it has none). `example_ids` is ~i, which is
negative, where example i stands in for another. The examples of a lost shard are bad; if the share of bad ones
exceeds `data.bad_share`, the run ends. Those listed by data_pipelines.check are not in the plan of a run that begins;
one under way may leave them out from a step on (amendments.py).
"""

import dataclasses
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np
from grain.multiprocessing import SharedMemoryArray
from numpy.typing import NDArray

from data_pipelines.amendments import Amendments, Since
from data_pipelines.damage import Damaged, Quarantine
from data_pipelines.datasets import (
    Example,
    ExampleSource,
    RecordSource,
    TfdsSource,
    open_examples,
    open_records,
    open_split,
    shown_examples,
)
from data_pipelines.features import Features
from data_pipelines.plan import InOrder, Plan, Rows, Shuffled
from data_pipelines.record import EXAMPLE_IDS
from varedit_jax.config import DataConfig
from varedit_jax.errors import UserError

__all__ = [
    "HostBatch",
    "Batches",
    "RecordSource",
    "ExampleSource",
    "TfdsSource",
    "InstructionTokenizer",
    "evaluation_batches",
    "kept_examples",
    "open_examples",
    "open_records",
    "open_split",
    "shown_examples",
    "training_batches",
]

HostBatch = dict[str, NDArray[Any]]

_CACHED_TEXTS = 200_000  # examples whose token ids a pipeline caches, about 300 bytes each
_ENDLESS = 2**48  # steps
_LATER = 100  # steps searched for a stand-in after a step without a usable example
_CHECK = "find all of them with data_pipelines.check, then resume with --apply_bad_records"
_FIRST = 1000  # examples that count as seen from the start, before which the share of bad ones means little


class InstructionTokenizer(Protocol):
    """Turns instructions into token ids."""

    def encode(self, instructions: Sequence[str], length: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Returns ids [B, length], padded with 0, and the number of tokens of each [B]."""


class _Bad(NamedTuple):
    """A bad example."""

    dataset: str
    id: str
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class _Read:
    """Maps a step to this process's rows of the batch and the bad examples among them."""

    plan: Plan
    source: ExampleSource
    vocabulary: InstructionTokenizer
    features: Features | None
    text_tokens: int
    rows: slice
    random: bool  # with random augmentation
    shared: bool  # images go into memory that another process can open, where Grain would copy them
    text_buckets: tuple[int, ...] = ()
    # Token ids without padding, by example: tokenizing would be most of the cost of a batch of features.
    # Threads may fill an entry twice, with the same value.
    tokens: dict[int, NDArray[np.int32]] = dataclasses.field(default_factory=dict)

    def __call__(self, step: int) -> tuple[HostBatch, list[_Bad]]:
        plan = self.plan(step)
        if self.features is not None:
            wanted = plan.indices[self.rows].tolist()
            batch = self.features.rows(wanted)
            batch |= self._text(plan, wanted, self.source.instruction) | self._kinds(wanted)
            if "text_features" in batch:
                batch["text_features"] = batch["text_features"][:, : batch["text_ids"].shape[1]]
            return batch | {EXAMPLE_IDS: np.array(wanted, np.int64)}, []
        return self._images(step, plan)

    def _images(self, step: int, plan: Rows) -> tuple[HostBatch, list[_Bad]]:
        count = len(plan.indices)
        own = range(count)[self.rows]
        found: dict[int, Example | _Bad] = {}  # by row of the global batch

        def example(row: int) -> Example | _Bad:
            if row not in found:
                found[row] = self._example(int(plan.indices[row]), int(plan.passes[row]))
            return found[row]

        used, bad, contents = [], [], []
        texts: dict[int, str] = {}
        for row in own:
            for other in range(row, row + count):
                content = example(other % count)
                if not isinstance(content, _Bad):
                    index = int(plan.indices[other % count])
                    break
                if other == row:
                    bad.append(content)
            else:
                index, content = self._from_later(step, plan.bucket)
            used.append(~index if isinstance(example(row), _Bad) else index)
            texts[index] = content["instruction"]
            contents.append(content)
        batch = {side: self._stacked([content[side] for content in contents]) for side in ("source", "target")}
        wanted = [index if index >= 0 else ~index for index in used]
        batch |= self._text(plan, wanted, texts.__getitem__) | self._kinds(wanted)
        return batch | {EXAMPLE_IDS: np.array(used, np.int64)}, bad

    def _kinds(self, wanted: list[int]) -> HostBatch:
        if self.random or not self.source.kinds:
            return {}
        return {"kinds": np.array([self.source.kind(index) for index in wanted], np.int32)}

    def _stacked(self, images: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        shape = (len(images), *images[0].shape)
        return np.stack(images, out=SharedMemoryArray(shape, np.uint8) if self.shared else np.empty(shape, np.uint8))

    def _from_later(self, step: int, bucket: int) -> tuple[int, Example]:
        """Returns the next usable example in later steps of the same bucket. Raises UserError if there is none."""
        end = step + _LATER if self.plan.steps is None else min(step + _LATER, self.plan.steps)
        for later in map(self.plan, range(step + 1, end)):
            for index, number in zip(later.indices.tolist(), later.passes.tolist(), strict=True):
                if later.bucket == bucket and not isinstance(content := self._example(index, number), _Bad):
                    return index, content
        raise UserError(f"no example of step {step} can be used, nor one like them of the next steps; {_CHECK}")

    def _example(self, index: int, number: int) -> Example | _Bad:
        try:
            return self.source.draw(index, number) if self.random else self.source[index]
        except Damaged as error:
            return _Bad(*self.source.name(index), str(error.reason), error.detail)

    def _text(self, plan: Rows, wanted: list[int], instruction: Callable[[int], str]) -> HostBatch:
        shown = wanted
        if self.text_buckets:  # all processes have to agree on the length, so each looks at all prompts of the batch
            shown, instruction = [*wanted, *plan.indices.tolist()], self.source.instruction
        rows = {index: self.tokens[index] for index in shown if index in self.tokens}
        missing = [index for index in dict.fromkeys(shown) if index not in rows]
        if missing:
            encoded = self.vocabulary.encode([instruction(index) for index in missing], self.text_tokens)
            rows |= {index: ids_T[:length].copy() for index, ids_T, length in zip(missing, *encoded, strict=True)}
            if len(self.tokens) < _CACHED_TEXTS:
                self.tokens.update({index: rows[index] for index in missing})
        longest = max(map(len, rows.values()))
        room = next((bucket for bucket in self.text_buckets if bucket >= longest), self.text_tokens)
        ids_BT = np.zeros((len(wanted), room), np.int32)
        for i, index in enumerate(wanted):
            ids_BT[i, : len(rows[index])] = rows[index]
        return {"text_ids": ids_BT, "text_length": np.array([len(rows[index]) for index in wanted], np.int32)}


@dataclasses.dataclass(frozen=True)
class _Plans:
    """The plans that a run may have."""

    data: DataConfig
    source: ExampleSource
    features: Features | None
    amendments: Amendments

    def current(self) -> Shuffled:
        """Returns the plan of the lists as they are. Raises UserError if no example is ever shown."""
        try:
            return self._plan(self.amendments.lists["train"])
        except ValueError as error:
            raise UserError(f"there is nothing to train on: {error}; see data.mixture") from error

    def resumed(self, step: int, digest: str) -> Shuffled:
        """Returns the plan of a run from `step` on; `digest` is of the steps before. Raises UserError as `resume`."""
        unchecked = np.ones(len(self.source), np.bool_) if self.features is None else self.features.kept
        self.amendments.resume(step, unchecked, lambda lists: self._plan(lists).digest(step) == digest)
        return self.current()

    def _plan(self, lists: Sequence[Since]) -> Shuffled:
        source, data = self.source, self.data
        first, *later = lists
        plan = Shuffled(source.buckets, source.datasets, source.weights, data.batch_size, data.seed, first.kept)
        for since in later:
            plan = plan.amended(*since)
        return plan


class Batches(grain.DatasetIterator[HostBatch]):
    """Batches by step. The state is the next step, independent of the number of threads, workers and processes."""

    def __init__(
        self,
        data: DataConfig,
        read: _Read,
        quarantine: str | os.PathLike[str] | None = None,
        plans: _Plans | None = None,
    ) -> None:
        """Sets up the iterator; reading begins with the first batch or `start_prefetch`."""
        super().__init__()
        self._data, self._read, self._plans = data, read, plans
        self._step = 0
        self._seen = 0  # examples of this process
        self._quarantine = Quarantine(quarantine)
        self._path = quarantine
        self._running: list[Any] = []  # the pipeline from the next step on, if started
        # Workers that outlive the program complain about every batch they have ready.
        weakref.finalize(self, _close, self._running)

    def _pipeline(self) -> Any:
        if self._running:
            return self._running[0]
        data = self._data
        threads, ahead = data.read_threads, data.prefetch_batches
        if data.workers:  # all of them together have `prefetch_batches` ready
            threads = ahead = 0 if _reads_alone(data) else threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        end = self._read.plan.steps
        steps = grain.MapDataset.range(self._step, _ENDLESS if end is None else max(end, self._step))
        read = steps.map(self._read).to_iter_dataset(options)
        if data.workers:
            ready = max(1, data.prefetch_batches // data.workers)
            read = read.mp_prefetch(grain.MultiprocessingOptions(data.workers, per_worker_buffer_size=ready))
        self._running.append(iter(read))
        return self._running[0]

    def __next__(self) -> HostBatch:
        """Returns the next batch. Raises UserError if the share of bad examples exceeds `data.bad_share`."""
        self._assert_not_closed()
        if self._plans is not None and not self._seen:
            self._plans.amendments.write()
        batch, bad = next(self._pipeline())
        self._step += 1
        self._seen += len(batch[EXAMPLE_IDS])
        for example in bad:
            self._quarantine.add(**example._asdict())
        count = self._quarantine.counts.total()
        if bad and count > self._data.bad_share * max(self._seen, _FIRST):
            where = f"; {self._path} has their names" if self._path else ""
            raise UserError(
                f"{count} of {self._seen} examples could not be used ({self._quarantine.summary()}), more than "
                f"data.bad_share={self._data.bad_share:g}{where}; {_CHECK}"
            )
        return batch

    def metrics(self) -> dict[str, float]:
        """Returns counts of bad examples since this process started, by reason."""
        counts = self._quarantine.counts
        return {f"data/bad/{reason.replace(' ', '_')}": float(count) for reason, count in sorted(counts.items())}

    def digest(self) -> str:
        """Returns what processes have in common that read the same data by the same plan."""
        lists = "" if self._plans is None else self._plans.amendments.text()
        return f"{self._read.plan.digest()} {lists}"

    def get_state(self) -> dict[str, Any]:
        """Returns the next step and the digest of the plan of the steps before."""
        return {"next_step": self._step, "plan": self._read.plan.digest(self._step)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes at a step. Raises UserError if the state is of other data, or as `Amendments.resume`."""
        step, digest = int(state["next_step"]), str(state["plan"])
        if self._plans is not None:
            self._read = dataclasses.replace(self._read, plan=self._plans.resumed(step, digest))
        elif digest != self._read.plan.digest(step):
            raise UserError(f"the examples of {self._data.name} are not those of the state")
        _close(self._running)
        self._step = step

    def start_prefetch(self) -> None:
        """Starts reading."""
        self._pipeline().start_prefetch()

    def close(self) -> None:
        """Stops workers and threads."""
        if not self._closed:
            _close(self._running)
            self._quarantine.close()
        super().close()


def _reads_alone(data: DataConfig) -> bool:
    """Returns True if a worker reads without further threads: batches handed over at once can be in shared memory.

    Those that a thread has ready when the worker is stopped would stay there.
    """
    return data.workers > 0 and data.read_threads <= 1


def _close(running: list[Any]) -> None:
    """Stops the threads and workers of a pipeline."""
    while running:
        running.pop().close()


def _own_rows(
    data: DataConfig, source: ExampleSource, features: Features | None, process_index: int, process_count: int
) -> slice:
    """Returns this process's rows of a batch. Raises UserError for arguments that do not fit together."""
    if not 0 <= process_index < process_count:
        raise ValueError(f"process {process_index} of {process_count} does not exist")
    if data.batch_size % process_count:
        raise UserError(
            f"data.batch_size {data.batch_size} does not divide over {process_count} processes; "
            f"give a multiple of {process_count}"
        )
    if features is not None and len(features.kept) != len(source):
        raise UserError(
            f"there are features of {len(features.kept)} examples, but {len(source)} examples; "
            f"compute the features of this split"
        )
    count = data.batch_size // process_count
    return slice(process_index * count, (process_index + 1) * count)


def kept_examples(source: ExampleSource, features: Features | None) -> NDArray[np.bool_]:
    """Returns [n], False for examples that are left out: found to be bad, or without features."""
    kept = np.ones(len(source), np.bool_) if source.kept is None else source.kept
    return kept if features is None else kept & features.kept


def training_batches(
    data: DataConfig,
    vocabulary: InstructionTokenizer,
    source: ExampleSource,
    features: Features | None = None,
    process_index: int = 0,
    process_count: int = 1,
    quarantine: str | os.PathLike[str] | None = None,
    amendments: Amendments | None = None,
) -> Batches:
    """Returns endless batches for training, in an order determined by `data.seed` and the data alone (plan.py).

    A process gets `data.batch_size / process_count` rows of a step's batch; together, the processes get the rows that
    a single one would, in the same order. The iterator's state (`get_state`, `set_state`) is the next step, so a run
    resumes with any number of processes and workers. With `features`, no image is decoded. Steps before an amendment
    have the batches that they had.

    Args:
      data: the data section of the experiment config.
      vocabulary: tokenizer of the instructions.
      source: from `open_split` or `open_records`.
      features: precomputed for all examples of `source`, or None for batches of images.
      process_index, process_count: select this process's rows.
      quarantine: JSONL file that lists bad examples, one per process.
      amendments: of the run, with a split `train`; None for a run without a record.

    Raises UserError if the batch does not divide over the processes, if there are fewer examples than a batch, or if
    the features are of another number of examples.
    """
    rows = _own_rows(data, source, features, process_index, process_count)
    if len(source) < data.batch_size:
        raise UserError(
            f"data.batch_size is {data.batch_size}, but {data.name} has only {len(source)} examples in this split; "
            f"give a smaller batch or a larger data set"
        )
    plans = _Plans(data, source, features, amendments or Amendments({"train": kept_examples(source, features)}))
    read = _Read(
        plans.current(),
        source,
        vocabulary,
        features,
        data.text_tokens,
        rows,
        True,
        _reads_alone(data),
        data.text_buckets,
    )
    return Batches(data, read, quarantine, plans)


def evaluation_batches(
    data: DataConfig,
    vocabulary: InstructionTokenizer,
    source: ExampleSource,
    features: Features | None = None,
    process_index: int = 0,
    process_count: int = 1,
    kept: NDArray[np.bool_] | None = None,
) -> Batches:
    """Returns batches of the examples in stored order, once, without flips.

    Only full batches of each bucket, so that all processes take equally many steps of one shape: of n examples of one
    bucket the first `n - n % data.batch_size`. Example i of a single process and bucket is row `i % B` of batch
    `i // B`. If no bucket fills a batch, there is one batch, which repeats the largest bucket's examples. `kept`
    [n] is False for examples that are left out, as `kept_examples` by default; the other arguments are those of
    `training_batches`.

    Raises UserError if the batch does not divide over the processes, if no example can be used, or if the features are
    of another number of examples.
    """
    rows = _own_rows(data, source, features, process_index, process_count)
    plan = InOrder(source.buckets, data.batch_size, kept_examples(source, features) if kept is None else kept)
    if not plan.steps:
        raise UserError(
            f"none of the {len(source)} held-out examples can be used; prepare more of them, by --validation"
        )
    read = _Read(plan, source, vocabulary, features, data.text_tokens, rows, False, _reads_alone(data))
    return Batches(data, read)
