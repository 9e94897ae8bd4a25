"""Examples with random access: of the generated data set, or of prepared records. The loader reads `ExampleSource`."""

import abc
import collections
import contextlib
import functools
import io
import posixpath
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorflow_datasets.proto import tf_example_pb2

from data_pipelines.bad_records import kept_records
from data_pipelines.damage import Damaged, check_record
from data_pipelines.local_files import LocalFiles
from data_pipelines.quiet_tfds import tfds
from data_pipelines.reasons import Reason
from data_pipelines.record import BrokenRecord
from data_pipelines.shapes.builder import SPLITS, TEST_EXAMPLES, TRAIN_EXAMPLES, Shapes
from data_pipelines.shapes.edits import KINDS
from data_pipelines.shards import Records, StoredSplit, file_hash, read_index
from data_pipelines.transforms import decoded, draw_flip, fitted_pair
from varedit_jax.config import DataConfig, EditorConfig
from varedit_jax.errors import UserError
from varedit_jax.scales import aspect_templates, editor_pyramid, image_size
from varedit_jax.storage.paths import is_remote, local, resolve

Example = dict[str, Any]

_DEFAULT_DIRECTORY = "data"
_MOST_KINDS = 64  # that an evaluation tells apart: some data sets have as many as records
_SHOWN_TEXT = 120  # characters of an instruction beside its images
_RECORD_SPLITS = {"train": "train", "test": "validation"}  # on disk, by name in configs


class ExampleSource(abc.ABC):
    """Examples with random access; by default all have one size and all are used."""

    stored: tuple[StoredSplit, ...] = ()  # places on disk, in order
    read_threads = 2  # for computing features
    weights: tuple[float, ...] = (1.0,)  # of each data set: passes per epoch

    @abc.abstractmethod
    def __len__(self) -> int:
        """Returns the number of examples."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Example:
        """Returns `source` and `target`, uint8 [y, x, 3], `instruction`, and the data set's other features."""

    @abc.abstractmethod
    def instruction(self, index: int) -> str:
        """Returns the instruction of an example without decoding images."""

    def draw(self, index: int, number: int) -> Example:
        """Returns one example with the random augmentation of pass `number`. Raises Damaged."""
        del number
        return self[index]

    def name(self, index: int) -> tuple[str, str]:
        """Returns data set and id of an example, even if it cannot be read."""
        return "", str(index)

    @property
    def buckets(self) -> NDArray[np.int8]:
        """Index of each example's image size, [n]."""
        return np.zeros(len(self), np.int8)

    @property
    def datasets(self) -> NDArray[np.integer[Any]]:
        """Index of each example into `weights`, [n]."""
        return np.zeros(len(self), np.int8)

    @property
    def kept(self) -> NDArray[np.bool_] | None:
        """False for examples found to be bad, [n]; None keeps all."""
        return None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds of edits that `kind` tells apart."""
        return ()

    def kind(self, index: int) -> int:
        """Returns the number of an example's kind among `kinds`; -1 for none, or another."""
        del index
        return -1


class TfdsSource(ExampleSource):
    """A split of a prepared TFDS data set. Texts are str; images are decoded when an example is read."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str) -> None:
        """Opens the split. Raises UserError if the data set does not have it."""
        if split not in builder.info.splits:
            raise UserError(f"{builder.name} has no split {split!r}; it has {', '.join(builder.info.splits)}")
        directory = resolve(builder.data_dir)
        files = LocalFiles(directory, file_hash(directory / "dataset_info.json"))
        self.stored = (StoredSplit(files, split, ((split, builder.info.splits[split].num_examples),)),)
        self._has_kinds = "kind" in builder.info.features
        self._decoded = builder.as_data_source(split)
        # For instructions alone: decoding every feature of the record takes about five times as long.
        self._stored = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)

    def __len__(self) -> int:
        return len(self._decoded)

    def __getitem__(self, index: int) -> Example:
        record = self._decoded[index]
        return {name: value.decode() if isinstance(value, bytes) else value for name, value in record.items()}

    def instruction(self, index: int) -> str:
        """Returns the instruction of an example."""
        return self._text(index, "instruction")

    @functools.cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of edits of the generated data set; none of another."""
        return tuple(KINDS) if self._has_kinds else ()

    def kind(self, index: int) -> int:
        """Returns the number of an example's kind."""
        return self.kinds.index(self._text(index, "kind")) if self._has_kinds else -1

    def _text(self, index: int, name: str) -> str:
        example = tf_example_pb2.Example.FromString(self._stored[index])
        return example.features.feature[name].bytes_list.value[0].decode()


class RecordSource(ExampleSource):
    """Prepared records of one or several directories, concatenated, with images resized for the model."""

    def __init__(self, data: DataConfig, parts: tuple[Records, ...], sizes: Mapping[str, tuple[int, int]]) -> None:
        """Concatenates the parts.

        Args:
          data: the data section of the experiment config.
          parts: one per directory, in the order of the mixture.
          sizes: pixels (height, width) of the images of each aspect.
        """
        self.data, self.parts, self.sizes = data, parts, sizes
        self.stored = tuple(part.stored for part in parts)
        self.read_threads = data.read_threads
        self.weights = tuple(weight for _, weight in data.mixture)
        self.starts = np.cumsum([0, *(len(part) for part in parts)])  # first example of each part, and the total

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process computes its own buckets."""
        return RecordSource, (self.data, self.parts, self.sizes)

    @functools.cached_property
    def buckets(self) -> NDArray[np.int8]:
        """Index of each example into `data.aspects`, [n]: the nearest aspect."""
        ratios = np.concatenate([part.columns.height / part.columns.width for part in self.parts])
        templates = np.array([float(name) for name in self.data.aspects])
        order = np.argsort(templates)
        between = (templates[order][1:] + templates[order][:-1]) / 2
        return order[np.searchsorted(between, ratios)].astype(np.int8)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def datasets(self) -> NDArray[np.integer[Any]]:
        """Index of each example's part, [n]."""
        return np.repeat(np.arange(len(self.parts), dtype=np.int32), np.diff(self.starts))

    @functools.cached_property
    def kept(self) -> NDArray[np.bool_]:
        """False for examples that data_pipelines.check had found to be bad when it was first asked for, [n]."""
        return np.concatenate([kept_records(part) for part in self.parts])

    @functools.cached_property
    def kinds(self) -> tuple[str, ...]:
        """Names of the commonest kinds of edits over all parts; a record without one, or of another, has none."""
        counts: collections.Counter[str] = collections.Counter()
        for part in self.parts:
            codes, numbers = np.unique(part.columns.kind, return_counts=True)
            counts.update({part.columns.kinds[code]: int(number) for code, number in zip(codes, numbers, strict=True)})
        del counts[""]
        return tuple(sorted(sorted(counts, key=lambda name: (-counts[name], name))[:_MOST_KINDS]))

    def kind(self, index: int) -> int:
        """Returns the number of an example's kind among `kinds`; -1 for none of them."""
        records, row = self._find(index)
        name = records.columns.kinds[records.columns.kind[row]]
        return self._numbers.get(name, -1)

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.kinds)}

    def _find(self, index: int) -> tuple[Records, int]:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part], int(index - self.starts[part])

    def name(self, index: int) -> tuple[str, str]:
        """Returns data set and id of an example, even if the record is broken."""
        records, row = self._find(index)
        return records.dataset(row), records.id(row)

    def instruction(self, index: int) -> str:
        """Returns the instruction of an example."""
        records, row = self._find(index)
        return records.instruction(row)

    def __getitem__(self, index: int) -> Example:
        return self.read(index, flip=False)

    def draw(self, index: int, number: int) -> Example:
        """Returns one example, flipped or not as pass `number` decides. Raises Damaged."""
        flip = self.data.flip and draw_flip(self.data.seed, index, number, self.instruction(index))
        return self.read(index, flip)

    def read(self, index: int, flip: bool) -> Example:
        """Returns the instruction and both images, uint8 [h, w, 3] of the bucket's size. Raises Damaged."""
        records, row = self._find(index)
        try:
            record = records[row]
        except BrokenRecord as error:
            raise Damaged(Reason.RECORD, str(error)) from error
        size = self.sizes[self.data.aspects[self.buckets[index]]]
        images = check_record(record, lambda _, image: decoded(image))
        return {
            "instruction": record.instructions[0],
            **fitted_pair(**images, size_hw=size, resize=self.data.resize, flip=flip),
        }


def _shapes(data: DataConfig) -> tfds.core.DatasetBuilder:
    return Shapes(
        data_dir=local(data.directory or _DEFAULT_DIRECTORY, "the directory of generated data"),
        train_examples=data.train_examples or TRAIN_EXAMPLES,
        test_examples=data.eval_examples or TEST_EXAMPLES,
    )


def open_split(data: DataConfig, split: str) -> TfdsSource:
    """Opens a split (`train` or `test`) of the generated data set, prepared under `data.directory` on first use.

    Raises UserError for a split that it does not have, and for a directory that cannot be written.
    """
    if split not in SPLITS:
        raise UserError(f"{data.name} has no split {split!r}; it has {', '.join(SPLITS)}")
    try:
        builder = _shapes(data)
        _prepare(builder)
    except OSError as error:
        builder = _shapes(data)
        # Several processes may start on an unprepared directory; the first to finish wins.
        if not resolve(builder.data_dir).exists():
            raise UserError(
                f"cannot prepare {data.name} under {data.directory or _DEFAULT_DIRECTORY}: {error}; "
                f"give a writable data.directory"
            ) from error
    return TfdsSource(builder, split)


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
    """Makes the generated data set, unless it is there, and says so in place of TFDS's many words."""
    if not resolve(builder.data_dir).exists():
        print(f"making the data set {builder.name} in {builder.data_dir}", file=sys.stderr, flush=True)
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()


def image_sizes(model: EditorConfig, aspects: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Returns pixels (height, width) of a model's images by aspect.

    Raises UserError for an aspect that is not a template, and for several aspects of a model with its own pyramid.
    """
    unknown = [name for name in aspects if name not in aspect_templates()]
    if unknown:
        raise UserError(f"data.aspects has {unknown[0]!r}; templates are {', '.join(aspect_templates())}")
    if model.grids and len(aspects) > 1:
        raise UserError(f"data.aspects has {len(aspects)} templates, but a model with grids of its own has one shape")
    return {name: image_size(model, editor_pyramid(model, name)) for name in aspects}


def open_records(data: DataConfig, split: str, model: EditorConfig) -> RecordSource:
    """Opens a split (`train`, or `test`, which is `validation` on disk) of the prepared data sets of `data.mixture`.

    Images get the size that `model` works on. For `test`, data sets too small to have a `validation` are skipped if
    another has one. Raises UserError for directories that hold no such split, and as `image_sizes`.
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
    """Opens a split (`train` or `test`) of the data that `data` names, by `open_split` or `open_records`."""
    return open_records(data, split, model) if data.name == "records" else open_split(data, split)


def shown_examples(source: ExampleSource, count: int) -> list[Example]:
    """Returns the first usable examples, for sheets of samples; of records, those of aspect 1.0 with short texts.

    1.0 is the default aspect of an editor; if `data.aspects` lacks it, there are none.
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
