"""What sources give: records, and what they had to leave out with the reason."""

import dataclasses
import enum
import fnmatch
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.record import Record
from varedit_jax.errors import UserError

MAX_FILE_BYTES = 256 * 2**20  # of one picture file; a 64-megapixel picture without compression is smaller


_SPACE = " \t\r\n"
_OUTSIDE = re.compile(r"^/|^[A-Za-z]:|[\\\0]")  # absolute paths, and characters that other systems take for more


class Reason(enum.StrEnum):
    """Why something that a data set lists is no record."""

    ARCHIVE = "damaged archive"  # or table, or list: what it held from there on is lost
    ANNOTATION = "damaged annotation"
    MISSING = "missing picture"
    UNSAFE = "unsafe name"  # an absolute path, one that leaves its folder, a link or a device
    SIZE = "absurd size"
    INSTRUCTION = "empty instruction"
    SEVERAL = "several sources"  # an edit of more than one picture
    NO_PICTURES = "no pictures"  # a turn that only says something
    AMBIGUOUS = "ambiguous picture"  # the same file stands for two pictures
    CORRUPT = "known to be corrupt"
    FAILED = "failed edit"  # published as an example of what not to do


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refused:
    """Something that did not become a record."""

    id: str  # of the record, or the name of the archive, table or member
    dataset: str
    reason: Reason
    detail: str = ""


Entry = Record | Refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What is read in one go, independently of other parts and in any process."""

    source: str  # name in SOURCES
    name: str  # unique in the data set and the same on every machine
    files: tuple[str, ...]  # that it reads
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A public format."""

    name: str
    licence: str
    # Files and folders to parts, in order. Raises UserError if there is nothing of the format there.
    parts: Callable[[Sequence[pathlib.Path], Mapping[str, str]], list[Part]]
    read: Callable[[Part], Iterator[Entry]]
    options: tuple[str, ...] = ()  # names of what `parts` takes beside paths


def make_entry(
    *,
    id: str,
    dataset: str,
    source: bytes | None,
    target: bytes | None,
    instructions: Iterable[object],
    **fields: Any,
) -> Entry:
    """A record, or Refused if a picture is missing or no instruction has words.

    Instructions lose the white space around them, and those that are empty, repeated or no text are dropped.
    """
    texts = [clean_text(text).strip() for text in instructions if isinstance(text, str)]
    texts = list(dict.fromkeys(text for text in texts if text))
    id = clean_text(id)
    if not source or not target:
        lacks = " and ".join(name for name, data in (("source", source), ("target", target)) if not data)
        return Refused(id=id, dataset=dataset, reason=Reason.MISSING, detail=f"no {lacks}")
    if max(len(source), len(target)) > MAX_FILE_BYTES:
        return Refused(id=id, dataset=dataset, reason=Reason.SIZE, detail=f"{max(len(source), len(target))} bytes")
    if not texts:
        return Refused(id=id, dataset=dataset, reason=Reason.INSTRUCTION)
    return Record(id=id, dataset=dataset, source=source, target=target, instructions=tuple(texts), **fields)


def clean_text(text: str) -> str:
    """Text that can be written as UTF-8: halves of surrogate pairs, which JSON may hold, become question marks."""
    return text.encode("utf-8", "replace").decode()


def safe_name(name: object) -> str | None:
    """A name inside of a data set as plain relative path; None if it is absolute, leaves its folder, or is no name."""
    if not isinstance(name, str) or _OUTSIDE.search(name):
        return None
    pieces = [piece for piece in name.split("/") if piece not in ("", ".")]
    return "/".join(pieces) if pieces and ".." not in pieces else None


def find(inputs: Sequence[pathlib.Path], *patterns: str) -> list[pathlib.Path]:
    """Files given, or lying anywhere under folders given, whose path ends like one of the patterns; sorted.

    Patterns are of `fnmatch`, matched with the last components: `annotations/split_*.jsonl`. Raises UserError if an
    input does not exist.
    """
    found = set()
    for path in inputs:
        if not path.exists():
            raise UserError(f"there is no {path}; give files or folders as they were downloaded")
        for file in path.rglob("*") if path.is_dir() else [path]:
            name = f"/{file.as_posix()}"
            if any(fnmatch.fnmatchcase(name, f"*/{pattern}") for pattern in patterns) and file.is_file():
                found.add(file)
    return sorted(found)


def relative_name(file: pathlib.Path, inputs: Sequence[pathlib.Path]) -> str:
    """Name of a file below the folder that was given, or its own name where it was given itself."""
    for path in inputs:
        if path.is_dir() and file.is_relative_to(path):
            return file.relative_to(path).as_posix()
    return file.name


def read_lines(path: str, dataset: str) -> Iterator[tuple[str, dict[str, Any] | Refused]]:
    """Objects of a JSONL file with their place, FILE:LINE; what cannot be read is Refused. Empty lines are passed."""
    name = pathlib.Path(path).name
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{name}:{number}"
            try:
                value = json.loads(line)
                problem = None if isinstance(value, dict) else f"{type(value).__name__} instead of an object"
            except (ValueError, RecursionError) as error:
                problem = str(error)
            if problem is None:
                yield place, value
            else:
                yield place, Refused(id=place, dataset=dataset, reason=Reason.ANNOTATION, detail=problem)


def json_items(path: str) -> Iterator[tuple[str, Any]]:
    """Entries of a large JSON file one by one: (position, value) of an array, (key, value) of an object.

    Memory is that of the largest entry. Raises ValueError where the file is not JSON, or is neither.
    """
    decoder = json.JSONDecoder()
    with open(path, encoding="utf-8", errors="replace") as file:
        text, at = "", 0

        def skip(characters: str) -> str:
            """The next character that is none of `characters`, left in place; "" at the end of the file."""
            nonlocal text, at
            while True:
                while at < len(text) and text[at] in characters:
                    at += 1
                if at < len(text):
                    return text[at]
                text, at = file.read(1 << 20), 0
                if not text:
                    return ""

        def value() -> Any:
            nonlocal text, at
            skip(_SPACE)
            while True:
                try:
                    found, end = decoder.raw_decode(text, at)
                    # A number at the end of what was read so far may go on.
                    if end < len(text) or not isinstance(found, (int, float)):
                        at = end
                        return found
                    more = file.read(1 << 20)
                    if not more:
                        at = end
                        return found
                except ValueError:
                    more = file.read(max(1 << 20, len(text)))
                    if not more:
                        raise
                text, at = text[at:] + more, 0

        opening = skip(_SPACE)
        if opening not in ("[", "{"):
            raise ValueError(f"{pathlib.Path(path).name} is neither a JSON array nor a JSON object")
        at += 1
        closing, position = ("]", 0) if opening == "[" else ("}", 0)
        while (character := skip(_SPACE + ",")) != closing:
            if not character:
                raise ValueError(f"{pathlib.Path(path).name} ends inside of its {position}th entry")
            if opening == "[":
                yield str(position), value()
            else:
                key = value()
                if skip(_SPACE) != ":":
                    raise ValueError(f"{pathlib.Path(path).name} has no value for the key {key!r}")
                at += 1
                yield str(key), value()
            position += 1
