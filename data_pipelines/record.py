"""One edit example: the common format of all sources, stored in shards.

On disk a record is a msgpack map with a `version`. Old files stay readable: an added field has a default, and readers
skip fields that they do not know. The version grows only when a field changes its meaning; `decode` then reads both.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import msgpack

from varedit_jax.errors import UserError

VERSION = 1
EXAMPLE_IDS = "example_ids"  # entry of a batch: indices of its examples, int64 [B]


class BrokenRecord(ValueError):
    """Stored bytes that are not a record, or cannot be read from a damaged shard; other records are unaffected."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A source image, the edit instruction and the target image.

    Images are files as published (JPEG, PNG, WebP, ...), never recompressed.
    """

    id: str  # unique in its data set
    dataset: str  # name of the data set
    source: bytes  # image file
    target: bytes  # image file
    instructions: tuple[str, ...]  # alternative wordings; the first is the default
    kind: str = ""  # of edit, as the data set names it: add, remove, ...; "" if unknown
    turn: int = 0  # of a session of several edits, from 0
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of quality, as the data set names them
    mask: bytes | None = None  # image file; where the edit is
    license: str = ""  # of the data set
    original: str = ""  # identity of the original image, shared by all its edits and turns; "" if unknown

    @property
    def key(self) -> str:
        """Identity across data sets."""
        return f"{self.dataset}/{self.id}"


_EARLIER_NAMES = {"licence": "license", "picture": "original"}  # of fields, in shards written before 0.2
_FIELDS = tuple(field.name for field in dataclasses.fields(Record))
_TYPES: dict[str, type | tuple[type, ...]] = {
    "source": bytes, "target": bytes, "instructions": tuple, "turn": int, "scores": dict, "mask": (bytes, type(None))
}  # fmt: skip


def encode(record: Record) -> bytes:
    """Returns a record as bytes, equal for equal records: scores are sorted by name."""
    values: dict[str, Any] = {"version": VERSION}
    values |= {name: getattr(record, name) for name in _FIELDS}
    values["scores"] = {name: float(record.scores[name]) for name in sorted(record.scores)}
    return msgpack.packb(values)


def decode(data: bytes) -> Record:
    """Returns the record in bytes of `encode`, of this or an earlier version.

    Raises BrokenRecord if they are not a record, and UserError if a newer version of this package wrote them.
    """
    try:
        values = msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException) as error:  # UnicodeDecodeError is a ValueError
        raise BrokenRecord(f"{len(data)} bytes are no record: {error or type(error).__name__}") from error
    version = values.get("version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise BrokenRecord(f"{len(data)} bytes are no record: they do not say of which version")
    if version > VERSION:
        raise UserError(f"a record is of version {version}; this package reads up to {VERSION}, use a newer one")
    values = {_EARLIER_NAMES.get(name, name): value for name, value in values.items()}
    values = {name: values[name] for name in _FIELDS if name in values}
    if isinstance(values.get("instructions"), list):
        values["instructions"] = tuple(values["instructions"])
    for name, value in values.items():
        if not isinstance(value, _TYPES.get(name, str)):
            raise BrokenRecord(f"field {name} of a record is {type(value).__name__}")
    if not all(isinstance(text, str) for text in values.get("instructions", ())):
        raise BrokenRecord("an instruction of a record is no text")
    for name, score in values.get("scores", {}).items():
        if not isinstance(name, str) or not isinstance(score, (int, float)):
            raise BrokenRecord(f"score {name!r} of a record is {type(score).__name__}")
    try:
        return Record(**values)
    except TypeError as error:
        raise BrokenRecord(f"a record lacks a field: {error}") from error


def clean_text(text: str) -> str:
    """Returns text that UTF-8 can encode: lone surrogates, which JSON and tars may hold, become `?`."""
    return text.encode("utf-8", "replace").decode()


def finite_scores(values: Mapping[str, Any]) -> dict[str, float]:
    """Returns published scores of any type as floats, without those that are not finite numbers (null, NaN, text)."""
    scores: dict[str, float] = {}
    for name, value in values.items():
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            continue
        if math.isfinite(number):
            scores[clean_text(name)] = number
    return scores
