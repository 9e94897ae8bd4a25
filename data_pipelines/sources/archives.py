"""Tar archives as downloaded, split into parts or not, compressed or not, read without unpacking."""

import contextlib
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from data_pipelines.reasons import Reason
from data_pipelines.sources import tars, unpacked
from data_pipelines.sources.entries import MAX_FILE_BYTES
from data_pipelines.sources.files import Volume, is_clutter, open_input, safe_name
from data_pipelines.sources.tars import LostBytes, Tar, TarEntry
from varedit_jax.errors import UserError

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
# For files.find: whole archives, and those split into parts.
PATTERNS = tuple(f"*{ending}{part}" for ending in ENDINGS for part in ("", ".part*", ".split*"))

# NAME.tar.gz.part-aa, NAME.tar.gz.part001, NAME.tar.split.000
_PART = re.compile(
    rf"(?P<name>.+(?:{'|'.join(map(re.escape, ENDINGS))}))(?:\.(?:part|split)[-.]?(?P<part>\d+|[A-Za-z]+))?"
)


class Member(NamedTuple):
    """A file read from an archive."""

    name: str  # plain relative path
    data: bytes


class Damage(NamedTuple):
    """A refused member of an archive. Reason.ARCHIVE means a place without a sound member, told by `detail`."""

    name: str
    reason: Reason
    detail: str


class Item(NamedTuple):
    """A place of an archive: None is an end mark, behind which other tars may follow."""

    start: int  # position in the archive, or in its contents if it is compressed
    what: Member | Damage | None


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
    """Returns True if an archive is compressed, regardless of its name."""
    with open_input(files[0], buffer=16) as file:
        return unpacked.is_compressed(file.read(16))


@contextlib.contextmanager
def open_tar(files: Sequence[str], buffer: int = 1 << 17) -> Iterator[Tar]:
    """Opens an archive, compressed or not."""
    with open_input(*files, buffer=buffer) as file:
        if is_compressed(files):
            contents = unpacked.Unpacked(file)
            yield Tar(contents, contents.breaks)
        else:
            yield Tar(file, {})


def bytes_to_share(files: Sequence[str]) -> int:
    """Returns the size of an archive that can be read from anywhere in it; 0 for another."""
    if is_compressed(files):
        return 0
    with open_tar(files) as tar:
        return tar.size() if tar.has_magic else 0


def _problem(info: tarfile.TarInfo, name: str | None) -> tuple[Reason, str] | None:
    if name is None:
        return Reason.UNSAFE, "leaves the directory"
    if not info.isreg():
        return Reason.UNSAFE, "is no regular file"
    if not 0 <= info.size <= MAX_FILE_BYTES:
        return Reason.SIZE, f"{info.size} bytes"
    return None


def _refused(found: TarEntry, files: Sequence[str]) -> Damage | None:
    """Returns why what was found is no file to use; None if it is one."""
    if isinstance(found.what, LostBytes):
        where = f"bytes {found.start} to {found.what.end}" if found.what.end > found.start else f"byte {found.start}"
        return Damage(posixpath.basename(files[0]), Reason.ARCHIVE, f"{where}: {found.what.why}")
    assert found.what
    problem = _problem(found.what, safe_name(found.what.name))
    return Damage(found.what.name, *problem) if problem else None


def _passed_over(found: TarEntry) -> bool:
    return isinstance(found.what, tarfile.TarInfo) and (found.what.isdir() or is_clutter(found.what.name))


def items(
    tar: Tar, files: Sequence[str], wanted: Callable[[str], bool] | None = None, start: int = 0
) -> Iterator[Item]:
    """Yields what lies in an archive from a position on, in order; one member is in memory at a time.

    Regular files whose names are not `wanted` are left out, directories and clutter of file systems too. Refused are
    names that leave the directory, links, devices, absurd sizes, and places that are damaged or cut short.
    """

    def is_read(info: tarfile.TarInfo) -> bool:
        name = safe_name(info.name)
        return not is_clutter(info.name) and not _problem(info, name) and (wanted is None or wanted(str(name)))

    for found in tar.walk(start, is_read):
        if _passed_over(found):
            continue
        if found.what is None:
            yield Item(found.start, None)
        elif damage := _refused(found, files):
            yield Item(found.start, damage)
        elif found.data is not None:
            yield Item(found.start, Member(str(safe_name(found.what.name)), found.data))  # type: ignore[union-attr]


def members(files: Sequence[str], wanted: Callable[[str], bool] | None = None) -> Iterator[Member | Damage]:
    """Yields the `items` of an archive that are not end marks."""
    with open_tar(files) as tar:
        for item in items(tar, files, wanted):
            if item.what is not None:
                yield item.what


def items_from(files: Sequence[str], offset: int, margin: int) -> Iterator[Item]:
    """Yields the items of an uncompressed archive from some place on that is `margin` or more bytes before `offset`.

    They are those that reading from the beginning yields, whatever the archive holds. Of an archive that is nothing
    unusual, no more than tars.LONGEST and a few margins before `offset` are read.
    """
    with open_tar(files) as tar:
        back, entry = margin, None
        while entry is None:
            first = offset - tars.LONGEST - back
            entry = 0 if first <= 0 else tar.entry(first, offset - margin // 2)
            back *= 2
        if not entry:
            yield Item(0, None)  # nothing is before it
        yield from items(tar, files, start=entry)


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
        self._places: dict[str, tuple[tuple[int, int], ...]] = {}  # offset and size of each file of that name
        self._volume = Volume(files)
        with open_tar(files, buffer=1 << 13) as tar:  # small, since file contents between headers are skipped
            for found in tar.walk(0, lambda _: False):
                if found.what is None or _passed_over(found):
                    continue
                if damage := _refused(found, files):
                    self.damage.append(damage)
                elif isinstance(found.what, tarfile.TarInfo):
                    key = tail(str(safe_name(found.what.name)))
                    self._places[key] = (*self._places.get(key, ()), (found.what.offset_data, found.what.size))

    def __enter__(self) -> "TarIndex":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Closes the open file, which the next read opens again."""
        self._volume.release()

    def read(self, name: str) -> bytes | Reason:
        """Returns a file's bytes, or MISSING, AMBIGUOUS, or ARCHIVE if the archive is truncated.

        Files of one name that are equal are no more than one.
        """
        found: bytes | Reason = Reason.MISSING
        for place in self._places.get(tail(name), ()):
            data = self._read(*place)
            if isinstance(found, bytes) and data != found:
                return Reason.AMBIGUOUS
            found = data
        return found

    def _read(self, offset: int, size: int) -> bytes | Reason:
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
