"""Append-only JSON lines: a kill leaves all written lines, and at most one that is cut short."""

import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from varedit_jax.errors import UserError
from varedit_jax.storage import disk
from varedit_jax.storage.files import make_directory, write_bytes
from varedit_jax.storage.paths import is_remote

FLUSH_SECONDS = 30.0  # between two writes to an object store, which cannot append: each rewrites the whole object

Line = dict[str, Any]


class LineWriter:
    """Appends lines to a file. A line is durable at once locally, and after `flush` in an object store."""

    def __init__(self, path: pathlib.Path) -> None:
        """Opens or creates the file, and terminates a last line that was cut short. Raises UserError."""
        self.path = path
        self._file: BinaryIO | None = None
        self._lines = b""  # the whole content, in an object store
        self._flushed = time.monotonic()
        self._pending = False
        with disk.explained(path.name, path.parent):
            make_directory(path.parent)
            existing = path.read_bytes() if path.exists() else b""
            torn = bool(existing) and not existing.endswith(b"\n")
            if is_remote(path):
                self._lines = existing + b"\n" * torn
            else:
                self._file = path.open("ab", buffering=0)
                if torn:
                    self._file.write(b"\n")

    def append(self, line: Mapping[str, Any]) -> None:
        """Appends a line. Raises UserError if the disk is full."""
        data = json.dumps(line).encode() + b"\n"
        if self._file is not None:
            with disk.explained(self.path.name, self.path.parent):
                self._file.write(data)
            return
        self._lines += data
        self._pending = True
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Makes all lines so far durable."""
        if self._pending:
            with disk.explained(self.path.name, self.path.parent):
                write_bytes(self.path, self._lines)
            self._pending, self._flushed = False, time.monotonic()

    def close(self) -> None:
        """Flushes and closes."""
        self.flush()
        if self._file is not None:
            self._file.close()


def read_lines(path: pathlib.Path) -> list[Line]:
    """Returns the JSON objects of a file in order, without broken lines; [] if there is no file.

    Raises OSError if the file cannot be read, UserError if a directory is in its place.
    """
    if path.is_dir():
        raise UserError(f"{path} is a directory, but a file of lines belongs there; move it away")
    if not path.exists():
        return []
    lines = []
    for text in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):  # UnicodeDecodeError is the first
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines


def keep_lines(path: pathlib.Path, wanted: Callable[[Line], bool]) -> None:
    """Drops unwanted and broken lines, atomically. Raises UserError."""
    if path.exists():
        with disk.explained(path.name, path.parent):
            kept = [line for line in read_lines(path) if wanted(line)]
            write_bytes(path, b"".join(json.dumps(line).encode() + b"\n" for line in kept))
