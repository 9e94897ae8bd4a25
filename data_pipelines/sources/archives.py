"""Tar archives as they are downloaded: split into parts, compressed or not, read without unpacking."""

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
    """A file in an archive that was read."""

    name: str  # plain relative path
    data: bytes


class Damage(NamedTuple):
    """Something in an archive that was not read. After Reason.ARCHIVE nothing more of the archive comes."""

    name: str
    reason: Reason
    detail: str


def group_parts(files: Sequence[str]) -> dict[str, list[str]]:
    """Archives by name, each with its parts in order: numbers as numbers, `aa`, `ab`, ... by letters.

    Raises UserError if a part before the last is missing, since all after it could not be read. Letters begin with
    `aa`, numbers with 0 or 1.
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
    """Place of a part among others: a number, or letters as the digits of one."""
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
    try:
        with open_input(*files) as file:
            # Sought forward only, which in a compressed stream is reading on.
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
    """The last components of a path."""
    return "/".join(name.split("/")[-components:])


class TarIndex:
    """Places of the files in an uncompressed archive, so that they can be read in any order.

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
        """Closes the file that is open, until more is read."""
        self._volume.release()

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
