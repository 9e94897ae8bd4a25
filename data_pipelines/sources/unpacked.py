"""Contents of compressed files: gzip, bzip2, xz and Zstandard, whose streams may be joined and damaged."""

import bz2
import lzma
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from varedit_jax.errors import UserError

_CHUNK = 1 << 12  # compressed bytes at a time; Zstandard can make 2^15 times as many of them
_PIECE = 1 << 16  # bytes of the contents at a time, from codecs that can stop
_KEPT = 1 << 18  # bytes of the contents to which one can go back without reading all again
_BACK = 1 << 16  # compressed bytes that may be misread before a codec notices that they are another stream's
_LONGEST = 10  # bytes of the longest of these
_MAGIC = re.compile(
    rb"\x1f\x8b\x08[\0-\x1f]|BZh[1-9](?:1AY&SY|\x17rE8P\x90)|\xfd7zXZ\0|\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"
)


def is_compressed(head: bytes) -> bool:
    """Returns True if a file with such a beginning is compressed in one of the known ways."""
    return _MAGIC.match(head) is not None


def _decoder(head: bytes) -> tuple[Any, tuple[int, ...], type[Exception]]:
    """Returns a decoder for a stream by its beginning, its limit of bytes, and the exception for damage."""
    if head.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(wbits=31), (_PIECE,), zlib.error
    if head.startswith(b"BZh"):
        return bz2.BZ2Decompressor(), (_PIECE,), OSError
    if head.startswith(b"\xfd"):
        return lzma.LZMADecompressor(), (_PIECE,), lzma.LZMAError
    try:
        import zstandard
    except ImportError as error:
        raise UserError(
            "archives in Zstandard take the package zstandard: pip install 'varedit-jax[prepare]'"
        ) from error
    return zstandard.ZstdDecompressor().decompressobj(), (), zstandard.ZstdError


class Unpacked:
    """The contents of a compressed file, to read and seek like a file.

    Streams follow each other, with zeros between. After damage, reading goes on with the next stream; `breaks` has the
    position in the contents of each such place that has been passed, and what is wrong there.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._position = file, 0
        self.breaks: dict[int, str] = {}
        self._begin()

    def _begin(self) -> None:
        self._pieces = self._unpack()
        self._kept, self._start = bytearray(), 0  # contents, and the position of their first byte

    def tell(self) -> int:
        """Returns the position in the contents."""
        return self._position

    def seek(self, offset: int) -> int:
        """Moves to a position in the contents. Going far back takes unpacking from the beginning."""
        self._position = offset
        return offset

    def read(self, size: int) -> bytes:
        """Returns so many bytes, fewer at the end."""
        if self._position < self._start:
            self._begin()
        while self._start + len(self._kept) < self._position + size:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._kept += piece
            spare = min(len(self._kept), self._position - _KEPT - self._start)
            if spare > _KEPT:
                del self._kept[:spare]
                self._start += spare
        first = self._position - self._start
        data = bytes(memoryview(self._kept)[first : first + size])
        self._position += len(data)
        return data

    def _unpack(self) -> Iterator[bytes]:
        """Yields the contents."""
        self._file.seek(0)
        rest, place = b"", 0  # compressed bytes read ahead; position in the contents
        while True:
            rest = rest.lstrip(b"\0")
            while len(rest) < _LONGEST and (more := self._file.read(_CHUNK)):
                rest = (rest + more).lstrip(b"\0")
            if not rest:
                return
            found = _MAGIC.search(rest)
            if found is None or found.start():
                self.breaks.setdefault(place, "other bytes than a compressed stream")
                # The last bytes may begin one.
                rest = rest[found.start() if found else max(1, len(rest) - _LONGEST + 1) :]
                continue
            begin = self._file.tell() - len(rest)
            decoder, limit, error_type = _decoder(rest)
            while True:
                before = decoder.copy() if hasattr(decoder, "copy") else None
                try:
                    piece = decoder.decompress(rest, *limit)
                except error_type as error:
                    if piece := _salvaged(before, rest):
                        place += len(piece)
                        yield piece
                    self.breaks.setdefault(place, f"a compressed stream is damaged: {error}")
                    self._file.seek(max(begin + 1, self._file.tell() - len(rest) - _BACK))
                    rest = b""
                    break
                if piece:
                    place += len(piece)
                    yield piece
                if decoder.eof:
                    rest = decoder.unused_data
                    break
                rest = decoder.unconsumed_tail if hasattr(decoder, "unconsumed_tail") else b""
                if not rest and getattr(decoder, "needs_input", True) and not (rest := self._file.read(_CHUNK)):
                    self.breaks.setdefault(place, "ends inside of a compressed stream")
                    return


def _salvaged(decoder: Any, data: bytes) -> bytes:
    """Returns what a decoder makes of the bytes before the damaged one; None is no decoder."""
    made = bytearray()
    try:
        for byte in data if decoder else b"":
            made += decoder.decompress(bytes([byte]))
    except zlib.error:
        pass
    return bytes(made)
