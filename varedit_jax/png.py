"""Chunks of PNG files: metadata that are too large to be read, and checksums (PNG specification, sections 5 and 11)."""

import io
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from PIL.PngImagePlugin import MAX_TEXT_CHUNK

_START = b"\x89PNG\r\n\x1a\n"
_METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_MAX_METADATA = 16 * MAX_TEXT_CHUNK  # bytes of all metadata of a file, decompressed


class _Chunk(NamedTuple):
    kind: bytes
    start: int  # of the whole chunk
    end: int


def without_large_metadata(file: BinaryIO) -> BinaryIO:
    """Returns a PNG as it is, or without texts and color profiles that are too large when decompressed.

    Pillow refuses a file with such metadata; the pixels do not need them. No more than the limit is decompressed. Files
    of other kinds are returned as they are.

    Raises ValueError if compressed pixels do not have their checksum, which Pillow does not look at.
    """
    if file.read(len(_START)) != _START:
        file.seek(0)
        return file
    file.seek(0)
    data = file.read()
    file.seek(0)
    view, left, kept, copied = memoryview(data), _MAX_METADATA, [], 0
    for chunk in _chunks(data):
        body = view[chunk.start + 8 : chunk.end - 4]
        if chunk.kind == b"IDAT" and zlib.crc32(body, zlib.crc32(b"IDAT")) != _number(data, chunk.end - 4):
            raise ValueError("wrong checksum of pixels")
        if chunk.kind in _METADATA:
            size = _size(chunk.kind, bytes(body), min(left, MAX_TEXT_CHUNK))
            left -= min(size, MAX_TEXT_CHUNK, left)
            if size > MAX_TEXT_CHUNK or not left:
                kept.append(view[copied : chunk.start])
                copied = chunk.end
    return io.BytesIO(b"".join([*kept, view[copied:]])) if copied else file


def _number(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")


def _chunks(data: bytes) -> Iterator[_Chunk]:
    """Yields the complete chunks of a file."""
    start = len(_START)
    while (end := start + 12 + _number(data, start)) <= len(data):
        kind = data[start + 4 : start + 8]
        yield _Chunk(kind, start, end)
        if kind == b"IEND":
            return
        start = end


def _size(kind: bytes, body: bytes, limit: int) -> int:
    """Returns the size of metadata in bytes, decompressed; MAX_TEXT_CHUNK + 1 if it is more than `limit`."""
    _, _, rest = body.partition(b"\0")  # after the name
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] != b"\1"):
        return len(body)
    stream = rest[2:].split(b"\0", 2)[-1] if kind == b"iTXt" else rest[1:]  # after language and translated name
    decompress = zlib.decompressobj()
    try:
        size = len(decompress.decompress(stream, max(1, limit)))
    except zlib.error:
        return 0  # Pillow passes over it
    return MAX_TEXT_CHUNK + 1 if decompress.unconsumed_tail else size
