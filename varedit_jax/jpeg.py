"""Checks of a JPEG's compressed data without decoding them: number of scans, and bytes that were zeroed.

Decoders take damaged data for pixels: JPEG has no checksums. But a Huffman code of zeros alone stands for one symbol,
which the file's own tables tell, so a long run of zeros means one thing repeated: blocks of no change (a plain area),
or what no image has, such as every coefficient -1. Sections and tables are those of ITU-T T.81.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

MAX_SCANS = 100  # of an image; encoders write about 10, but 30 bytes may be a scan that takes as long as any other
_LEAST = 256  # zeros that count
_ZEROS = re.compile(rb"\0{%d,}" % _LEAST)
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # none of these is inside compressed data (B.1.1.5)
_IMAGE, _END, _SCAN, _HUFFMAN = 0xD8, 0xD9, 0xDA, 0xC4
_SEQUENTIAL, _PROGRESSIVE, _ARITHMETIC = (0xC0, 0xC1), 0xC2, (0xC9, 0xCA)  # frames
_RANGE = 2047  # between the lowest and the highest coefficient of 8-bit pixels


class _Zero(NamedTuple):
    """The code of a Huffman table that is all zeros: the first of the shortest (annex C)."""

    bits: int
    symbol: int


class _Part(NamedTuple):
    """A component in a scan."""

    blocks: int  # in a unit of interleaved components
    dc: _Zero | None  # None: not in this scan
    ac: _Zero | None


def check_scans(data: bytes, start: int, components: int) -> None:
    """Checks the compressed data of a JPEG, of which the first begin at byte `start`.

    Takes microseconds for the usual file, without many zeros in a row.

    Raises ValueError for more than MAX_SCANS scans, and for zeros that no image has.
    """
    header = 6 + 2 * components
    usual = (
        data[start - header - 2 : start - header + 2] == bytes((0xFF, _SCAN, 0, header))
        and data[start - 3 : start] == b"\x00\x3f\x00"  # all coefficients at once
    )
    if b"\0\0" in data[start :: _LEAST // 2] or not (usual or _most_scans(data, start) <= MAX_SCANS):
        _check_all(data)


def _most_scans(data: bytes, start: int) -> int:
    """Returns the number of scans, or more where other bytes look like their markers."""
    values = np.frombuffer(data, np.uint8, offset=start)
    return 1 + int(np.count_nonzero((values[:-1] == 0xFF) & (values[1:] == _SCAN)))


def _check_all(data: bytes) -> None:
    tables: dict[int, _Zero] = {}  # by class and destination: from 0x00 for DC, from 0x10 for AC
    blocks: dict[int, int] = {}  # by component
    at = scans = frame = 0
    while found := _MARKER.search(data, at):
        kind, at = data[found.end() - 1], found.end()
        if kind == _IMAGE:
            continue
        if kind == _END:
            return
        end = at + int.from_bytes(data[at : at + 2], "big")
        body, at = data[at + 2 : end], end
        if kind in (*_SEQUENTIAL, _PROGRESSIVE, *_ARITHMETIC):
            frame = kind
            blocks = {body[i]: (body[i + 1] >> 4) * (body[i + 1] & 15) for i in range(6, len(body) - 2, 3)}
        elif kind == _HUFFMAN:
            tables |= _zero_codes(body)
        elif kind == _SCAN:
            scans += 1
            if scans > MAX_SCANS:
                raise ValueError(f"more than {MAX_SCANS} scans")
            _check_zeros(data, at, _parts(frame, body, blocks, tables), frame == _PROGRESSIVE)


def _zero_codes(body: bytes) -> dict[int, _Zero]:
    """Returns the code of zeros of each table of a segment (B.2.4.2)."""
    tables: dict[int, _Zero] = {}
    while len(body) > 17:
        counts = body[1:17]
        tables[body[0]] = _Zero(next((bits for bits, count in enumerate(counts, 1) if count), 16), body[17])
        body = body[17 + sum(counts) :]
    return tables


def _parts(frame: int, header: bytes, blocks: Mapping[int, int], tables: Mapping[int, _Zero]) -> list[_Part]:
    """Returns what a scan is made of (B.2.3); nothing if it has no Huffman codes, or tables that the file lacks."""
    count = header[0] if header else 0
    if len(header) != 4 + 2 * count or frame in _ARITHMETIC:
        return []
    first, _, approximation = header[-3:]
    progressive = frame == _PROGRESSIVE
    if progressive and not first and approximation >> 4:
        return []  # a bit more of each DC, as it is
    parts = []
    for component, table in zip(header[1:-3:2], header[2:-3:2], strict=True):
        dc, ac = tables.get(table >> 4), tables.get(0x10 | table & 15)
        has_dc, has_ac = not (progressive and first), not (progressive and not first)
        if (has_dc and dc is None) or (has_ac and ac is None) or component not in blocks:
            return []
        parts.append(_Part(blocks[component] if count > 1 else 1, dc if has_dc else None, ac if has_ac else None))
    return parts


def _check_zeros(data: bytes, start: int, parts: Sequence[_Part], progressive: bool) -> None:
    """Checks the compressed data of a scan. Zeros in front of the end of the image are padding of some encoders."""
    after = _MARKER.search(data, start)
    end = after.start() if after else len(data)
    for run in _ZEROS.finditer(data, start, end):
        padding = after is not None and run.end() == end and data[end + 1] == _END
        if not padding and not _may_be_zeros(8 * len(run.group()), parts, progressive):
            raise ValueError(f"{len(run.group())} zeroed bytes")


def _may_be_zeros(bits: int, parts: Sequence[_Part], progressive: bool) -> bool:
    """Returns True if a sound image may have this many bits of zeros in a row."""
    # Any symbol but the end of a block, or of several in progressive frames, gives coefficients without end.
    ends = range(0, 0xF0, 0x10) if progressive else (0,)
    if any(ac is not None and ac.symbol not in ends for _, _, ac in parts):
        return False
    # Zeros after a DC symbol are the lowest difference of its category (F.1.2.1): the same fall at each block.
    unit = sum(blocks * ((dc.bits + dc.symbol if dc else 0) + (ac.bits if ac else 0)) for blocks, dc, ac in parts)
    falls = [blocks * (2**dc.symbol - 1) for blocks, dc, _ in parts if dc is not None]
    return all(bits // unit * fall <= _RANGE for fall in falls)
