"""Every kind of damage is told by its reason, and written down once."""

import io
import pathlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_pipelines.damage import Damaged, Fault, Quarantine, check_image, check_record, read_quarantine
from data_pipelines.record import Record


def encoded(size: tuple[int, int] = (40, 30), kind: str = "JPEG", seed: int = 0, **options: object) -> bytes:
    """A file of noise, which compresses badly: every byte of it matters."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def frames() -> bytes:
    file = io.BytesIO()
    pictures = [Image.new("L", (40, 30), level) for level in (0, 200)]
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:])
    return file.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be of this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 99)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def damaged_png() -> bytes:
    data = bytearray(encoded(kind="PNG"))
    data[60:80] = bytes(20)
    return bytes(data)


DAMAGE = {
    "empty": (b"", Fault.EMPTY),
    "page instead of a picture": (b"<html>404 Not Found</html>", Fault.NOT_A_PICTURE),
    "script that PIL could run": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n", Fault.NOT_A_PICTURE),
    "JPEG cut short": (encoded()[:700], Fault.TRUNCATED),
    "PNG cut short": (encoded(kind="PNG")[:900], Fault.TRUNCATED),
    "bytes lost in a PNG": (damaged_png(), Fault.DECODING),
    "bomb": (png_of_size(9000, 9000), Fault.BOMB),
    "bomb of gigapixels": (png_of_size(60_000, 60_000), Fault.BOMB),
    "tracking pixel": (encoded((1, 1), "PNG"), Fault.SIZE),
    "strip": (encoded((400, 20), "PNG"), Fault.SIZE),
    "animation": (frames(), Fault.ANIMATED),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told_by_its_reason(name: str) -> None:
    data, fault = DAMAGE[name]
    with pytest.raises(Damaged) as caught:
        check_image(data)
    assert caught.value.fault is fault


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_good_pictures_tell_their_size_upright(kind: str) -> None:
    assert check_image(encoded(kind=kind)) == (40, 30)
    turned = Image.Exif()
    turned[0x0112] = 6
    if kind in ("JPEG", "PNG", "WEBP"):
        assert check_image(encoded(kind=kind, exif=turned)) == (30, 40)


def test_a_record_says_which_of_its_pictures_is_broken() -> None:
    good = Record(id="1", dataset="d", source=encoded(), target=encoded((50, 30)), instructions=("do it",))
    assert check_record(good) == (40, 30)
    for fields, said in (
        ({"target": encoded()[:700]}, "cut short: target: "),
        ({"source": b""}, "empty file: source"),
        ({"instructions": (" ",)}, "empty instruction"),
    ):
        with pytest.raises(Damaged, match=f"^{said}"):
            check_record(Record(**(vars(good) | fields)))


def test_quarantine_keeps_each_record_once_and_goes_on(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new" / "bad.jsonl"
    with Quarantine(path) as first:
        first.add(id="1", dataset="d", reason=Fault.BOMB, detail="9000 x 9000")
        first.add(id="2", dataset="d", reason=Fault.SIZE)
        first.add(id="1", dataset="d", reason=Fault.BOMB)
        assert first.summary() == "2 too many pixels, 1 absurd size"
    path.write_bytes(path.read_bytes() + b'{"id": "cut')
    with Quarantine(path) as second:
        second.add(id="2", dataset="d", reason=Fault.SIZE)
        second.add(id="2", dataset="e", reason="of another step")
        assert second.counts == {"absurd size": 1, "of another step": 1}
    assert [(line["dataset"], line["id"], line["reason"]) for line in read_quarantine(path)] == [
        ("d", "1", "too many pixels"), ("d", "2", "absurd size"), ("e", "2", "of another step")
    ]  # fmt: skip
