"""Files of a data set as it was downloaded: found by name, lists read entry by entry, images read by safe names."""

import errno
import fnmatch
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipelines.reasons import Reason
from data_pipelines.sources.entries import MAX_FILE_BYTES, Refused
from varedit_jax.errors import UserError

_SPACE = " \t\r\n"
_OUTSIDE = re.compile(r"^/|^[A-Za-z]:|[\\\0]")  # absolute paths, and characters that other systems take for more


def safe_name(name: object) -> str | None:
    """Returns a name in a data set as a plain relative path; None if it is absolute, leaves it, or is no name."""
    if not isinstance(name, str) or _OUTSIDE.search(name):
        return None
    pieces = [piece for piece in name.split("/") if piece not in ("", ".")]
    return "/".join(pieces) if pieces and ".." not in pieces else None


def find(inputs: Sequence[pathlib.Path], *patterns: str) -> list[pathlib.Path]:
    """Files given, or lying anywhere under directories given, whose path ends like one of the patterns; sorted.

    Patterns are of `fnmatch`, matched with the last components: `annotations/split_*.jsonl`. Raises UserError if an
    input does not exist.
    """
    found = set()
    for path in inputs:
        if not path.exists():
            raise UserError(f"there is no {path}; give files or directories as they were downloaded")
        for file in path.rglob("*") if path.is_dir() else [path]:
            name = f"/{file.as_posix()}"
            if any(fnmatch.fnmatchcase(name, f"*/{pattern}") for pattern in patterns) and file.is_file():
                found.add(file)
    return sorted(found)


def distinct(files: Sequence[pathlib.Path]) -> Sequence[pathlib.Path]:
    """The same files. Raises UserError if two have the same name, where ids of records are made of it."""
    known: dict[str, pathlib.Path] = {}
    for file in files:
        if known.setdefault(file.name, file) != file:
            raise UserError(
                f"{known[file.name]} and {file} have the same name, and so would their records; give one of them, or "
                f"rename it"
            )
    return files


def relative_name(file: pathlib.Path, inputs: Sequence[pathlib.Path]) -> str:
    """Name of a file below the directory that was given, or its own name where it was given itself."""
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
                except RecursionError as error:
                    raise ValueError(f"{pathlib.Path(path).name} is nested too deeply") from error
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


def _lies_in(path: pathlib.Path, directory: pathlib.Path) -> bool:
    """Returns True if a file, links resolved, lies in a directory; the Hub's cache links snapshots/ to blobs/."""
    if path.is_relative_to(directory.resolve()):
        return True
    snapshots = [above for above in directory.absolute().parents if above.name == "snapshots"]
    return any(path.parent == (above.parent / "blobs").resolve() for above in snapshots)


def read_below(directories: Sequence[pathlib.Path], name: object) -> bytes | Reason:
    """Bytes of the file `name` in the first directory that has it; MISSING, UNSAFE or SIZE if there are none.

    A name never leads out of the directories, not over links either; those of the Hub's cache are followed. Raises
    UserError if a file cannot be read.
    """
    plain = safe_name(name)
    if plain is None:
        return Reason.UNSAFE if name else Reason.MISSING
    for directory in directories:
        path = directory / plain
        try:
            if path.is_file():
                if not _lies_in(path.resolve(), directory):
                    return Reason.UNSAFE
                return path.read_bytes() if path.stat().st_size <= MAX_FILE_BYTES else Reason.SIZE
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:  # some text in place of a name
                return Reason.MISSING
            raise UserError(
                f"cannot read {path}: {error.strerror}; put it right and run the same command again"
            ) from error
    return Reason.MISSING
