"""From a prepared data set to batches: a Grain pipeline of indices, shuffled, and one read for each batch.

A batch is a dict of arrays:

    source, target                    uint8 [B, y, x, 3]        pictures; or, with precomputed features,
    source_features, target_features  float32 [B, h, w, Z]
    text_ids                          int32 [B, T]              the instruction, padded with 0
    text_length                       int32 [B]                 its tokens without the padding
    example_ids                       int64 [B]                 which examples of the split these are
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grain
import numpy as np
import tensorflow_datasets as tfds
from numpy.typing import NDArray
from tensorflow_datasets.proto import tf_example_pb2

from data_pipelines.features import Features
from data_pipelines.shapes.builder import SPLITS, TEST_EXAMPLES, TRAIN_EXAMPLES, Shapes
from varedit_jax.config import DataConfig
from varedit_jax.errors import UserError
from varedit_jax.training.replay import EXAMPLE_IDS

Batch = dict[str, NDArray[Any]]
Record = dict[str, Any]

_DEFAULT_DIRECTORY = "data"
_CACHED_TEXTS = 200_000  # examples whose token ids a pipeline keeps, about 300 bytes each


class Vocabulary(Protocol):
    """Turns instructions into token ids."""

    def encode(self, instructions: Sequence[str], length: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Ids [B, length], padded with 0, and the number of tokens of each [B]."""


class Source(Protocol):
    """Examples that can be read in any order."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int) -> Record:
        """One example: `source` and `target`, uint8 [y, x, 3], `instruction`, and what else the data set has."""

    def instruction(self, index: int) -> str:
        """The instruction of an example; cheap, as no picture is decoded."""


class TfdsSource:
    """A split of a prepared TFDS data set. Texts are str; pictures are decoded when an example is read."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str) -> None:
        """Raises UserError for a split that the data set does not have."""
        if split not in builder.info.splits:
            raise UserError(f"{builder.name} has no split {split!r}; it has {', '.join(builder.info.splits)}")
        self.directory = str(builder.data_dir)  # of the prepared data set
        self._decoded = builder.as_data_source(split)
        # For instructions alone. TFDS would decode every feature of the record, which takes about five times as long.
        self._stored = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._decoded)

    def __getitem__(self, index: int) -> Record:
        """One example; all that TFDS stores as bytes is text here."""
        record = self._decoded[index]
        return {name: value.decode() if isinstance(value, bytes) else value for name, value in record.items()}

    def instruction(self, index: int) -> str:
        """The instruction of an example."""
        example = tf_example_pb2.Example.FromString(self._stored[index])
        return example.features.feature["instruction"].bytes_list.value[0].decode()


def _shapes(data: DataConfig) -> tfds.core.DatasetBuilder:
    return Shapes(
        data_dir=data.directory or _DEFAULT_DIRECTORY,
        train_examples=data.train_examples or TRAIN_EXAMPLES,
        test_examples=data.eval_examples or TEST_EXAMPLES,
    )


_BUILDERS = {"shapes": _shapes}


def open_split(data: DataConfig, split: str) -> TfdsSource:
    """Split `split` (`train` or `test`) of the data set, which is prepared under `data.directory` on first use.

    Raises UserError for an unknown data set or split, and for a directory that cannot be written.
    """
    if data.name not in _BUILDERS:
        raise UserError(f"unknown data set {data.name!r} in data.name; known are {', '.join(_BUILDERS)}")
    if split not in SPLITS:
        raise UserError(f"{data.name} has no split {split!r}; it has {', '.join(SPLITS)}")
    make = functools.partial(_BUILDERS[data.name], data)
    try:
        builder = make()
        builder.download_and_prepare()
    except OSError as error:
        builder = make()
        # Several processes may start on an unprepared directory; the first to finish wins.
        if not pathlib.Path(builder.data_dir).exists():
            raise UserError(
                f"cannot prepare {data.name} under {data.directory or _DEFAULT_DIRECTORY}: {error}; "
                f"give a writable data.directory"
            ) from error
    return TfdsSource(builder, split)


@dataclasses.dataclass(frozen=True)
class _ReadBatch:
    """Indices [B] to the batch of these examples."""

    source: Source
    vocabulary: Vocabulary
    features: Features | None
    text_tokens: int
    # Token ids, without padding, of examples read so far: most of the cost of a batch of features would be its text.
    # Threads may fill an entry twice, with the same value.
    tokens: dict[int, NDArray[np.int32]] = dataclasses.field(default_factory=dict)

    def __call__(self, indices: NDArray[np.integer[Any]]) -> Batch:
        wanted = [int(index) for index in indices]
        if self.features is None:
            records = {index: self.source[index] for index in wanted}
            batch = {side: np.stack([records[index][side] for index in wanted]) for side in ("source", "target")}
            return batch | self._text(wanted, lambda index: records[index]["instruction"]) | _ids(wanted)
        batch = {
            "source_features": np.asarray(self.features.source[wanted]),
            "target_features": np.asarray(self.features.target[wanted]),
        }
        return batch | self._text(wanted, self.source.instruction) | _ids(wanted)

    def _text(self, wanted: list[int], instruction: Callable[[int], str]) -> Batch:
        rows = {index: self.tokens[index] for index in wanted if index in self.tokens}
        missing = [index for index in wanted if index not in rows]
        if missing:
            encoded = self.vocabulary.encode([instruction(index) for index in missing], self.text_tokens)
            rows |= {index: ids_T[:length].copy() for index, ids_T, length in zip(missing, *encoded, strict=True)}
            if len(self.tokens) < _CACHED_TEXTS:
                self.tokens.update({index: rows[index] for index in missing})
        ids_BT = np.zeros((len(wanted), self.text_tokens), np.int32)
        for i, index in enumerate(wanted):
            ids_BT[i, : len(rows[index])] = rows[index]
        return {"text_ids": ids_BT, "text_length": np.array([len(rows[index]) for index in wanted], np.int32)}


def _ids(wanted: list[int]) -> Batch:
    return {EXAMPLE_IDS: np.array(wanted, np.int64)}


def _check(data: DataConfig, source: Source, features: Features | None, process_index: int, process_count: int) -> None:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process {process_index} of {process_count} does not exist")
    if data.batch_size % process_count:
        raise UserError(
            f"data.batch_size {data.batch_size} does not divide over {process_count} processes; "
            f"give a multiple of {process_count}"
        )
    if len(source) < data.batch_size:
        raise UserError(
            f"data.batch_size is {data.batch_size}, but {data.name} has only {len(source)} examples in this split; "
            f"give a smaller batch or a larger data set"
        )
    if features is not None:
        for side, array in features._asdict().items():
            if len(array) != len(source):
                raise UserError(
                    f"there are {side} features of {len(array)} examples, but {len(source)} examples; "
                    f"compute the features of this split"
                )


def _batches(
    indices: grain.MapDataset[int], data: DataConfig, read: _ReadBatch, process_index: int, process_count: int
) -> grain.DatasetIterator[Batch]:
    """Batches of the examples at `indices`: of each, consecutive rows for every process, in their order."""
    rows = data.batch_size // process_count
    local = indices.batch(data.batch_size, drop_remainder=True).map(
        lambda batch: batch[process_index * rows : (process_index + 1) * rows]
    )
    options = grain.ReadOptions(num_threads=data.read_threads, prefetch_buffer_size=data.prefetch_batches)
    return iter(local.map(read).to_iter_dataset(options))


def training_batches(
    data: DataConfig,
    vocabulary: Vocabulary,
    source: Source,
    features: Features | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Endless batches for training: the examples of each epoch in an order of its own, given by `data.seed`.

    A process gets `data.batch_size / process_count` rows of a step's batch; together, the processes get the rows that
    a single one would, in their order. The iterator's state (`get_state`, `set_state`) holds all that is needed to go
    on exactly. Epochs follow each other without a gap, so no example is left out. With `features`, no picture is
    decoded. Raises UserError if the batch does not divide over the processes, if there are fewer examples than a batch,
    or if the features are of another number of examples.
    """
    _check(data, source, features, process_index, process_count)
    indices = grain.MapDataset.range(len(source)).seed(data.seed).shuffle().repeat()
    read = _ReadBatch(source, vocabulary, features, data.text_tokens)
    return _batches(indices, data, read, process_index, process_count)


def evaluation_batches(
    data: DataConfig,
    vocabulary: Vocabulary,
    source: Source,
    features: Features | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Batches of the examples in their stored order, once: the first `n - n % data.batch_size` of n examples.

    Whole batches only, so that all processes take equally many steps of one shape. Example i of a single process is
    row `i % B` of batch `i // B`. Arguments and errors as of `training_batches`.
    """
    _check(data, source, features, process_index, process_count)
    indices = grain.MapDataset.range(len(source) - len(source) % data.batch_size)
    read = _ReadBatch(source, vocabulary, features, data.text_tokens)
    return _batches(indices, data, read, process_index, process_count)
