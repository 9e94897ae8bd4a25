"""Lists of a data set, JSONL and JSON, as they are found: UTF-8 or UTF-16, with byte order marks, compressed."""

import codecs
import contextlib
import io
import json
import posixpath
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from data_pipelines.reasons import Reason
from data_pipelines.sources.entries import Part, Refused
from data_pipelines.sources.files import open_input, reading, relative_name
from data_pipelines.sources.unpacked import Unpacked, is_compressed
from varedit_jax.storage import paths

PATTERNS = ("*.jsonl", "*.JSONL", "*.jsonl.gz", "*.jsonl.bz2", "*.jsonl.xz", "*.jsonl.zst")  # for files.find
PART_BYTES = 64 << 20  # of a list, in one part
_HEAD = 1 << 16  # bytes of a list, in which an ordinary one has an end of line
_BLOCK = 1 << 20
_OPENINGS = ("[", "{", "[{")  # first lines of JSON that is not one object per line
_SPACE = " \t\r\n"
_ENDING = re.compile(r"(\.jsonl)(\.\w+)?$", re.IGNORECASE)


class Span(NamedTuple):
    """Neighboring lines of a list: those that begin at `start`, or behind it and before `stop`."""

    start: int = 0  # byte
    stop: int = sys.maxsize  # byte
    line: int = 1  # number of the first

    def as_options(self) -> dict[str, str]:
        """Returns it as options of a part, of which the whole list has none."""
        return {} if self == _WHOLE else {name: str(value) for name, value in self._asdict().items()}

    @classmethod
    def of(cls, options: Mapping[str, str]) -> "Span":
        """Returns the lines of a part."""
        return cls(**{name: int(options[name]) for name in cls._fields if name in options})


_WHOLE = Span()


def is_list(path: str) -> bool:
    """Returns True for the name of a JSONL file."""
    return _ENDING.search(path) is not None


def list_name(path: str) -> str:
    """Returns the name of a JSONL file without directories and endings."""
    return _ENDING.sub("", posixpath.basename(path))


class _Contents(io.RawIOBase):
    """The contents of a compressed file."""

    def __init__(self, contents: Unpacked) -> None:
        self._contents = contents

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._contents.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


@contextlib.contextmanager
def _open_text(path: str) -> Iterator[tuple[io.TextIOWrapper, Mapping[int, str]]]:
    """Yields a file's text, and what is damaged of a compressed one as far as it has been read, by position."""
    with open_input(path) as file:
        breaks: Mapping[int, str] = {}
        binary = file
        if is_compressed(_head(file)):
            unpacked = Unpacked(file)
            breaks, binary = unpacked.breaks, io.BufferedReader(_Contents(unpacked))
        encoding = json.detect_encoding(binary.peek(4)[:4])
        yield io.TextIOWrapper(binary, encoding, errors="replace"), breaks


def _head(file: io.BufferedReader) -> bytes:
    head = file.read(_HEAD)
    file.seek(0)
    return head


def _has_places(head: bytes) -> bool:
    """Returns True if the objects of a list can be found from any byte on: in plain UTF-8, one per line."""
    plain = not is_compressed(head) and json.detect_encoding(head[:4]).startswith("utf-8")
    return plain and b"\n" in head and head[: head.index(b"\n")].decode("utf-8-sig", "replace").strip() not in _OPENINGS


def spans(path: str, size: int = 0) -> list[Span]:
    """Returns a list as spans of about `size` bytes, PART_BYTES by default; one if it can only be read in order.

    A large list is read through once, so that lines have the same numbers however it is split.
    """
    size = size or PART_BYTES
    with reading(path):
        total = paths.size(paths.resolve(path))
    with open_input(path) as file:
        if total <= size or not _has_places(_head(file)):
            return [_WHOLE]
        starts, place, line = [(0, 1)], 0, 1
        while block := file.read(_BLOCK):
            while (end := block.find(b"\n", max(0, starts[-1][0] + size - 1 - place)) + 1) and place + end < total:
                starts.append((place + end, line + block.count(b"\n", 0, end)))
            place, line = place + len(block), line + block.count(b"\n")
    stops = [start for start, _ in starts[1:]]
    return [Span(start, stop, line) for (start, line), stop in zip(starts, [*stops, sys.maxsize], strict=True)]


def list_parts(source: str, inputs: Sequence[str], file: str, options: Mapping[str, str] = {}) -> list[Part]:
    """Returns the parts of a list, with the directories in which images may lie: its own, and the input ones."""
    name = relative_name(file, inputs)
    directories = dict.fromkeys([posixpath.dirname(file), *(path for path in inputs if not is_list(path))])
    return [
        Part(
            source=source,
            name=f"{name}@{span.start}" if span.start else name,
            files=(file, *directories),
            options={**options, **span.as_options()},
        )
        for span in spans(file)
    ]


def _lines(path: str, span: Span) -> Iterator[tuple[int, str | Refused]]:
    """Yields lines with their numbers; Refused, without data set, for damage of a compressed list."""
    with open_input(path) as file:
        if _has_places(_head(file)):
            place = file.seek(span.start)
            for number, line in enumerate(file, span.line):
                if place >= span.stop:
                    return
                place += len(line)
                yield number, line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode("utf-8", "replace")
            return
    with _open_text(path) as (text, breaks):
        yield from enumerate(text, 1)
        for place, what in breaks.items():
            detail = f"byte {place} of its contents: {what}"
            yield 0, Refused(id=posixpath.basename(path), dataset="", reason=Reason.ARCHIVE, detail=detail)


def read_lines(path: str, dataset: str, span: Span = _WHOLE) -> Iterator[tuple[str, dict[str, Any] | Refused]]:
    """Yields the objects of a JSONL file with their place, FILE:LINE; Refused for damaged lines. Skips empty lines.

    FILE is without the ending of a compressed file.
    """
    name = posixpath.basename(_ENDING.sub(r"\1", path))
    for number, line in _lines(path, span):
        if isinstance(line, Refused):
            yield name, Refused(id=line.id, dataset=dataset, reason=line.reason, detail=line.detail)
            continue
        line = line.strip().removesuffix(",")
        if not line:
            continue
        place = f"{name}:{number}"
        problem = None
        try:
            value = json.loads(line)
            problem = None if isinstance(value, dict) else f"{type(value).__name__} instead of an object"
        except (ValueError, RecursionError) as error:
            problem = str(error)
        if problem is None:
            yield place, value
            continue
        if number == 1 and line in _OPENINGS:
            values = "." if line == "{" else "'.[]'"
            problem = f"is JSON over many lines, and has to be one object per line: jq -c {values} {name}"
        yield place, Refused(id=place, dataset=dataset, reason=Reason.ANNOTATION, detail=problem)
        if problem.startswith("is JSON"):
            return


def json_items(path: str) -> Iterator[tuple[str, Any]]:
    """Yields the entries of a large JSON file: (position, value) of an array, (key, value) of an object.

    Memory is that of the largest entry. Raises ValueError if the file is not JSON, or is neither of these.
    """
    decoder = json.JSONDecoder()
    with _open_text(path) as (file, _):
        text, at = "", 0

        def skip(characters: str) -> str:
            """Moves to the next character not in `characters`, and returns it; "" at the end of the file."""
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
                    # A number at the end of the buffer may continue.
                    if end < len(text) or not isinstance(found, (int, float)):
                        at = end
                        return found
                    more = file.read(1 << 20)
                    if not more:
                        at = end
                        return found
                except RecursionError as error:
                    raise ValueError(f"{posixpath.basename(path)} is nested too deeply") from error
                except ValueError:
                    more = file.read(max(1 << 20, len(text)))
                    if not more:
                        raise
                text, at = text[at:] + more, 0

        opening = skip(_SPACE)
        if opening not in ("[", "{"):
            raise ValueError(f"{posixpath.basename(path)} is neither a JSON array nor a JSON object")
        at += 1
        closing, position = ("]", 0) if opening == "[" else ("}", 0)
        while (character := skip(_SPACE + ",")) != closing:
            if not character:
                raise ValueError(f"{posixpath.basename(path)} ends inside of its {position}th entry")
            if opening == "[":
                yield str(position), value()
            else:
                key = value()
                if skip(_SPACE) != ":":
                    raise ValueError(f"{posixpath.basename(path)} has no value for the key {key!r}")
                at += 1
                yield str(key), value()
            position += 1
