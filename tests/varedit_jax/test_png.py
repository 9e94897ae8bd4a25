"""Chunks of PNGs: metadata of any size do not keep an image from being read, nor cost more than a limit."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from varedit_jax import png as png_module
from varedit_jax.images import ImageError, read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
XMP = b"XML:com.adobe.xmp"


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def text(kind: bytes, value: bytes, key: bytes = b"workflow") -> bytes:
    """Returns a chunk of metadata."""
    packed = zlib.compress(value)
    return chunk(kind, {
        b"tEXt": key + b"\0" + value,
        b"zTXt": key + b"\0\0" + packed,
        b"iTXt": key + b"\0\1\0en\0\0" + packed,
        b"iCCP": key + b"\0\0" + packed,
    }[kind])  # fmt: skip


def png(*extra: bytes, behind: bool = False) -> bytes:
    """Returns a PNG with more chunks, in front of its pixels or behind."""
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    data = file.getvalue()
    at = len(data) - 12 if behind else 33
    return data[:at] + b"".join(extra) + data[at:]


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
@pytest.mark.parametrize("size", [1000, 2**20, 2**20 + 1, 5_000_000])
def test_metadata_of_any_size_do_not_matter(kind, size, behind) -> None:
    data = png(text(kind, b"{}" * (size // 2)), behind=behind)
    np.testing.assert_array_equal(read_image(io.BytesIO(data)), PIXELS)


def test_metadata_that_are_kept_or_dropped_leave_their_neighbors() -> None:
    """An orientation in XMP between texts that are dropped."""
    xmp = b'<x tiff:Orientation="6"/>' + b" " * 3000
    large = text(b"zTXt", b"x" * 3_000_000)
    data = png(large, text(b"iTXt", xmp, XMP), large)
    np.testing.assert_array_equal(read_image(io.BytesIO(data)), np.rot90(PIXELS, -1))


def test_metadata_are_decompressed_to_a_limit_only(tmp_path, monkeypatch) -> None:
    sizes = []
    size = png_module._size
    monkeypatch.setattr(png_module, "_size", lambda *args: sizes.append(size(*args)) or sizes[-1])
    path = tmp_path / "in.png"
    for kind in (b"iCCP", b"zTXt", b"tEXt"):
        sizes.clear()
        path.write_bytes(png(text(kind, bytes(1_000_000)) * 70))  # more than Pillow reads of texts, as it counts
        np.testing.assert_array_equal(read_image(path), PIXELS)
        assert len(sizes) == 70
        if kind != b"tEXt":
            assert sum(min(value, 2**20) for value in sizes[:17]) <= 17 * 2**20
            assert set(sizes[17:]) == {2**20 + 1}  # no longer than a limit of one byte


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
@pytest.mark.parametrize("body", [b"", b"key", b"key\0", b"key\0\0", b"key\0\0garbage", b"key\0\1\0en\0\0garbage"])
def test_broken_metadata_never_leak_another_error(kind, body) -> None:
    try:
        np.testing.assert_array_equal(read_image(io.BytesIO(png(chunk(kind, body)))), PIXELS)
    except ImageError as error:
        assert error.fault in ("damaged image", "not an image")


def test_checksum_of_pixels_is_looked_at() -> None:
    data = bytearray(png())
    end = data.rindex(b"IEND") - 4
    data[end - 1] ^= 1
    with pytest.raises(ImageError, match="wrong checksum of pixels"):
        read_image(io.BytesIO(bytes(data)))


def test_bytes_behind_the_end_are_none_of_the_image() -> None:
    np.testing.assert_array_equal(read_image(io.BytesIO(png() + chunk(b"IDAT", b"x")[:-1] + b"?")), PIXELS)
