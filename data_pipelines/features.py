"""Precomputed features of a data set: the outputs of the frozen tokenizer and text encoder for every example.

They are stored beside the data, two files per shard:

    DIRECTORY/features/NAME/features.json     the weights and settings they depend on; NAME is a hash of these
    DIRECTORY/features/NAME/SPLIT/SHARD.TYPE  per example source [h, w, Z], target [h, w, Z], text [T, E], concatenated
    DIRECTORY/features/NAME/SPLIT/SHARD.npy   int64 [n, 6]: offset, h, w, Z, T, E; -1 for bad examples

Any number of processes can compute shards. A shard appears complete or not at all, and an existing one is kept.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, Literal, NamedTuple

import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy
import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_pipelines.damage import SIDES, Damaged
from data_pipelines.datasets import Example, ExampleSource
from data_pipelines.local_files import LocalFiles
from data_pipelines.shards import StoredSplit
from varedit_jax.errors import UserError
from varedit_jax.progress import Progress
from varedit_jax.storage.disk import explained, read_explained
from varedit_jax.storage.files import make_directory, replacing, write_json
from varedit_jax.storage.paths import child_names, size

MANIFEST = "features.json"
DIRECTORY = "features"

EncodeImages = Callable[[NDArray[np.uint8]], ArrayLike]  # [B, H, W, 3] -> [B, h, w, Z]
EncodeText = Callable[[Sequence[str]], tuple[ArrayLike, NDArray[np.int32]]]  # B texts -> [B, T, E], tokens of each [B]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadeBy:
    """The weights and settings that determine features, apart from the data."""

    tokenizer: str  # hash of the weights that encode images
    text: str  # hash of the weights that encode instructions; "" where only images are encoded
    text_tokens: int  # instructions are cut to this length
    sizes: dict[str, tuple[int, int]]  # pixels (height, width) of each aspect
    resize: str  # method of resizing images
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # on disk

    def values(self) -> dict[str, Any]:
        """Returns the fields as JSON values, without a dtype of bfloat16, which older manifests do not name."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        return {name: value for name, value in values.items() if (name, value) != ("dtype", "bfloat16")}

    @property
    def name(self) -> str:
        """Name of the directory."""
        return hashlib.sha256(json.dumps(self.values(), sort_keys=True).encode()).hexdigest()[:16]


class _Shard(NamedTuple):
    files: LocalFiles
    numbers: str  # file names
    table: str
    rows: range  # examples of the source

    def path(self, name: str) -> pathlib.Path:
        """Returns the path at which a file is written."""
        return self.files.directory / name


def _shards(source: ExampleSource, made_by: MadeBy) -> list[_Shard]:
    shards, start = [], 0
    for stored in source.stored:
        for shard, count in stored.shards:
            name = f"{DIRECTORY}/{made_by.name}/{stored.split}/{shard}"
            rows = range(start, start + count)
            shards.append(_Shard(stored.files, f"{name}.{made_by.dtype}", f"{name}.npy", rows))
            start += count
    return shards


def precompute(
    source: ExampleSource,
    made_by: MadeBy,
    encode: EncodeImages,
    encode_text: EncodeText | None,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> int:
    """Computes the missing ones among every `process_count`-th shard; returns the number of shards written.

    Both encoders get full batches of one shape; the last one is padded. Raises UserError if a feature is not finite,
    the disk is full, or features of other data are there.
    """
    for stored in source.stored:
        _write_manifest(stored, made_by)
    shards = _shards(source, made_by)[process_index::process_count]
    todo = [shard for shard in shards if not shard.path(shard.table).exists()]
    with Progress(total=sum(len(shard.rows) for shard in todo), desc="features", unit="example") as progress:
        for shard in todo:
            numbers, table = shard.path(shard.numbers), shard.path(shard.table)
            make_directory(table.parent)
            with explained("features", table.parent):
                with replacing(numbers) as file:
                    writer = _Writer(file, made_by.dtype, encode, encode_text, batch_size)
                    entries = writer.write(source, shard.rows, progress)
                with replacing(table) as file:
                    np.save(file, entries)
    return len(todo)


class _Writer(NamedTuple):
    file: BinaryIO
    dtype: str
    encode: EncodeImages
    encode_text: EncodeText | None
    batch_size: int

    def write(self, source: ExampleSource, rows: range, progress: Any) -> NDArray[np.int64]:
        """Writes the features of some examples; returns their rows of the table, int64 [n, 6]."""
        table = np.full((len(rows), 6), -1, np.int64)
        at = 0
        for indices, examples in _read(source, rows, self.batch_size):
            for index, pieces in zip(indices, self._pieces(examples), strict=False):
                if not all(np.isfinite(piece.astype(np.float32)).all() for piece in pieces):
                    raise UserError(f"features of example {index} are not finite; check the encoders' weights")
                table[index - rows.start] = at, *pieces[0].shape, *pieces[2].shape
                for piece in pieces:
                    self.file.write(piece.astype(self.dtype).tobytes())
                    at += piece.size
            progress.update(len(examples))
        return table

    def _pieces(self, examples: list[Example]) -> Iterator[tuple[NDArray[Any], ...]]:
        """Yields features of source, target and text per example; the last example pads the batch."""
        if not examples:
            return
        filled = [*examples, *[examples[-1]] * (self.batch_size - len(examples))]
        source, target = (np.asarray(self.encode(np.stack([example[side] for example in filled]))) for side in SIDES)
        texts, lengths = np.zeros((self.batch_size, 0, 0), np.float32), np.zeros(self.batch_size, np.int32)
        if self.encode_text is not None:
            encoded, lengths = self.encode_text([example["instruction"] for example in filled])
            texts = np.asarray(encoded)
        for row in range(self.batch_size):
            yield source[row], target[row], texts[row, : lengths[row]]


def _read(source: ExampleSource, rows: range, batch_size: int) -> Iterator[tuple[list[int], list[Example]]]:
    """Yields examples in batches of one bucket, with their indices, without bad ones."""

    def load(index: int) -> Example | None:
        try:
            return source[index]
        except Damaged:
            return None

    buckets = source.buckets[rows.start : rows.stop]
    batches = []
    for bucket in np.unique(buckets):
        members = rows.start + np.flatnonzero(buckets == bucket)
        batches += [members[start : start + batch_size].tolist() for start in range(0, len(members), batch_size)]
    with concurrent.futures.ThreadPoolExecutor(max(1, source.read_threads)) as pool:
        ahead = [[pool.submit(load, index) for index in indices] for indices in batches[:2]]
        for number, indices in enumerate(batches):
            loaded = [future.result() for future in ahead.pop(0)]
            if number + 2 < len(batches):
                ahead.append([pool.submit(load, index) for index in batches[number + 2]])
            good = [(index, example) for index, example in zip(indices, loaded, strict=True) if example is not None]
            yield [index for index, _ in good], [example for _, example in good]


class Features:
    """The features of all examples of a source, memory-mapped."""

    def __init__(self, source: ExampleSource, made_by: MadeBy) -> None:
        """Opens them. Raises UserError if there are none for these weights and settings, or if some are missing."""
        self._source, self._made_by = source, made_by
        for stored in source.stored:
            _check_manifest(stored, made_by)
        self._shards = _shards(source, made_by)
        self._starts = np.array([shard.rows.start for shard in self._shards])
        self._table = np.concatenate([_read_table(shard) for shard in self._shards])
        self._maps: dict[int, NDArray[Any]] = {}
        self.kept: NDArray[np.bool_] = self._table[:, 0] >= 0  # [n], False for bad examples

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens its own."""
        return Features, (self._source, self._made_by)

    def rows(self, indices: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Returns `source_features` and `target_features` of a batch, float32 [B, h, w, Z].

        If text was encoded, also `text_features` [B, T, E], of the type on disk, zero after the last token.
        """
        pieces = [self._row(index) for index in indices]
        batch: dict[str, NDArray[Any]] = {
            f"{side}_features": np.stack([piece[k] for piece in pieces]).astype(np.float32)
            for k, side in enumerate(SIDES)
        }
        if self._made_by.text:
            width = pieces[0][2].shape[-1]
            batch["text_features"] = np.zeros((len(pieces), self._made_by.text_tokens, width), self._made_by.dtype)
            for row, (_, _, text) in enumerate(pieces):
                batch["text_features"][row, : len(text)] = text
        return batch

    def _row(self, index: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        numbers = self._maps.get(shard)
        if numbers is None:
            files, name, _, rows = self._shards[shard]
            _check_numbers(self._shards[shard], self._table[rows.start : rows.stop])  # lost since the run began
            numbers = self._maps[shard] = np.memmap(files.get(name), self._made_by.dtype, "r")
        at, h, w, channels, tokens, width = self._table[index].tolist()
        shapes = (h, w, channels), (h, w, channels), (tokens, width)
        ends = at + np.cumsum([0, *(math.prod(shape) for shape in shapes)])
        source, target, text = (
            numbers[begin:end].reshape(shape) for begin, end, shape in zip(ends[:-1], ends[1:], shapes, strict=True)
        )
        return source, target, text


def _read_table(shard: _Shard) -> NDArray[np.int64]:
    """Returns the table of a shard, int64 [n, 6]. Raises UserError if the shard is missing or truncated."""
    path = shard.path(shard.table).with_suffix("")
    try:
        with read_explained(str(path)):
            table = np.load(shard.files.get(shard.table))
    except UserError:
        raise
    except (OSError, ValueError):
        table = np.zeros((0, 6), np.int64)
    if len(table) != len(shard.rows):
        raise UserError(f"features of {path} are missing; compute them with experiments.precompute")
    _check_numbers(shard, table)
    return table


def _check_numbers(shard: _Shard, table: NDArray[np.int64]) -> None:
    """Raises UserError if the numbers of a shard are missing or truncated."""
    path, kind = shard.path(shard.numbers), shard.numbers.rpartition(".")[2]
    with read_explained(str(path)):
        found = size(path) if path.exists() else 0
    _, h, w, channels, tokens, width = table[table[:, 0] >= 0].T
    expected = np.dtype(kind).itemsize * int((2 * h * w * channels + tokens * width).sum())
    if found != expected:
        raise UserError(
            f"features of {path.with_suffix('')} have {found} bytes, not {expected}; delete {path.stem}.npy there and "
            f"compute them again"
        )


def _write_manifest(stored: StoredSplit, made_by: MadeBy) -> None:
    path = stored.files.directory / DIRECTORY / made_by.name / MANIFEST
    if path.exists():
        _check_manifest(stored, made_by)
        return
    make_directory(path.parent)
    with explained("features", path.parent):
        write_json(path, _manifest(stored, made_by))  # other processes may write the same


def _manifest(stored: StoredSplit, made_by: MadeBy) -> dict[str, Any]:
    return made_by.values() | {"index": stored.files.digest}


def _check_manifest(stored: StoredSplit, made_by: MadeBy) -> None:
    """Raises UserError unless the directory holds features of these data, weights and settings."""
    directory = stored.files.directory
    path = directory / DIRECTORY / made_by.name / MANIFEST
    try:
        with read_explained(str(path)):
            found = json.loads(path.read_text())
    except FileNotFoundError:
        others = [
            name for name in child_names(directory / DIRECTORY) if (directory / DIRECTORY / name / MANIFEST).exists()
        ]
        raise UserError(
            f"{directory} has no features of tokenizer weights {made_by.tokenizer[:16]} and text weights "
            f"{made_by.text[:16] or 'none'} for this config (they would be {made_by.name}; there are "
            f"{', '.join(others) or 'none'}); compute them with experiments.precompute"
        ) from None
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; delete its directory and compute the features again") from error
    wanted = _manifest(stored, made_by)
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different:
        raise UserError(
            f"{path} has {different[0]} {found.get(different[0])!r}, not {wanted[different[0]]!r}: these features were "
            f"made by something else; delete their directory and compute them again"
        )
