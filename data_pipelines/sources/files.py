"""Files of a downloaded data set: found by pattern, read as bytes or by entry, images by safe names."""

import bisect
import contextlib
import errno
import fnmatch
import io
import itertools
import json
import os
import posixpath
import re
import stat
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec

from data_pipelines.reasons import Reason
from data_pipelines.sources.entries import MAX_FILE_BYTES, Refused
from varedit_jax.errors import UserError
from varedit_jax.storage import disk, paths

_BUFFER = 1 << 17
_SPACE = " \t\r\n"
# The file does not exist; text in place of a name may be too long for one.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_OUTSIDE = re.compile(r"^/|^[A-Za-z]:|[\\\0]")  # absolute paths, and characters special to other systems

_CLUTTER = re.compile(r"(?:^|/)(?:\._[^/]*|\.DS_Store|__MACOSX|Thumbs\.db|desktop\.ini|PaxHeaders?(?:\.\d+)?)(?:/|$)")


class ReadError(Exception):
    """The machine cannot read an input: no permission, a bad disk, no free file handle.

    The text is one sentence for the user. It is neither an OSError nor a ValueError, which parsers raise.
    """


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Turns any exception in the block, which only reads bytes, into a ReadError."""
    try:
        yield
    except Exception as error:  # network clients have their own exceptions
        raise ReadError(
            f"cannot read {path}: {disk.reason(error)}; put it right and run the same command again"
        ) from error


class Volume(io.RawIOBase):
    """Files concatenated in the order given, of which one is open at a time.

    Reading raises ReadError only, so that any other exception of a parser is about the data.
    """

    def __init__(self, files: Sequence[str]) -> None:
        """Raises ReadError if one is missing."""
        self._files, self._position = list(files), 0
        self._open: tuple[int, Any] | None = None
        sizes = []
        for file in files:
            with reading(file):
                sizes.append(paths.size(paths.resolve(file)))
        self._starts = list(itertools.accumulate(sizes, initial=0))

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def tell(self) -> int:
        """Returns the position in the concatenation."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a position in the concatenation, and returns it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._starts[-1]}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Reads at most up to the end of the file at the current position."""
        if self._position >= self._starts[-1]:
            return 0
        index = bisect.bisect_right(self._starts, self._position) - 1
        with reading(self._files[index]):
            if self._open is None or self._open[0] != index:
                self.release()
                self._open = (index, _open(self._files[index]))
            file = self._open[1]
            file.seek(self._position - self._starts[index])
            count = file.readinto(buffer)
        self._position += count
        return count

    def release(self) -> None:
        """Closes the open file, which the next read opens again."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def close(self) -> None:
        """Closes the open file."""
        self.release()
        super().close()


def _open(path: str) -> Any:
    return paths.resolve(path).open("rb") if paths.is_remote(path) else open(path, "rb", buffering=0)


def open_input(*files: str, buffer: int = _BUFFER) -> io.BufferedReader:
    """Opens files as one seekable file. Reading raises ReadError if the machine fails."""
    return io.BufferedReader(Volume(files), buffer)


def _open_text(path: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_input(path), encoding="utf-8", errors="replace")


def safe_name(name: object) -> str | None:
    """Returns a name as a plain relative path; None if it is absolute, contains `..`, or is not a name."""
    if not isinstance(name, str) or _OUTSIDE.search(name):
        return None
    pieces = [piece for piece in name.split("/") if piece not in ("", ".")]
    return "/".join(pieces) if pieces and ".." not in pieces else None


def is_clutter(name: str) -> bool:
    """Returns True for what systems and programs leave beside files: attributes, thumbnails, headers of archives."""
    return _CLUTTER.search(name) is not None


def find(inputs: Sequence[str], *patterns: str) -> list[str]:
    """Returns the input files, and files anywhere below input directories, that match one of the patterns; sorted.

    Patterns are `fnmatch` patterns of the last components: `annotations/split_*.jsonl`. Raises UserError if an input
    does not exist, ReadError if a directory cannot be listed.
    """
    found = set()
    for path in inputs:
        for file in _walk(path):
            matches = any(fnmatch.fnmatchcase(f"/{file}", f"*/{pattern}") for pattern in patterns)
            if matches and (paths.is_remote(file) or os.path.isfile(file)):  # neither a pipe nor a broken link
                found.add(file)
    return sorted(found, key=lambda file: file.split("/"))


def _walk(text: str) -> Iterator[str]:
    """Yields the files below a directory, or a file itself."""
    path = paths.resolve(text)
    with reading(text):
        exists, is_directory = path.exists(), path.is_dir()
    if not exists:
        raise UserError(f"there is no {text}; give files or directories as they were downloaded")
    if not is_directory:
        yield text
        return

    def refuse(error: OSError) -> None:
        raise error

    with reading(text):
        if paths.is_remote(path):
            store, bare = fsspec.core.url_to_fs(text)
            yield from (store.unstrip_protocol(name) for name in store.find(bare))  # one listing, without directories
        else:
            for above, _, names in os.walk(path, onerror=refuse):
                yield from (posixpath.join(above, name) for name in names)


def distinct(files: Sequence[str]) -> Sequence[str]:
    """Returns the same files. Raises UserError if two have the same name, which record ids contain."""
    known: dict[str, str] = {}
    for file in files:
        if (other := known.setdefault(posixpath.basename(file), file)) != file:
            raise UserError(
                f"{other} and {file} have the same name, and so would their records; give one of them, or rename it"
            )
    return files


def relative_name(file: str, inputs: Sequence[str]) -> str:
    """Returns the path of a file relative to the input directory, or its name if it is an input itself."""
    above = next((path for path in inputs if file.startswith(f"{path.rstrip('/')}/")), posixpath.dirname(file))
    return file[len(above.rstrip("/")) + 1 :]


def stem(path: str) -> str:
    """Returns the name of a file without its last suffix."""
    return posixpath.splitext(posixpath.basename(path))[0]


def read_lines(path: str, dataset: str) -> Iterator[tuple[str, dict[str, Any] | Refused]]:
    """Yields the objects of a JSONL file with their place, FILE:LINE; Refused for damaged lines. Skips empty lines."""
    name = posixpath.basename(path)
    with _open_text(path) as file:
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
    """Yields the entries of a large JSON file: (position, value) of an array, (key, value) of an object.

    Memory is that of the largest entry. Raises ValueError if the file is not JSON, or is neither of these.
    """
    decoder = json.JSONDecoder()
    with _open_text(path) as file:
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


def _lies_in(path: str, directory: str) -> bool:
    """Returns True if a file is in a directory after resolving links; the Hub's cache links snapshots/ to blobs/."""
    real, above = os.path.realpath(path), os.path.realpath(directory)
    if real.startswith(f"{above.rstrip('/')}/"):
        return True
    cache, snapshots, _ = f"{os.path.abspath(directory)}/".rpartition("/snapshots/")
    return bool(snapshots) and os.path.dirname(real) == os.path.realpath(f"{cache}/blobs")


def read_below(directories: Sequence[str], name: object) -> bytes | Reason:
    """Returns the bytes of file `name` in the first directory that has it; otherwise MISSING, UNSAFE or SIZE.

    A name never leads out of the directories, not through links either, except those of the Hub's cache. Raises
    ReadError if a file exists but cannot be read.
    """
    plain = safe_name(name)
    if plain is None:
        return Reason.UNSAFE if name else Reason.MISSING
    for directory in directories if _can_be(plain) else ():
        path = posixpath.join(directory, plain)
        with reading(path):
            found = _read_object(path) if paths.is_remote(path) else _read_local(path, directory)
        if found is not Reason.MISSING:
            return found
    return Reason.MISSING


def _can_be(name: str) -> bool:
    """Returns True if a text can be a file name on some system."""
    try:
        return max(map(len, name.encode().split(b"/"))) <= 255
    except UnicodeEncodeError:
        return False


def _read_object(path: str) -> bytes | Reason:
    try:
        with _open(path) as file:
            return file.read() if file.size <= MAX_FILE_BYTES else Reason.SIZE
    except (FileNotFoundError, IsADirectoryError):
        return Reason.MISSING


def _read_local(path: str, directory: str) -> bytes | Reason:
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno in _NO_FILE:
            return Reason.MISSING
        raise
    if not stat.S_ISREG(status.st_mode):
        return Reason.MISSING
    if not _lies_in(path, directory):
        return Reason.UNSAFE
    if status.st_size > MAX_FILE_BYTES:
        return Reason.SIZE
    with open(path, "rb") as file:
        return file.read()
