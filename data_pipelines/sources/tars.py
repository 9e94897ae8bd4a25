"""Tars read to their end: header by header, on behind end marks, and from the next sound header behind damage.

Where reading goes on is a function of the bytes from there on, so that two readers that meet once stay together. That
is how a reader can begin in the middle of an archive, see `Tar.entry`.
"""

import enum
import itertools
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from data_pipelines.sources.entries import MAX_FILE_BYTES
from data_pipelines.sources.files import ReadError

_BLOCK = tarfile.BLOCKSIZE
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
             tarfile.GNUTYPE_LONGLINK)  # fmt: skip
_LONGEST_NAME = 1 << 20  # bytes of an extended header, which has a name; a longer one is damage
_LONGEST_HEADER = 4 << 20  # bytes of all headers of a member
LONGEST = _LONGEST_HEADER + MAX_FILE_BYTES + _BLOCK  # bytes that a sound member can take
_CHUNK = 1 << 16
_MAGIC, _MAGIC_AT = b"ustar", 257


class LostBytes(NamedTuple):
    """Bytes without a sound member."""

    end: int
    why: str


class TarEntry(NamedTuple):
    """A place of a tar: a member, bytes that are lost, or an end mark."""

    start: int  # of the member's first header
    what: tarfile.TarInfo | LostBytes | None  # None is an end mark
    data: bytes | None = None  # of a member that was wanted


class _Kind(enum.Enum):
    ZEROS, NOISE, END = range(3)


class _Header(NamedTuple):
    info: tarfile.TarInfo
    end: int  # of the member, as the header has it

    def is_believed(self) -> bool:
        """Returns True if its size is that of a file that may be read. Others do not say where the next header is."""
        return self.info.offset_data <= self.end <= self.info.offset_data + MAX_FILE_BYTES


class _Info(tarfile.TarInfo):
    """A header that does not read extended headers of absurd sizes into memory."""

    def _proc_member(self, tar: Any) -> tarfile.TarInfo:
        if self.type in _EXTENDED and not 0 <= self.size <= _LONGEST_NAME:
            raise tarfile.InvalidHeaderError("absurd size")  # type: ignore[attr-defined]
        return super()._proc_member(tar)  # type: ignore[misc]


class Tar:
    """A tar in a seekable stream of bytes, of which nothing is remembered."""

    # What tarfile's parser of headers asks of a tar, beside the attributes in __init__.
    encoding, errors = "utf-8", "surrogateescape"

    def __init__(self, stream: Any, breaks: Mapping[int, str]) -> None:
        """`breaks` has places in which bytes are missing from the stream, known once they are passed, and why."""
        self.fileobj, self.offset = stream, 0
        self.pax_headers: dict[str, str] = {}
        self._breaks = breaks
        head = self._read_at(0, _BLOCK)
        # Headers of the oldest format, V7, have no magic. Those of others without it are damaged.
        self.has_magic = head[_MAGIC_AT:].startswith(_MAGIC) or not _is_sound(head)

    def size(self) -> int:
        """Returns the size of the archive; it is not compressed."""
        return self.fileobj.seek(0, os.SEEK_END)

    def _read_at(self, at: int, size: int) -> bytes:
        self.fileobj.seek(at)
        return self.fileobj.read(size)

    def _at(self, at: int) -> _Header | _Kind:
        """Returns the sound header at a position, or what else is there."""
        block = self._read_at(at, _BLOCK)
        if not block:
            return _Kind.END
        if block.count(0) == len(block):
            return _Kind.ZEROS
        return (self._parse(at) if self._may_be_header(block) else None) or _Kind.NOISE

    def _may_be_header(self, block: bytes) -> bool:
        return len(block) == _BLOCK and (not self.has_magic or block[_MAGIC_AT:].startswith(_MAGIC))

    def _parse(self, at: int) -> _Header | None:
        self.fileobj.seek(at)
        self.pax_headers = {}  # those for all members behind must not depend on where reading began
        try:
            info = _Info.fromtarfile(self)  # type: ignore[arg-type]
        except ReadError:
            raise
        except Exception:  # whatever a parser says of damaged bytes
            return None
        return _Header(info, self.offset) if info.offset_data - at <= _LONGEST_HEADER else None

    def heads(self, at: int) -> Iterator[int]:
        """Yields the positions at or behind `at` with a block that is a sound header, at any distance of each other."""
        window = b""
        at = at if self.has_magic else -(-at // _BLOCK) * _BLOCK
        while chunk := self._read_at(at + len(window), _CHUNK):
            window += chunk
            place = self._next_place(window, 0)
            while 0 <= place <= len(window) - _BLOCK:
                if _is_sound(window[place : place + _BLOCK]):
                    yield at + place
                place = self._next_place(window, place + 1)
            passed = max(0, len(window) - _BLOCK + 1)
            passed -= 0 if self.has_magic else passed % _BLOCK
            at, window = at + passed, window[passed:]

    def _next_place(self, window: bytes, start: int) -> int:
        if self.has_magic:
            return window.find(_MAGIC, start + _MAGIC_AT) - _MAGIC_AT
        return -(-start // _BLOCK) * _BLOCK

    def _next_head(self, at: int) -> int:
        """Returns the position of the first sound header at or behind a position, or that of the end."""
        head = next(self.heads(at), None)
        return self.fileobj.tell() if head is None else head

    def _end_of_zeros(self, at: int) -> int:
        """Returns the position of the first byte that is not zero, or of the end."""
        while chunk := self._read_at(at, _CHUNK):
            if rest := chunk.lstrip(b"\0"):
                return at + len(chunk) - len(rest)
            at += len(chunk)
        return at

    def _contents(self, header: _Header, wanted: Callable[[tarfile.TarInfo], bool]) -> tuple[bytes | None, bool]:
        """Returns the bytes of a member if it is wanted, and True if the stream has all of them."""
        info = header.info
        if info.isreg() and wanted(info):
            try:
                data = tarfile.ExFileObject(self, info).read()  # type: ignore[arg-type]
            except (tarfile.ReadError, ValueError):
                return None, False
            return data, len(data) == info.size
        return None, header.end == info.offset_data or bool(self._read_at(header.end - _BLOCK, 1))

    def _why(self, start: int, end: int) -> str | None:
        """Returns why bytes are missing between two positions; None if none are."""
        return next((why for place, why in self._breaks.items() if start < place <= end), None)

    def walk(self, at: int, wanted: Callable[[tarfile.TarInfo], bool]) -> Iterator[TarEntry]:
        """Yields what lies at `at` and behind it: every byte belongs to one TarEntry, except data of absurd size.

        A member that is cut short ends at the next sound header.
        """
        told = at - 1  # breaks up to here are
        closed = False  # True behind an end mark, or what is lost
        found = self._at(at)
        while found is not _Kind.END:
            if (why := self._why(told, at)) is not None:
                yield TarEntry(at, LostBytes(at, why))
            told, start = max(told, at), at
            if isinstance(found, _Header) and not found.is_believed():
                closed = found.end <= (at := self._next_head(found.info.offset_data))
                yield TarEntry(start, found.info)
                found = self._at(at)
            elif isinstance(found, _Header):
                data, whole = self._contents(found, wanted)
                following = self._at(found.end)
                why = self._why(start, found.end)
                whole = whole and why is None
                if not whole or following is _Kind.NOISE:
                    inside = self._next_head(found.info.offset_data)
                    if not whole or inside < found.end:
                        yield TarEntry(start, LostBytes(inside, why or f"{found.info.name} is cut short"))
                        at, told, found, closed = inside, inside, self._at(inside), True
                        continue
                yield TarEntry(start, found.info, data)
                at, found, closed = found.end, following, False
            else:
                zeros = self._end_of_zeros(start)
                at = start + (zeros - start) // _BLOCK * _BLOCK
                found = self._at(at)
                if found is _Kind.ZEROS:  # less than a block, at the end
                    at, found = zeros, _Kind.END
                is_mark = at > start
                if found is _Kind.NOISE:  # zeros may be no whole number of blocks
                    at = self._next_head(at + 1)
                    is_mark = is_mark and at == zeros
                if not is_mark:
                    yield TarEntry(start, LostBytes(at, self._why(start, at) or "no sound header"))
                    told = at
                else:
                    yield TarEntry(start, None)
                found, closed = self._at(at), True
        why = next((why for place, why in self._breaks.items() if place > told), None)
        if why is not None or not closed:
            yield TarEntry(at, LostBytes(at, why or "ends without its end mark"))

    def entry(self, first: int, offset: int) -> int | None:
        """Returns a position before `offset` by which a walk from the archive's beginning certainly comes.

        Only bytes from `first` on are looked at. `offset` is more than LONGEST behind it. Returns None if they do not
        tell: a tar in a tar, or an image with the bytes of a header, may look like the archive itself.

        Since no step is longer than LONGEST, the walk from the beginning comes by one of the sound headers of the first
        LONGEST bytes, or none are there and it passes over damage or zeros. If the walks from all of these meet, they
        have met it.
        """
        known = first + LONGEST
        heads = list(itertools.takewhile(lambda head: head <= known, self.heads(first)))
        if not heads:
            return known
        starts = list(self._starts(heads[0], offset))
        places = set(starts)
        for head in heads:
            meeting = next((start for start in self._starts(head, offset) if start in places), None)
            if meeting is None:
                return None
            known = max(known, meeting)
        return next((start for start in starts if start >= known), None)

    def _starts(self, at: int, stop: int) -> Iterator[int]:
        for found in self.walk(at, lambda _: False):
            if found.start >= stop:
                return
            yield found.start


def _is_sound(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, Tar.encoding, Tar.errors)
    except (tarfile.TarError, ValueError, IndexError):
        return False
    return True
