"""Tar archives as downloaded, split into parts or not, compressed or not, read without unpacking."""

import gzip
import io
import posixpath
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from data_pipelines.reasons import Reason
from data_pipelines.sources.entries import MAX_FILE_BYTES
from data_pipelines.sources.files import Volume, open_input, safe_name
from varedit_jax.errors import UserError

_DAMAGE = (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, ValueError, RecursionError)

# NAME.tar.gz.part-aa, NAME.tar.gz.part001, NAME.tar.split.000
_PART = re.compile(r"(?P<name>.+\.(?:tar|tar\.gz|tgz))(?:\.(?:part|split)[-.]?(?P<part>\d+|[A-Za-z]+))?")


class Member(NamedTuple):
    """A file read from an archive."""

    name: str  # plain relative path
    data: bytes


class Damage(NamedTuple):
    """A refused member of an archive. Reason.ARCHIVE means that the rest of the archive is lost."""

    name: str
    reason: Reason
    detail: str


def group_parts(files: Sequence[str]) -> dict[str, list[str]]:
    """Returns archives by name, each with its parts in numeric order, or in the order `aa`, `ab`, ...

    Raises UserError if a part before the last is missing, as the rest could not be read. Letters begin with `aa`,
    numbers with 0 or 1.
    """
    groups: dict[str, dict[int, str]] = {}
    for file in files:
        directory, name = posixpath.split(file)
        if match := _PART.fullmatch(name):
            number = _part_number(match["part"] or "0")
            groups.setdefault(posixpath.join(directory, match["name"]), {})[number] = file
    for name, parts in groups.items():
        first = posixpath.basename(parts[min(parts)])
        if min(parts) > int(first[-1].isdecimal()):
            raise UserError(f"the parts of {name} that are there begin with {first}; download those before it too")
        for number in range(min(parts), max(parts)):
            if number not in parts:
                raise UserError(
                    f"{name} has {len(parts)} parts, but the one after {posixpath.basename(parts[number - 1])} is "
                    f"missing; download it too"
                )
    return {name: [parts[number] for number in sorted(parts)] for name, parts in sorted(groups.items())}


def _part_number(part: str) -> int:
    """Returns the number of a part; letters are its digits in base 26."""
    if part.isdecimal():
        return int(part)
    number = 0
    for letter in part.lower():
        number = number * 26 + ord(letter) - ord("a")
    return number


def is_compressed(files: Sequence[str]) -> bool:
    """Returns True if an archive is compressed with gzip, regardless of its name."""
    with open_input(files[0], buffer=16) as file:
        return file.read(2) == b"\x1f\x8b"


def _infos(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yields headers in order. Unlike TarFile.next, it does not keep them, or take a damaged one for the end."""
    info = tar.firstmember  # type: ignore[attr-defined]
    while info is not None:
        yield info
        tar.fileobj.seek(tar.offset)  # type: ignore[union-attr]
        try:
            start, info = tar.offset, tarfile.TarInfo.fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("ends without its end mark") from error
        if tar.offset <= start:  # a negative size would repeat the same headers forever
            raise tarfile.ReadError(f"{info.name} has a size of {info.size} bytes")


def _problem(info: tarfile.TarInfo, name: str | None) -> tuple[Reason, str] | None:
    if name is None:
        return Reason.UNSAFE, "leaves the directory"
    if not info.isreg():
        return Reason.UNSAFE, "is no regular file"
    if not 0 <= info.size <= MAX_FILE_BYTES:
        return Reason.SIZE, f"{info.size} bytes"
    return None


def members(files: Sequence[str], wanted: Callable[[str], bool] | None = None) -> Iterator[Member | Damage]:
    """Yields the regular files of an archive in order, and refused ones; one member is in memory at a time.

    Only files whose names are `wanted` are read. Names that leave the directory, links, devices and absurd sizes are
    refused, as is the rest of a damaged or truncated archive.
    """
    try:
        with open_input(*files) as file:
            # Seeks are forward only, which a compressed stream supports by reading.
            stream = io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 17) if is_compressed(files) else file  # type: ignore[type-var]
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for info in _infos(tar):
                    if info.isdir():
                        continue
                    name = safe_name(info.name)
                    if problem := _problem(info, name):
                        yield Damage(info.name, *problem)
                    elif wanted is None or wanted(str(name)):
                        yield Member(str(name), tar.extractfile(info).read())  # type: ignore[union-attr]
    except _DAMAGE as error:
        yield _cut_short(files, error)


def _cut_short(files: Sequence[str], error: Exception) -> Damage:
    return Damage(posixpath.basename(files[0]), Reason.ARCHIVE, str(error) or type(error).__name__)


def tail(name: str, components: int = 2) -> str:
    """Returns the last components of a path."""
    return "/".join(name.split("/")[-components:])


class TarIndex:
    """Index of an uncompressed archive, for random access.

    The keys are the last two components of paths, since archives and annotations disagree on those above. The index
    takes about 250 bytes of memory per file.
    """

    def __init__(self, files: Sequence[str]) -> None:
        """Reads only the headers. `damage` has the refused members."""
        self.damage: list[Damage] = []
        self._places: dict[str, tuple[int, int] | None] = {}  # None where two files have the same name
        self._volume = Volume(files)
        try:
            # A small buffer, since file contents between headers are skipped.
            with open_input(*files, buffer=1 << 13) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for info in _infos(tar):
                    self._add(info)
        except _DAMAGE as error:
            self.damage.append(_cut_short(files, error))

    def _add(self, info: tarfile.TarInfo) -> None:
        if info.isdir():
            return
        name = safe_name(info.name)
        if problem := _problem(info, name):
            self.damage.append(Damage(info.name, *problem))
            return
        key = tail(str(name))
        self._places[key] = None if key in self._places else (info.offset_data, info.size)

    def __enter__(self) -> "TarIndex":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Closes the open file, which the next read opens again."""
        self._volume.release()

    def read(self, name: str) -> bytes | Reason:
        """Returns a file's bytes, or MISSING, AMBIGUOUS, or ARCHIVE if the archive is truncated."""
        if tail(name) not in self._places:
            return Reason.MISSING
        place = self._places[tail(name)]
        if place is None:
            return Reason.AMBIGUOUS
        offset, size = place
        self._volume.seek(offset)
        data = bytearray(size)
        view, done = memoryview(data), 0
        while done < size:
            count = self._volume.readinto(view[done:])
            if not count:
                return Reason.ARCHIVE
            done += count
        return bytes(data)


def first_name(files: Sequence[str]) -> str | None:
    """Returns the plain path of the first regular file in an archive; None if no file can be read."""
    found = members(files, wanted=lambda _: True)
    member = next((member for member in found if isinstance(member, Member)), None)
    found.close()  # type: ignore[attr-defined]
    return member.name if member else None
