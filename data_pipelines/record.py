"""One example of editing: what every source is turned into, and what shards hold.

On disk a record is a msgpack map with a `version`. Two rules keep old files readable: a field that is added has a
default, so that maps without it are read, and fields that a reader does not know are passed over; only when the meaning
of a field changes does the version grow, and `decode` then learns to read both.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import msgpack

from varedit_jax.errors import UserError

VERSION = 1
EXAMPLE_IDS = "example_ids"  # entry of a batch: the numbers of its examples, int64 [B]


class BrokenRecord(ValueError):
    """Stored bytes that are no record, or a shard that no longer gives them: one example is lost, the rest is not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A source image, the instruction to edit it, and the image that this should give.

    Images are files as published (JPEG, PNG, WebP, ...), never recompressed.
    """

    id: str  # unique in its data set
    dataset: str  # name of the data set
    source: bytes  # image file
    target: bytes  # image file
    instructions: tuple[str, ...]  # in other words each; the first is the default
    kind: str = ""  # of edit, in the data set's own words: add, remove, ...; "" if it does not say
    turn: int = 0  # of a session of several edits, from 0
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of quality, under the data set's own names
    mask: bytes | None = None  # image file; where the edit is
    license: str = ""  # of the data set
    original: str = ""  # identity of the original image, the same for all edits and turns of it; "" if unknown

    @property
    def key(self) -> str:
        """Identity among the records of all data sets."""
        return f"{self.dataset}/{self.id}"


_EARLIER_NAMES = {"licence": "license", "picture": "original"}  # of fields, in shards written before 0.2
_FIELDS = tuple(field.name for field in dataclasses.fields(Record))
_TYPES: dict[str, type | tuple[type, ...]] = {
    "source": bytes, "target": bytes, "instructions": tuple, "turn": int, "scores": dict, "mask": (bytes, type(None))
}  # fmt: skip


def encode(record: Record) -> bytes:
    """A record as bytes, the same for equal records: scores are in order of their names."""
    values: dict[str, Any] = {"version": VERSION}
    values |= {name: getattr(record, name) for name in _FIELDS}
    values["scores"] = {name: float(record.scores[name]) for name in sorted(record.scores)}
    return msgpack.packb(values)


def decode(data: bytes) -> Record:
    """The record in bytes that `encode` gave, now or in an earlier version.

    Raises BrokenRecord if they are none, and UserError if a newer version of this package wrote them.
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
    """Text that can be written as UTF-8: halves of surrogate pairs, which JSON and tars may hold, become `?`."""
    return text.encode("utf-8", "replace").decode()


def finite_scores(values: Mapping[str, Any]) -> dict[str, float]:
    """Scores as published, of any type, without those that are no finite numbers (null, NaN, text that is none)."""
    scores: dict[str, float] = {}
    for name, value in values.items():
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            continue
        if math.isfinite(number):
            scores[clean_text(name)] = number
    return scores
