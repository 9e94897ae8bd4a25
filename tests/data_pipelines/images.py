"""Made images, good ones and ones that are damaged in every way."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from data_pipelines.reasons import Reason
from varedit_jax.images import open_image


def encoded(size: tuple[int, int] = (40, 30), kind: str = "JPEG", seed: int = 0, **options: object) -> bytes:
    """Returns a file of noise, which compresses badly, so that every byte matters."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    return open_image(io.BytesIO(data))


def frames() -> bytes:
    file = io.BytesIO()
    images = [Image.new("L", (40, 30), level) for level in (0, 200)]
    images[0].save(file, "GIF", save_all=True, append_images=images[1:])
    return file.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """Returns a PNG of a few bytes that claims this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 99)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def damaged_png() -> bytes:
    data = bytearray(encoded(kind="PNG"))
    data[60:80] = bytes(20)
    return bytes(data)


def zeroed_jpeg() -> bytes:
    data = encoded((100, 80))
    return data[:1000] + bytes(512) + data[1512:]


def endless_jpeg() -> bytes:
    data = encoded(progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 100


DAMAGE = {
    "empty": (b"", Reason.EMPTY),
    "page instead of an image": (b"<html>404 Not Found</html>", Reason.NOT_AN_IMAGE),
    "script that PIL could run": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n", Reason.NOT_AN_IMAGE),
    "JPEG cut short": (encoded()[:700], Reason.TRUNCATED),
    "PNG cut short": (encoded(kind="PNG")[:900], Reason.TRUNCATED),
    "bytes lost in a PNG": (damaged_png(), Reason.DECODING),
    "bytes zeroed in a JPEG": (zeroed_jpeg(), Reason.DECODING),
    "JPEG of endless scans": (endless_jpeg(), Reason.DECODING),
    "bomb": (png_of_size(9000, 9000), Reason.BOMB),
    "bomb of gigapixels": (png_of_size(60_000, 60_000), Reason.BOMB),
    "tracking pixel": (encoded((1, 1), "PNG"), Reason.SIZE),
    "strip": (encoded((400, 20), "PNG"), Reason.SIZE),
    "animation": (frames(), Reason.ANIMATED),
}  # fmt: skip
