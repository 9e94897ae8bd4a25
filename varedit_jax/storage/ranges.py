"""Reads ranges of bytes of a file of any kind of storage: the parts that are needed, and nothing else. Or all of it."""

import os
import pathlib
from collections.abc import Sequence

import fsspec

from varedit_jax.storage.paths import is_remote

Range = tuple[int, int]  # first byte, number of bytes


def read_ranges(path: pathlib.Path, ranges: Sequence[Range]) -> list[bytes]:
    """Returns these ranges of a file; one behind its end is shorter. Raises the storage's error."""
    if is_remote(path):
        scheme, _, place = os.fspath(path).partition("://")
        starts, ends = [start for start, _ in ranges], [start + length for start, length in ranges]
        return list(fsspec.filesystem(scheme).cat_ranges([place] * len(ranges), starts, ends, on_error="raise"))
    with path.open("rb", buffering=0) as file:
        return [_read(file.fileno(), start, length) for start, length in ranges]


def read_whole(path: pathlib.Path) -> bytes:
    """Returns a file that another process may be replacing: what was there before or after. Raises the storage's error.

    A file that s3fs (2026.9) opens is read in later requests, which fail if the object has been replaced since.
    """
    if is_remote(path):
        scheme, _, place = os.fspath(path).partition("://")
        return bytes(fsspec.filesystem(scheme).cat_file(place))
    return path.read_bytes()


def _read(file: int, start: int, length: int) -> bytes:
    """Returns a range of an open local file; the system may give less at a time (2 GiB at most)."""
    parts: list[bytes] = []
    while length > 0 and (part := os.pread(file, length, start)):
        parts.append(part)
        start, length = start + len(part), length - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
