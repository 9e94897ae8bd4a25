"""Tar archives as they are downloaded: split into parts, compressed or not, read without unpacking."""

import bisect
import gzip
import io
import itertools
import os
import pathlib
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from data_pipelines.reasons import Reason
from data_pipelines.sources.entries import MAX_FILE_BYTES
from data_pipelines.sources.files import safe_name
from varedit_jax.errors import UserError

_BUFFER = 1 << 17
_DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, RecursionError)

# NAME.tar.gz.part-aa, NAME.tar.gz.part001, NAME.tar.split.000
_PART = re.compile(r"(?P<name>.+\.(?:tar|tar\.gz|tgz))(?:\.(?:part|split)[-.]?(?P<part>\d+|[A-Za-z]+))?")


class Volume(io.RawIOBase):
    """Files read as if they were one, in the order given."""

    def __init__(self, files: Sequence[str]) -> None:
        """Raises OSError if one is missing."""
        self._files = list(files)
        self._starts = list(itertools.accumulate((os.path.getsize(file) for file in files), initial=0))
        self._position = 0
        self._open: tuple[int, Any] | None = None

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Place in the whole."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Goes to a place in the whole."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._starts[-1]}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Reads up to the end of the file that the place lies in."""
        if self._position >= self._starts[-1]:
            return 0
        index = bisect.bisect_right(self._starts, self._position) - 1
        if self._open is None or self._open[0] != index:
            self._close_file()
            self._open = (index, open(self._files[index], "rb", buffering=0))  # noqa: SIM115 - closed by close()
        file = self._open[1]
        file.seek(self._position - self._starts[index])
        count = file.readinto(buffer)
        self._position += count
        return count

    def _close_file(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def close(self) -> None:
        """Closes the file that is open."""
        self._close_file()
        super().close()


class Member(NamedTuple):
    """A file in an archive that was read."""

    name: str  # plain relative path
    data: bytes


class Damage(NamedTuple):
    """Something in an archive that was not read. After Reason.ARCHIVE nothing more of the archive comes."""

    name: str
    reason: Reason
    detail: str


def group_parts(files: Sequence[pathlib.Path]) -> dict[str, list[str]]:
    """Archives by name, each with its parts in order: numbers as numbers, `aa`, `ab`, ... by letters.

    Raises UserError if a part before the last is missing, since all after it could not be read. Letters begin with
    `aa`, numbers with 0 or 1.
    """
    groups: dict[str, dict[int, str]] = {}
    for file in files:
        if match := _PART.fullmatch(file.name):
            number = _part_number(match["part"] or "0")
            groups.setdefault(str(file.with_name(match["name"])), {})[number] = str(file)
    for name, parts in groups.items():
        first = pathlib.Path(parts[min(parts)]).name
        if min(parts) > int(first[-1].isdecimal()):
            raise UserError(f"the parts of {name} that are there begin with {first}; download those before it too")
        for number in range(min(parts), max(parts)):
            if number not in parts:
                raise UserError(
                    f"{name} has {len(parts)} parts, but the one after {pathlib.Path(parts[number - 1]).name} is "
                    f"missing; download it too"
                )
    return {name: [parts[number] for number in sorted(parts)] for name, parts in sorted(groups.items())}


def _part_number(part: str) -> int:
    """Place of a part among others: a number, or letters as the digits of one."""
    if part.isdecimal():
        return int(part)
    number = 0
    for letter in part.lower():
        number = number * 26 + ord(letter) - ord("a")
    return number


def is_compressed(files: Sequence[str]) -> bool:
    """Whether an archive is compressed with gzip, whatever its name."""
    with open(files[0], "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _infos(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Headers in order. Unlike TarFile.next it neither remembers them all nor takes a damaged one for the end."""
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
        if tar.offset <= start:  # a size below 0; the same headers would come again, without end
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
    """Regular files of an archive in their order, and what was refused; one member is in memory at a time.

    Only those whose names are `wanted` are read. Names that leave the directory, links, devices and absurd sizes are
    refused; so is the rest of an archive from where it is damaged or cut short.
    """
    archive = pathlib.Path(files[0]).name
    try:
        with Volume(files) as volume, io.BufferedReader(volume, _BUFFER) as buffered:
            # Sought forward only, which in a compressed stream is reading on.
            stream = io.BufferedReader(gzip.GzipFile(fileobj=buffered), _BUFFER) if is_compressed(files) else buffered  # type: ignore[type-var]
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
        yield Damage(archive, Reason.ARCHIVE, str(error) or type(error).__name__)


def tail(name: str, components: int = 2) -> str:
    """The last components of a path."""
    return "/".join(name.split("/")[-components:])


class TarIndex:
    """Where the files of an uncompressed archive lie, so that they can be read in any order.

    Files are known by the last two components of their paths, since what archives have above differs from what
    annotations say. The index takes about 250 bytes of memory a file.
    """

    def __init__(self, files: Sequence[str]) -> None:
        """Reads the headers alone. What is damaged is in `damage`."""
        self.damage: list[Damage] = []
        self._places: dict[str, tuple[int, int] | None] = {}  # None where two files have the same name
        self._volume = Volume(files)
        try:
            # A small buffer: between headers it is sought ahead.
            with io.BufferedReader(Volume(files), 1 << 13) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for info in _infos(tar):
                    self._add(info)
        except _DAMAGE as error:
            self.damage.append(Damage(pathlib.Path(files[0]).name, Reason.ARCHIVE, str(error) or type(error).__name__))

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
        self._volume.close()

    def read(self, name: str) -> bytes | Reason:
        """A file's bytes, or why there are none: MISSING, AMBIGUOUS, or ARCHIVE where the archive is cut short."""
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
    """Name of the first regular file in an archive, as a plain path; None if it has none that can be read."""
    found = members(files, wanted=lambda _: True)
    member = next((member for member in found if isinstance(member, Member)), None)
    found.close()  # type: ignore[attr-defined]
    return member.name if member else None
