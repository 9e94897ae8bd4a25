"""Files of a downloaded data set: found by pattern, read as bytes, images by safe names."""

import bisect
import collections
import contextlib
import errno
import fnmatch
import io
import itertools
import os
import posixpath
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec

from data_pipelines.reasons import Reason
from data_pipelines.sources.entries import MAX_FILE_BYTES
from data_pipelines.sources.search import Search, current
from varedit_jax.errors import UserError
from varedit_jax.storage import disk, paths
from varedit_jax.storage.pointers import HEAD_BYTES, what_instead

_BUFFER = 1 << 17
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


def safe_name(name: object) -> str | None:
    """Returns a name as a plain relative path; None if it is absolute, contains `..`, or is not a name."""
    if not isinstance(name, str) or _OUTSIDE.search(name):
        return None
    pieces = [piece for piece in name.split("/") if piece not in ("", ".")]
    return "/".join(pieces) if pieces and ".." not in pieces else None


def is_clutter(name: str) -> bool:
    """Returns True for what systems and programs leave beside files: attributes, thumbnails, headers of archives."""
    return _CLUTTER.search(name) is not None


def find(inputs: Sequence[str], *patterns: str, any_split: bool = False) -> list[str]:
    """Returns the input files, and files anywhere below input directories, that match one of the patterns; sorted.

    Patterns are `fnmatch` patterns of the last components: `annotations/split_*.jsonl`. Linked directories are
    followed; one that is reached in two ways is read in one. Clutter is passed over. The search around lists files of
    other splits, unless `any_split`, and what is in the place of a file that is not there. Raises UserError if an input
    does not exist, ReadError if a directory or a file cannot be read.
    """
    search, found = current(), set()
    for file in _files(inputs, search):
        if not any(fnmatch.fnmatchcase(f"/{file}", f"*/{pattern}") for pattern in patterns):
            continue
        if is_clutter(name := relative_name(file, inputs)):
            continue
        if paths.is_remote(file) or os.path.isfile(file):
            found.add(file)
        elif os.path.islink(file):  # otherwise a pipe
            search.leave(file, name, Reason.NOT_THERE, "is a link to nothing: download the file")
    files = sorted(found, key=lambda file: file.split("/"))
    below = {file: relative_name(file, inputs) for file in files if file not in inputs}
    others = {file for file, name in below.items() if not (any_split or search.is_of_splits(file, name))}
    search.look_for_missing(name for file, name in below.items() if file not in others)
    return [file for file in files if file not in others and _is_there(file, inputs, search)]


def _is_there(file: str, inputs: Sequence[str], search: Search) -> bool:
    """Returns False if something else is in the place of a file."""
    if file in search.sound:
        return True
    with open_input(file, buffer=HEAD_BYTES) as opened:
        instead = what_instead(opened.read(HEAD_BYTES))
    if instead:
        search.leave(file, relative_name(file, inputs), Reason.NOT_THERE, instead)
    else:
        search.sound.add(file)
    return not instead


def _files(inputs: Sequence[str], search: Search) -> Iterator[str]:
    """Yields the input files, and those below input directories."""
    directories = []
    for text in inputs:
        path = paths.resolve(text)
        with reading(text):
            exists, is_directory = path.exists(), path.is_dir()
        if not exists:
            raise UserError(f"there is no {text}; give files or directories as they were downloaded")
        if not is_directory:
            yield text
        elif paths.is_remote(path):
            with reading(text):
                store, bare = fsspec.core.url_to_fs(text)
                yield from (store.unstrip_protocol(name) for name in store.find(bare))  # one listing, no directories
        else:
            directories.append(text)
    yield from _below(directories, inputs, search)


def _below(directories: Sequence[str], inputs: Sequence[str], search: Search) -> Iterator[str]:
    """Yields the files below local directories. Links are followed last, so that directories have their own names."""
    todo = collections.deque((directory, os.path.realpath(directory)) for directory in directories)
    tops, links = dict(todo), list[str]()
    known: dict[str, str] = {}  # directories by their real paths
    while todo or links:
        above, real = todo.popleft() if todo else ((link := links.pop(0)), os.path.realpath(link))
        # A link may lead to what an input lies in.
        inside = [top for top, path in tops.items() if path.startswith(f"{real.rstrip('/')}/")]
        first = known.setdefault(real, inside[0] if inside and above not in tops else above)
        if first != above:
            detail = f"is the same directory as {relative_name(first, inputs)}, or around it"
            search.leave(above, relative_name(above, inputs), Reason.TWICE, detail)
            continue
        with reading(above), os.scandir(above) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = posixpath.join(above, entry.name)
                if not (os.path.isdir(path) if entry.is_symlink() else entry.is_dir()):
                    yield path
                elif entry.is_symlink():
                    bisect.insort(links, path)
                else:
                    todo.append((path, posixpath.join(real, entry.name)))


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


def _lies_in(path: str, directory: str) -> bool:
    """Returns True unless a file is a link out of a directory; the Hub's cache links snapshots/ to blobs/."""
    if not os.path.islink(path):
        return True
    real, above = os.path.realpath(path), os.path.realpath(directory)
    if real.startswith(f"{above.rstrip('/')}/"):
        return True
    cache, snapshots, _ = f"{os.path.abspath(directory)}/".rpartition("/snapshots/")
    return bool(snapshots) and os.path.dirname(real) == os.path.realpath(f"{cache}/blobs")


def read_below(directories: Sequence[str], name: object) -> bytes | Reason:
    """Returns the bytes of file `name` in the first directory that has it; otherwise MISSING, UNSAFE or SIZE.

    An absolute name, and one with `..`, which is relative to the first directory, has to lead into one of them, however
    that is spelled. A name never leads out of the directories, except by a link to a directory, or of the Hub's cache.
    Raises ReadError if a file exists but cannot be read.
    """
    place = _place(directories, name)
    if place is None:
        return Reason.UNSAFE if name else Reason.MISSING
    directories, plain = place
    spellings = dict.fromkeys([plain, *(unicodedata.normalize(form, plain) for form in ("NFC", "NFD"))])
    for directory, spelling in itertools.product(directories, filter(_can_be, spellings)):
        path = posixpath.join(directory, spelling)
        with reading(path):
            found = _read_object(path) if paths.is_remote(path) else _read_local(path, directory)
        if found is not Reason.MISSING:
            return found
    return Reason.MISSING


def _place(directories: Sequence[str], name: object) -> tuple[Sequence[str], str] | None:
    """Returns the directories in which a name of a list may be, and a plain path there; None if it leads out."""
    if not isinstance(name, str) or "\0" in name:
        return None
    name = name.replace("\\", "/")
    for directory in directories:
        if name.startswith(f"{directory}/") and (plain := safe_name(name.removeprefix(f"{directory}/"))):
            return [directory], plain
    if name.startswith("~/"):
        name = os.path.expanduser(name)
    plain = safe_name(name)
    if plain or not (name.startswith("/") or ".." in name.split("/")) or paths.is_remote(directories[0]):
        return (directories, plain) if plain else None
    path = os.path.normpath(posixpath.join(directories[0], name))
    for directory, spelled in itertools.product(directories, (lambda path: path, os.path.realpath)):
        above = f"{spelled(directory).rstrip('/')}/"
        if spelled(path).startswith(above):
            return [directory], spelled(path)[len(above) :]
    return None


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
