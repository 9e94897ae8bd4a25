"""Records on disk: ArrayRecord shards and their index.

    DIRECTORY/index.json                                   shards: counts, sizes, SHA-256; names for category columns
    DIRECTORY/SPLIT/NAME-00000-of-00008.array_record       records, uncompressed (images are compressed already)
    DIRECTORY/SPLIT/columns/*.npy                          metadata of each record, without its images

Columns are memory-mapped, so that a million records open instantly and processes share the memory. Any number of
processes write shards; `write_index` comes last. The same records give the same bytes.
"""

import dataclasses
import errno
import functools
import hashlib
import json
import os
import pathlib
import posixpath
import re
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from numpy.typing import NDArray

from data_pipelines.geometry import SIZES, pair_kinds
from data_pipelines.local_files import LocalFiles
from data_pipelines.record import BrokenRecord, Record, decode, encode
from varedit_jax.errors import UserError
from varedit_jax.scales import aspect_templates, nearest_aspect
from varedit_jax.storage.disk import read_explained
from varedit_jax.storage.files import make_durable, replacing, take_place, write_json
from varedit_jax.storage.paths import PathLike, resolve

INDEX = "index.json"
INDEX_VERSION = 1
COLUMNS = "columns"

_SHARD_NAME = re.compile(r"(?P<name>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.array_record")
# ArrayRecord quotes the system's error message in a RuntimeError, its exception for everything.
_SYSTEM_ERROR = re.compile(r"\w+\(\) failed: ([^;]+)")
_ERROR_NUMBERS = {os.strerror(number): number for number in errno.errorcode}
_NUMBERS = {
    "width": np.int32, "height": np.int32, "aspect": np.int8, "turn": np.int32, "nbytes": np.int64
}  # fmt: skip
# Columns that data sets prepared before 0.2 do not have.
_LATER_NUMBERS = {
    "target_width": np.int32, "target_height": np.int32, "source_turn": np.int8, "target_turn": np.int8
}  # fmt: skip
_COLUMNS = _NUMBERS | _LATER_NUMBERS
_TEXTS = ("id", "instruction")
_CATEGORIES = ("dataset", "kind")


def shard_path(directory: str | os.PathLike[str], name: str, index: int, count: int) -> pathlib.Path:
    """Returns the path of shard `index` of `count`."""
    if not 0 <= index < count <= 99_999:
        raise ValueError(f"there is no shard {index} of {count}")
    return resolve(directory) / f"{name}-{index:05d}-of-{count:05d}.array_record"


def _notes(path: pathlib.Path) -> pathlib.Path:
    """Returns the path of a shard's metadata for the index, which also marks the shard as complete."""
    return path.with_name(f".{path.name}.npz")


def is_written(path: str | os.PathLike[str]) -> bool:
    """Returns True if the shard at `path` is complete."""
    return resolve(path).is_file() and _notes(resolve(path)).is_file()


class ShardWriter:
    """Context manager that writes one shard, which appears complete or, after an exception, not at all."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """`path` is from `shard_path`."""
        self.path = resolve(path)
        if not _SHARD_NAME.fullmatch(self.path.name):
            raise ValueError(f"{self.path.name} is not the name of a shard")
        # Of one writer alone: a runner that retries may have several at work on a shard.
        self._partial = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.partial")
        self._rows: dict[str, list[Any]] = {name: [] for name in (*_COLUMNS, *_TEXTS, *_CATEGORIES)}

    def __enter__(self) -> "ShardWriter":
        """Opens the file. Raises UserError if it cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = ArrayRecordWriter(str(self._partial), "group_size:1,uncompressed")
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot write {self.path}: {error}; give a directory that can be written") from error
        return self

    def write(
        self,
        record: Record,
        size: tuple[int, int],
        target_size: tuple[int, int] | None = None,
        turns: tuple[int, ...] = (1, 1),
    ) -> None:
        """Adds a record.

        Args:
          record: the record.
          size: (width, height) of its source in pixels, upright.
          target_size: that of its target; None if it is the same.
          turns: EXIF orientations of source and target, from 1 to 8.
        """
        width, height = size
        data = encode(record)
        aspect = aspect_templates().index(nearest_aspect(height, width))
        self._do(lambda: self._writer.write(data))
        numbers = (width, height, aspect, record.turn, len(data), *(target_size or size), *turns)
        row = (*numbers, record.id, record.instructions[0], record.dataset, record.kind)
        for name, value in zip((*_COLUMNS, *_TEXTS, *_CATEGORIES), row, strict=True):
            self._rows[name].append(value)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Completes the shard, or deletes it after an exception."""
        if error is not None:
            self._writer.close()
            self._partial.unlink(missing_ok=True)
            return
        self._do(self._writer.close)
        notes: dict[str, Any] = {name: np.array(self._rows[name], dtype) for name, dtype in _COLUMNS.items()}
        for name in _TEXTS:
            encoded = [text.encode() for text in self._rows[name]]
            notes[name] = np.frombuffer(b"".join(encoded), np.uint8)
            notes[f"{name}_lengths"] = np.array([len(text) for text in encoded], np.int64)
        for name in _CATEGORIES:
            names = sorted(set(self._rows[name]))
            codes = {value: code for code, value in enumerate(names)}  # there may be as many kinds as records
            notes[name] = np.array([codes[value] for value in self._rows[name]], np.int32)
            notes[f"{name}_names"] = np.frombuffer(json.dumps(names).encode(), np.uint8)
        notes["sha256"] = np.frombuffer(bytes.fromhex(_sha256(self._partial)), np.uint8)
        self._do(self._make_durable)  # what it was made from may be deleted
        take_place(self._partial, self.path)
        self._do(lambda: self._write_notes(notes))

    def _make_durable(self) -> None:
        with self._partial.open("rb+") as file:
            make_durable(file)

    def _write_notes(self, notes: dict[str, Any]) -> None:
        with replacing(_notes(self.path)) as file:
            np.savez(file, **notes)

    def _do(self, work: Callable[[], object]) -> None:
        try:
            work()
        except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError for a full disk
            self._partial.unlink(missing_ok=True)
            raise UserError(f"writing {self.path} failed: {error}; make room and run the same command again") from error


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hash(path: pathlib.Path) -> str:
    """Returns a short hash of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def write_index(directory: str | os.PathLike[str]) -> dict[str, int]:
    """Writes the index of all shards under `directory`, one subdirectory per split; returns record counts by split.

    Raises UserError if there are no shards, or some of a set are missing or unfinished.
    """
    directory = resolve(directory)
    splits: dict[str, Any] = {}
    for below in sorted(path for path in directory.iterdir() if path.is_dir()):
        if shards := _complete(below):
            splits[below.name] = _index_split(below, shards)
    if not splits:
        raise UserError(f"{directory} has no shards in any subdirectory; prepare a data set there first")
    write_json(directory / INDEX, {"version": INDEX_VERSION, "splits": splits}, indent=1)
    remove_notes(directory)
    return {split: entry["records"] for split, entry in splits.items()}


def remove_notes(directory: pathlib.Path) -> None:
    """Removes what only `write_index` needs, after it."""
    for path in directory.glob("*/.*.array_record.npz"):
        path.unlink()


def _complete(directory: pathlib.Path) -> list[pathlib.Path]:
    """Returns the shards of a split, in order. Raises UserError if any is missing or unfinished."""
    sets: dict[tuple[str, int], set[int]] = {}
    for path in directory.glob("*.array_record"):
        if match := _SHARD_NAME.fullmatch(path.name):
            sets.setdefault((match["name"], int(match["count"])), set()).add(int(match["index"]))
    paths = [shard_path(directory, name, index, count) for name, count in sorted(sets) for index in range(count)]
    missing = [path for path in paths if not is_written(path)]
    if missing:
        raise UserError(f"{missing[0]} is missing or unfinished, as are {len(missing) - 1} more shards; write them all")
    return paths


def _index_split(directory: pathlib.Path, shards: Sequence[pathlib.Path]) -> dict[str, Any]:
    notes = [np.load(_notes(path)) for path in shards]  # members are read lazily
    columns = directory / COLUMNS
    columns.mkdir(exist_ok=True)

    def write(name: str, dtype: Any, codes: Sequence[NDArray[Any]] | None = None) -> None:
        """Writes a column from the notes, mapped through each shard's `codes` if given."""
        length = sum(len(note[name]) for note in notes)
        column = np.lib.format.open_memmap(columns / f"{name}.npy", "w+", dtype, (length,))
        start = 0
        for shard, note in enumerate(notes):
            piece = note[name] if codes is None else codes[shard][note[name]]
            column[start : start + len(piece)] = piece
            start += len(piece)
        column.flush()

    for name, dtype in _COLUMNS.items():
        write(name, dtype)
    for name in _TEXTS:
        write(name, np.uint8)
        lengths = np.concatenate([np.zeros(1, np.int64), *(note[f"{name}_lengths"] for note in notes)])
        np.save(columns / f"{name}_offsets.npy", np.cumsum(lengths))
    known: dict[str, list[str]] = {}
    for name in _CATEGORIES:
        names = [json.loads(note[f"{name}_names"].tobytes()) for note in notes]
        known[name] = sorted(set().union(*names))
        codes = {value: code for code, value in enumerate(known[name])}
        write(name, np.int32, [np.array([codes[each] for each in some], np.int32) for some in names])
    entries = [
        {
            "file": path.name,
            "records": len(note["width"]),
            "bytes": path.stat().st_size,
            "sha256": note["sha256"].tobytes().hex(),
        }
        for path, note in zip(shards, notes, strict=True)
    ]
    for note in notes:
        note.close()
    loaded = {name: np.load(columns / f"{name}.npy") for name in ("dataset", "aspect", *SIZES)}
    datasets, aspects = (Counter(loaded[name].tolist()) for name in ("dataset", "aspect"))
    return {
        "records": sum(entry["records"] for entry in entries),
        "bytes": sum(entry["bytes"] for entry in entries),
        "datasets": {name: datasets[code] for code, name in enumerate(known["dataset"])},
        "aspects": {name: aspects[code] for code, name in enumerate(aspect_templates()) if aspects[code]},
        "pairs": pair_kinds(*(loaded[name] for name in SIZES)),
        "kinds": known["kind"],
        "shards": entries,
    }


def read_index(directory: PathLike) -> dict[str, Any]:
    """Returns index.json of a prepared data set. Raises UserError if it is missing, damaged or of a newer version."""
    path = resolve(directory) / INDEX
    try:
        with read_explained(str(path)):
            index = json.loads(path.read_text())
            version, _ = int(index["version"]), index["splits"]
    except FileNotFoundError:
        raise UserError(
            f"{directory} holds no prepared data set: {INDEX} is missing; prepare one there first"
        ) from None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error!r}; prepare the data set again") from error
    if version > INDEX_VERSION:
        raise UserError(f"{path} is of version {version}; this package reads up to {INDEX_VERSION}, use a newer one")
    return index


@dataclasses.dataclass(frozen=True)
class Texts:
    """A column of texts, decoded on access."""

    data: NDArray[np.uint8]  # UTF-8, concatenated
    offsets: NDArray[np.int64]  # [records + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes().decode()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """Metadata of each record, without its images: memory maps with one row per record."""

    width: NDArray[np.int32]  # pixels of the source, upright
    height: NDArray[np.int32]
    aspect: NDArray[np.int8]  # template nearest to the source: index into `scales.aspect_templates()`
    turn: NDArray[np.int32]
    nbytes: NDArray[np.int64]  # of the encoded record
    target_width: NDArray[np.int32]  # those of the source where they were not recorded, before 0.2
    target_height: NDArray[np.int32]
    source_turn: NDArray[np.int8]  # EXIF orientation, 1 to 8; 1 where it was not recorded
    target_turn: NDArray[np.int8]
    dataset: NDArray[np.int32]  # index into `datasets`
    kind: NDArray[np.int32]  # index into `kinds`
    id: Texts
    instruction: Texts  # the default one
    datasets: tuple[str, ...]
    kinds: tuple[str, ...]


class StoredSplit(NamedTuple):
    """Identity of a split on disk; its features are stored beside it."""

    files: LocalFiles
    split: str
    shards: tuple[tuple[str, int], ...]  # name and number of examples


@functools.lru_cache(maxsize=256)  # each has a file descriptor, closed with the last reference
def _reader(path: str) -> ArrayRecordReader:
    return ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=32768)


def read_row(path: str, row: int) -> bytes:
    """Returns the bytes of a record of a shard; open readers are shared by all threads.

    Raises OSError if the system fails, RuntimeError or ValueError if the data are damaged.
    """
    for retry in (True, False):
        try:
            [data] = _reader(path).read([row])
            return data
        except RuntimeError as error:
            found = _SYSTEM_ERROR.match(str(error))
            if found is None:
                raise
            _reader.cache_clear()  # keeps no broken reader, and frees file descriptors
            number = _ERROR_NUMBERS.get(found[1], errno.EIO)
            if not (retry and number in (errno.EMFILE, errno.ENFILE)):
                raise OSError(number, found[1], path) from error
    raise AssertionError("unreachable")


class Records:
    """A split of a prepared data set, with random access from any number of threads."""

    def __init__(self, directory: PathLike, split: str, cache_directory: str = "") -> None:
        """Opens the index; a shard is opened on first use.

        Files of a bucket are copied to `cache_directory` (`LocalFiles`). Raises UserError if `directory` holds no such
        split, or if its index is damaged or of a newer version.
        """
        self.directory, self.split = resolve(directory), split
        splits = read_index(directory)["splits"]
        if split not in splits:
            raise UserError(f"{directory} has no split {split!r}; it has {', '.join(splits)}")
        entry = splits[split]
        files = LocalFiles(self.directory, file_hash(self.directory / INDEX), cache_directory)
        try:
            with read_explained(f"the index of {directory}"):
                self._shards = [(f"{split}/{shard['file']}", shard["bytes"]) for shard in entry["shards"]]
                counts = [shard["records"] for shard in entry["shards"]]
                self._starts = np.cumsum([0, *counts])
                names = [shard["file"].removesuffix(".array_record") for shard in entry["shards"]]
                self.stored = StoredSplit(files, split, tuple(zip(names, counts, strict=True)))
                self.columns = self._read_columns(tuple(entry["datasets"]), tuple(entry["kinds"]), "pairs" in entry)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"the index of {directory} is damaged: {error!r}; prepare the data set again") from error

    def _read_columns(self, datasets: tuple[str, ...], kinds: tuple[str, ...], paired: bool) -> Columns:
        def column(name: str) -> NDArray[Any]:
            path = self.stored.files.get(f"{self.split}/{COLUMNS}/{name}.npy")
            # An empty column cannot be memory-mapped.
            return np.load(path, mmap_mode="r") if path.stat().st_size > 128 else np.load(path)

        numbers = {name: column(name) for name in _NUMBERS}
        if paired:
            numbers |= {name: column(name) for name in _LATER_NUMBERS}
        else:
            upright = np.ones(len(self), np.int8)
            numbers |= {"target_width": numbers["width"], "target_height": numbers["height"]}
            numbers |= {"source_turn": upright, "target_turn": upright}
        columns = Columns(
            **numbers,  # type: ignore[arg-type]
            **{name: column(name) for name in _CATEGORIES},  # type: ignore[arg-type]
            **{name: Texts(column(name), column(f"{name}_offsets")) for name in _TEXTS},  # type: ignore[arg-type]
            datasets=datasets,
            kinds=kinds,
        )
        for name in (*_COLUMNS, *_CATEGORIES, *_TEXTS):
            if len(getattr(columns, name)) != len(self):
                raise ValueError(f"column {name} has not a row for each of {len(self)} records")
        return columns

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the split itself instead of unpickling columns."""
        return Records, (str(self.directory), self.split, self.stored.files.cache_directory)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Record:
        """Returns one record.

        Raises BrokenRecord if its shard is missing, truncated or damaged there, UserError if the machine cannot read
        it, IndexError past the end.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = int(index - self._starts[shard])
        name, size = self._shards[shard]
        try:
            with read_explained(f"{self.directory / name}"):
                return decode(read_row(str(self.stored.files.get(name, size)), row))
        except (BrokenRecord, UserError):
            raise
        except (OSError, RuntimeError, ValueError) as error:
            raise BrokenRecord(f"record {row} of {posixpath.basename(name)} cannot be read: {error}") from error

    def id(self, index: int) -> str:
        """Returns `Record.id`, even if the record is broken."""
        return self.columns.id[index]

    def dataset(self, index: int) -> str:
        """Returns `Record.dataset`, even if the record is broken."""
        return self.columns.datasets[self.columns.dataset[index]]

    def instruction(self, index: int) -> str:
        """Returns the default instruction of a record without reading the record."""
        return self.columns.instruction[index]
