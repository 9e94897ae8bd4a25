"""The entries that sources yield: records, and refusals with their reasons."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.reasons import Reason
from data_pipelines.record import Record, clean_text
from data_pipelines.sources.instructions import wordings

MAX_FILE_BYTES = 256 * 2**20  # of one image file; a 64-megapixel image without compression is smaller


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refused:
    """An entry that did not become a record."""

    id: str  # of the record, or the name of the archive, table or member
    dataset: str
    reason: Reason
    detail: str = ""

    def __post_init__(self) -> None:
        """Makes the texts encodable as UTF-8."""
        for field in ("id", "detail"):
            object.__setattr__(self, field, clean_text(getattr(self, field)))


Entry = Record | Refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a data set that any process can read independently of the others."""

    source: str  # key in SOURCES
    name: str  # unique in the data set and the same on every machine
    files: tuple[str, ...]  # files to read
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    left_out: tuple[Refused, ...] = ()  # by the search for parts; the first has them all


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceFormat:
    """The format of a public data set."""

    name: str
    license: str
    # Maps files and directories to parts, in order. Raises UserError if nothing of the format is there.
    parts: Callable[[Sequence[str], Mapping[str, str]], list[Part]]
    read: Callable[[Part], Iterator[Entry]]
    options: tuple[str, ...] = ()  # names of the options of `parts`


def make_entry(
    *,
    id: str,
    dataset: str,
    source: bytes | Reason | None,
    target: bytes | Reason | None,
    instructions: Iterable[object],
    captions: Iterable[object] = (),
    mask: bytes | Reason | None = None,
    **fields: Any,
) -> Entry:
    """Returns a Record, or Refused if an image is missing or too large, or if no instruction says what to change.

    Instructions that say nothing, and repeated ones, are dropped: see `wordings`. `captions` describe the images.
    """
    id = clean_text(id)
    texts, fault = wordings(instructions, captions)
    fields = {name: clean_text(value) if isinstance(value, str) else value for name, value in fields.items()}
    if isinstance(source, Reason):
        return Refused(id=id, dataset=dataset, reason=source, detail="source")
    if isinstance(target, Reason):
        return Refused(id=id, dataset=dataset, reason=target, detail="target")
    if not source or not target:
        lacks = " and ".join(name for name, data in (("source", source), ("target", target)) if not data)
        return Refused(id=id, dataset=dataset, reason=Reason.MISSING, detail=f"no {lacks}")
    if max(len(source), len(target)) > MAX_FILE_BYTES:
        return Refused(id=id, dataset=dataset, reason=Reason.SIZE, detail=f"{max(len(source), len(target))} bytes")
    if not texts:
        return Refused(id=id, dataset=dataset, reason=Reason.INSTRUCTION, detail=fault)
    return Record(
        id=id,
        dataset=dataset,
        source=source,
        target=target,
        instructions=texts,
        mask=mask if isinstance(mask, bytes) else None,
        **fields,
    )
