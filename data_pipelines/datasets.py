"""Examples that can be read in any order: of the generated data set, or of prepared records.

The loader needs `ExampleSource` of them.
"""

import abc
import contextlib
import functools
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from numpy.typing import NDArray
from tensorflow_datasets.proto import tf_example_pb2

from data_pipelines.bad_records import kept_records
from data_pipelines.damage import Damaged, check_record
from data_pipelines.local_files import LocalFiles
from data_pipelines.reasons import Reason
from data_pipelines.record import BrokenRecord
from data_pipelines.shapes.builder import SPLITS, TEST_EXAMPLES, TRAIN_EXAMPLES, Shapes
from data_pipelines.shards import Records, StoredSplit, file_hash, read_index
from data_pipelines.transforms import draw_flip, fitted
from varedit_jax.config import DataConfig, EditorConfig
from varedit_jax.errors import UserError
from varedit_jax.scales import aspect_templates, editor_pyramid, image_size
from varedit_jax.storage.paths import is_remote, local, resolve

Example = dict[str, Any]

_DEFAULT_DIRECTORY = "data"
_SHOWN_TEXT = 120  # characters of an instruction beside its images
_RECORD_SPLITS = {"train": "train", "test": "validation"}  # of prepared records, by what they are called elsewhere


class ExampleSource(abc.ABC):
    """Examples that can be read in any order, by default all of one size and in use."""

    stored: tuple[StoredSplit, ...] = ()  # where they lie, one after the other
    read_threads = 2  # that read when features are computed
    weights: tuple[float, ...] = (1.0,)  # of each data set: times that an epoch shows each of its examples

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Example:
        """One example: `source` and `target`, uint8 [y, x, 3], `instruction`, and what else the data set has."""

    @abc.abstractmethod
    def instruction(self, index: int) -> str:
        """The instruction of an example; cheap, as no image is decoded."""

    def draw(self, index: int, number: int) -> Example:
        """One example in its pass `number`, with what is random about it. Raises Damaged."""
        del number
        return self[index]

    def name(self, index: int) -> tuple[str, str]:
        """Data set and id of an example, known even where it cannot be read."""
        return "", str(index)

    @property
    def buckets(self) -> NDArray[np.int8]:
        """[n] index of the size of each example's images."""
        return np.zeros(len(self), np.int8)

    @property
    def datasets(self) -> NDArray[np.integer[Any]]:
        """[n] index into `weights`."""
        return np.zeros(len(self), np.int8)

    @property
    def kept(self) -> NDArray[np.bool_] | None:
        """[n], False for those found to be bad; None keeps all."""
        return None


class TfdsSource(ExampleSource):
    """A split of a prepared TFDS data set. Texts are str; images are decoded when an example is read."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str) -> None:
        """Raises UserError for a split that the data set does not have."""
        if split not in builder.info.splits:
            raise UserError(f"{builder.name} has no split {split!r}; it has {', '.join(builder.info.splits)}")
        directory = resolve(builder.data_dir)
        files = LocalFiles(directory, file_hash(directory / "dataset_info.json"))
        self.stored = (StoredSplit(files, split, ((split, builder.info.splits[split].num_examples),)),)
        self._decoded = builder.as_data_source(split)
        # For instructions alone. TFDS would decode every feature of the record, which takes about five times as long.
        self._stored = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._decoded)

    def __getitem__(self, index: int) -> Example:
        """One example; all that TFDS stores as bytes is text here."""
        record = self._decoded[index]
        return {name: value.decode() if isinstance(value, bytes) else value for name, value in record.items()}

    def instruction(self, index: int) -> str:
        """The instruction of an example."""
        example = tf_example_pb2.Example.FromString(self._stored[index])
        return example.features.feature["instruction"].bytes_list.value[0].decode()


class RecordSource(ExampleSource):
    """Prepared records of one or several directories, one after the other, their images brought to the model's size."""

    def __init__(self, data: DataConfig, parts: tuple[Records, ...], sizes: Mapping[str, tuple[int, int]]) -> None:
        """Puts every example into its bucket.

        Args:
          data: the config's part about data.
          parts: a directory each, in the order of the mixture.
          sizes: pixels (height, width) of the images of each aspect.
        """
        self.data, self.parts, self.sizes = data, parts, sizes
        self.stored = tuple(part.stored for part in parts)
        self.read_threads = data.read_threads
        self.weights = tuple(weight for _, weight in data.mixture)
        self.starts = np.cumsum([0, *(len(part) for part in parts)])  # first example of each part, and number of all
        self._buckets = self._find_buckets()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process finds its own buckets."""
        return RecordSource, (self.data, self.parts, self.sizes)

    @property
    def buckets(self) -> NDArray[np.int8]:
        """[n] index into `data.aspects`."""
        return self._buckets

    def _find_buckets(self) -> NDArray[np.int8]:
        ratios = np.concatenate([part.columns.height / part.columns.width for part in self.parts])
        templates = np.array([float(name) for name in self.data.aspects])
        order = np.argsort(templates)
        between = (templates[order][1:] + templates[order][:-1]) / 2
        return order[np.searchsorted(between, ratios)].astype(np.int8)

    def __len__(self) -> int:
        """Number of examples."""
        return int(self.starts[-1])

    @property
    def datasets(self) -> NDArray[np.integer[Any]]:
        """[n] index of the part that an example is of."""
        return np.repeat(np.arange(len(self.parts), dtype=np.int32), np.diff(self.starts))

    @property
    def kept(self) -> NDArray[np.bool_]:
        """False for those that data_pipelines.check found to be bad, [n]."""
        return np.concatenate([kept_records(part) for part in self.parts])

    def _find(self, index: int) -> tuple[Records, int]:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part], int(index - self.starts[part])

    def name(self, index: int) -> tuple[str, str]:
        """Data set and id of an example, known even where the record is broken."""
        records, row = self._find(index)
        return records.dataset(row), records.id(row)

    def instruction(self, index: int) -> str:
        """The instruction of an example."""
        records, row = self._find(index)
        return records.instruction(row)

    def __getitem__(self, index: int) -> Example:
        """One example, as it is without anything random."""
        return self.read(index, flip=False)

    def draw(self, index: int, number: int) -> Example:
        """One example in its pass `number`, with what is random about it. Raises Damaged."""
        flip = self.data.flip and draw_flip(self.data.seed, index, number, self.instruction(index))
        return self.read(index, flip)

    def read(self, index: int, flip: bool) -> Example:
        """Images uint8 [h, w, 3] of the size of the example's bucket, and the instruction. Raises Damaged."""
        records, row = self._find(index)
        try:
            record = records[row]
        except BrokenRecord as error:
            raise Damaged(Reason.RECORD, str(error)) from error
        size = self.sizes[self.data.aspects[self.buckets[index]]]
        images = check_record(record, lambda _, image: fitted(image, size, self.data.resize, flip))
        return {"instruction": record.instructions[0], **images}


def _shapes(data: DataConfig) -> tfds.core.DatasetBuilder:
    return Shapes(
        data_dir=local(data.directory or _DEFAULT_DIRECTORY, "the directory of generated data"),
        train_examples=data.train_examples or TRAIN_EXAMPLES,
        test_examples=data.eval_examples or TEST_EXAMPLES,
    )


def open_split(data: DataConfig, split: str) -> TfdsSource:
    """Split `split` (`train` or `test`) of the generated data set, prepared under `data.directory` on first use.

    Raises UserError for a split that it does not have, and for a directory that cannot be written.
    """
    if split not in SPLITS:
        raise UserError(f"{data.name} has no split {split!r}; it has {', '.join(SPLITS)}")
    make = functools.partial(_shapes, data)
    try:
        builder = make()
        builder.download_and_prepare()
    except OSError as error:
        builder = make()
        # Several processes may start on an unprepared directory; the first to finish wins.
        if not resolve(builder.data_dir).exists():
            raise UserError(
                f"cannot prepare {data.name} under {data.directory or _DEFAULT_DIRECTORY}: {error}; "
                f"give a writable data.directory"
            ) from error
    return TfdsSource(builder, split)


def image_sizes(model: EditorConfig, aspects: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Pixels (height, width) of a model's images of each aspect.

    Raises UserError for aspects that are no templates, or that a model with a pyramid of its own does not have.
    """
    unknown = [name for name in aspects if name not in aspect_templates()]
    if unknown:
        raise UserError(f"data.aspects has {unknown[0]!r}; templates are {', '.join(aspect_templates())}")
    if model.grids and len(aspects) > 1:
        raise UserError(f"data.aspects has {len(aspects)} templates, but a model with grids of its own has one shape")
    return {name: image_size(model, editor_pyramid(model, name)) for name in aspects}


def open_records(data: DataConfig, split: str, model: EditorConfig) -> RecordSource:
    """Split `split` (`train` or `test`, which is `validation` on disk) of the prepared data sets of `data.mixture`.

    Images get the size that `model` works on. A data set may be too small to have a `validation`; it is passed over
    in `test` if another has one. Raises UserError for directories that hold no such split, and as `image_sizes`.
    """
    if split not in _RECORD_SPLITS:
        raise UserError(f"prepared records have no split {split!r}; they have {', '.join(_RECORD_SPLITS)}")
    directories = [
        name if is_remote(name) or not data.directory else posixpath.join(data.directory, name)
        for name, _ in data.mixture
    ]
    name = _RECORD_SPLITS[split]
    if split == "test":
        directories = [directory for directory in directories if name in read_index(directory)["splits"]]
        if not directories:
            raise UserError(
                f"none of the data sets of data.mixture has a split {name!r}; prepare one with a larger --validation"
            )
    parts = tuple(Records(directory, name, data.cache_directory) for directory in directories)
    return RecordSource(data, parts, image_sizes(model, data.aspects))


def open_examples(data: DataConfig, split: str, model: EditorConfig) -> TfdsSource | RecordSource:
    """Split `split` (`train` or `test`) of what `data` names, as `open_split` and `open_records`."""
    return open_records(data, split, model) if data.name == "records" else open_split(data, split)


def shown_examples(source: ExampleSource, count: int) -> list[Example]:
    """The first examples that can be used, for sheets of samples; of records, those of aspect 1.0 with short texts.

    That aspect is what an editor works on if it is not told another; there are none where `data.aspects` lacks it.
    """
    if not isinstance(source, RecordSource):
        return [source[index] for index in range(min(count, len(source)))]
    found: list[Example] = []
    square = source.data.aspects.index("1.0") if "1.0" in source.data.aspects else -1
    for index in np.flatnonzero(source.kept & (source.buckets == square)).tolist():
        if len(found) == count:
            break
        with contextlib.suppress(Damaged):
            if len(source.instruction(index)) <= _SHOWN_TEXT:
                found.append(source[index])
    return found
