"""Features of prepared records, computed once: what the frozen tokenizer and text encoder make of every example.

They lie beside the records, in bfloat16, a pair of files for each of their shards:

    DIRECTORY/features/NAME/features.json        what made them; NAME is short for it
    DIRECTORY/features/NAME/SPLIT/SHARD.bfloat16 numbers: of an example source [h, w, Z], target [h, w, Z], text [T, E]
    DIRECTORY/features/NAME/SPLIT/SHARD.npy      int64 [records, 6]: where they begin, h, w, Z, T, E; -1 for bad records

Shards are computed by any number of processes, each appears whole or not at all, and those that are there are not
computed again.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import pathlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import tqdm
from numpy.typing import ArrayLike, NDArray

from data_pipelines.bad_records import index_hash
from data_pipelines.damage import Damaged
from data_pipelines.datasets import Example, RecordSource
from data_pipelines.shards import Records, read_index
from varedit_jax.errors import UserError
from varedit_jax.training.run_config import make_directory, room_explained

MANIFEST = "features.json"
DIRECTORY = "features"

EncodeImages = Callable[[NDArray[np.uint8]], ArrayLike]  # [B, H, W, 3] -> [B, h, w, Z]
EncodeText = Callable[[Sequence[str]], tuple[ArrayLike, NDArray[np.int32]]]  # B texts -> [B, T, E], tokens of each [B]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MadeBy:
    """All that decides about features, beside the records."""

    tokenizer: str  # hash of the weights that encode images
    text: str  # hash of the weights that encode instructions; "" where only images are encoded
    text_tokens: int  # instructions are cut to this length
    sizes: dict[str, tuple[int, int]]  # pixels (height, width) of each aspect
    resize: str  # how images come to that size

    @property
    def name(self) -> str:
        """Of the directory."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def manifest(self, records: Records) -> dict[str, Any]:
        """What is written beside the features of some records."""
        values = dataclasses.asdict(self) | {"index": index_hash(records.directory)}
        return json.loads(json.dumps(values))


def _directory(records: Records, made_by: MadeBy) -> pathlib.Path:
    return records.directory / DIRECTORY / made_by.name


def _shards(records: Records) -> list[tuple[str, range]]:
    """Name and rows of each shard of a split."""
    shards, start = [], 0
    for entry in read_index(records.directory)["splits"][records.split]["shards"]:
        shards.append((pathlib.Path(entry["file"]).stem, range(start, start + entry["records"])))
        start += entry["records"]
    return shards


def precompute(
    source: RecordSource,
    made_by: MadeBy,
    encode: EncodeImages,
    encode_text: EncodeText | None,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> int:
    """Computes what is missing of every `process_count`-th shard; returns the number of shards that it wrote.

    Both functions get whole batches of one shape, the last one filled up. Raises UserError if a feature is not finite,
    the disk is full, or features of other records lie there.
    """
    todo = []
    for part, records in enumerate(source.parts):
        directory = _directory(records, made_by)
        for name, rows in _shards(records):
            todo.append((part, directory / records.split / name, rows))
    for records in source.parts:
        _write_manifest(records, made_by)
    todo = [entry for entry in todo[process_index::process_count] if not _file(entry[1], "npy").exists()]
    with tqdm.tqdm(total=sum(len(rows) for _, _, rows in todo), desc="features", unit="example") as progress:
        for part, path, rows in todo:
            make_directory(path.parent)
            with room_explained("features", path.parent):
                start = int(source.starts[part])
                indices = np.arange(start + rows.start, start + rows.stop)
                partial = _file(path, "partial")
                with partial.open("wb") as file:
                    table = _write(file, source, indices, encode, encode_text, batch_size, progress)
                partial.replace(_file(path, "bfloat16"))
                with partial.open("wb") as file:
                    np.save(file, table)
                partial.replace(_file(path, "npy"))
    return len(todo)


def _write(
    file: BinaryIO,
    source: RecordSource,
    indices: NDArray[np.int64],
    encode: EncodeImages,
    encode_text: EncodeText | None,
    batch_size: int,
    progress: Any,
) -> NDArray[np.int64]:
    """Writes the features of some examples; returns where they are."""
    table = np.full((len(indices), 6), -1, np.int64)
    at = 0
    for places, examples in _read(source, indices, batch_size):
        if examples:
            filled = [*examples, *[examples[-1]] * (batch_size - len(examples))]
            sides = [
                np.asarray(encode(np.stack([example[side] for example in filled]))) for side in ("source", "target")
            ]
            texts, lengths = np.zeros((batch_size, 0, 0), np.float32), np.zeros(batch_size, np.int32)
            if encode_text is not None:
                encoded, lengths = encode_text([example["instruction"] for example in filled])
                texts = np.asarray(encoded)
            for row, place in enumerate(places):
                pieces = [sides[0][row], sides[1][row], texts[row, : lengths[row]]]
                if not all(np.isfinite(piece.astype(np.float32)).all() for piece in pieces):
                    raise UserError(f"features of example {indices[place]} are not finite; check the encoders' weights")
                table[place] = at, *pieces[0].shape, *pieces[2].shape
                for piece in pieces:
                    file.write(piece.astype(ml_dtypes.bfloat16).tobytes())
                    at += piece.size
        progress.update(len(examples))
    return table


def _read(
    source: RecordSource, indices: NDArray[np.int64], batch_size: int
) -> Iterator[tuple[list[int], list[Example]]]:
    """Examples in batches of one bucket, with their places in `indices`; bad ones are left out."""

    def load(place: int) -> Example | None:
        try:
            return source[int(indices[place])]
        except Damaged:
            return None

    batches = []
    for bucket in np.unique(source.buckets[indices]):
        places = np.flatnonzero(source.buckets[indices] == bucket)
        batches += [places[start : start + batch_size].tolist() for start in range(0, len(places), batch_size)]
    with concurrent.futures.ThreadPoolExecutor(max(1, source.data.read_threads)) as pool:
        ahead = [[pool.submit(load, place) for place in places] for places in batches[:2]]
        for number, places in enumerate(batches):
            loaded = [future.result() for future in ahead.pop(0)]
            if number + 2 < len(batches):
                ahead.append([pool.submit(load, place) for place in batches[number + 2]])
            good = [(place, example) for place, example in zip(places, loaded, strict=True) if example is not None]
            yield [place for place, _ in good], [example for _, example in good]


class RecordFeatures:
    """The features of all examples of a source; reading a row reads the disk, or the system's cache of it."""

    def __init__(self, source: RecordSource, made_by: MadeBy) -> None:
        """Opens them. Raises UserError if there are none of these weights, or some are missing."""
        self._source, self._made_by = source, made_by
        tables, files, starts = [], [], [0]
        for records in source.parts:
            _check_manifest(records, made_by)
            for name, rows in _shards(records):
                path = _directory(records, made_by) / records.split / name
                try:
                    table = np.load(_file(path, "npy"))
                    complete = len(table) == len(rows) and _file(path, "bfloat16").exists()
                except (OSError, ValueError):
                    complete = False
                if not complete:
                    raise UserError(f"features of {path} are missing; compute them with experiments.precompute")
                size = _file(path, "bfloat16").stat().st_size
                if size != _bytes(table):
                    raise UserError(
                        f"features of {path} have {size} bytes, not {_bytes(table)}; delete {_file(path, 'npy').name} "
                        f"there and compute them again"
                    )
                tables.append(table)
                files.append(_file(path, "bfloat16"))
                starts.append(starts[-1] + len(rows))
        self._table = np.concatenate(tables)
        self._files = files
        self._starts = np.array(starts)
        self._maps: dict[int, NDArray[Any]] = {}
        self.kept: NDArray[np.bool_] = self._table[:, 0] >= 0  # [n], False for those that could not be encoded

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens its own."""
        return RecordFeatures, (self._source, self._made_by)

    @property
    def examples(self) -> int:
        """How many there are, bad ones included."""
        return len(self._table)

    def rows(self, indices: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Part of a batch: `source_features` and `target_features`, float32 [B, h, w, Z].

        Where the text was encoded also `text_features`, bfloat16 [B, T, E], zero after the last token.
        """
        pieces = [self._row(index) for index in indices]
        batch: dict[str, NDArray[Any]] = {
            f"{side}_features": np.stack([piece[k] for piece in pieces]).astype(np.float32)
            for k, side in enumerate(("source", "target"))
        }
        if self._made_by.text:
            width = pieces[0][2].shape[-1]
            batch["text_features"] = np.zeros((len(pieces), self._made_by.text_tokens, width), ml_dtypes.bfloat16)
            for row, (_, _, text) in enumerate(pieces):
                batch["text_features"][row, : len(text)] = text
        return batch

    def _row(self, index: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        numbers = self._maps.get(shard)
        if numbers is None:
            numbers = self._maps[shard] = np.memmap(self._files[shard], ml_dtypes.bfloat16, "r")
        at, h, w, channels, tokens, width = self._table[index].tolist()
        shapes = (h, w, channels), (h, w, channels), (tokens, width)
        ends = at + np.cumsum([0, *(math.prod(shape) for shape in shapes)])
        source, target, text = (
            numbers[begin:end].reshape(shape) for begin, end, shape in zip(ends[:-1], ends[1:], shapes, strict=True)
        )
        return source, target, text


def _file(path: pathlib.Path, kind: str) -> pathlib.Path:
    """One of a shard's files; names of shards may have dots."""
    return path.with_name(f"{path.name}.{kind}")


def _bytes(table: NDArray[np.int64]) -> int:
    """Of the numbers that a shard's table speaks of."""
    _, h, w, channels, tokens, width = table[table[:, 0] >= 0].T
    return 2 * int((2 * h * w * channels + tokens * width).sum())


def _write_manifest(records: Records, made_by: MadeBy) -> None:
    path = _directory(records, made_by) / MANIFEST
    if path.exists():
        _check_manifest(records, made_by)
        return
    make_directory(path.parent)
    with room_explained("features", path.parent):
        draft = path.with_name(f".{uuid.uuid4().hex}.draft")  # other processes may be doing the same
        draft.write_text(json.dumps(made_by.manifest(records), indent=2) + "\n")
        draft.replace(path)


def _check_manifest(records: Records, made_by: MadeBy) -> None:
    """Raises UserError if there are no features of some records, of these weights and settings."""
    path = _directory(records, made_by) / MANIFEST
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        others = sorted(other.parent.name for other in (records.directory / DIRECTORY).glob(f"*/{MANIFEST}"))
        raise UserError(
            f"{records.directory} has no features of tokenizer weights {made_by.tokenizer[:16]} and text weights "
            f"{made_by.text[:16] or 'none'} for this config (they would be {made_by.name}; there are "
            f"{', '.join(others) or 'none'}); compute them with experiments.precompute"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; delete its directory and compute the features again") from error
    wanted = made_by.manifest(records)
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different:
        raise UserError(
            f"{path} has {different[0]} {found.get(different[0])!r}, not {wanted[different[0]]!r}: these features were "
            f"made by something else; delete their directory and compute them again"
        )
