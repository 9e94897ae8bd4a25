"""Compressed data of JPEGs: zeroed bytes and endless scans are found, sound files of every kind are not accused."""

import io
import itertools
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from varedit_jax import jpeg
from varedit_jax.images import ImageError, open_image, read_image

KINDS = [
    {"optimize": optimize, "progressive": progressive, "restart_marker_rows": restart, "subsampling": subsampling}
    for optimize, progressive, restart, subsampling in itertools.product((False, True), (False, True), (0, 1), (0, 2))
]


def encoded(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def photo(seed: int = 0, size: tuple[int, int] = (256, 192)) -> Image.Image:
    """Smooth shades with some grain, as photos have."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (6, 8, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return Image.fromarray((np.array(coarse) + draw.normal(0, 5, (*size[::-1], 3))).clip(0, 255).astype(np.uint8))


def opened(data: bytes) -> Image.Image:
    return open_image(io.BytesIO(data))


def fault(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        opened(data)
    assert caught.value.fault == "damaged image"
    return caught.value.detail


def zeroed(data: bytes, start: int, count: int) -> bytes:
    return data[:start] + bytes(count) + data[start + count :]


def plain_images(size: tuple[int, int]):
    """Images that compress to many zeros: of one color, of few, and shades that fall or rise evenly."""
    shade = np.linspace(255, 0, size[0])
    for color in ("black", "white", "gray", "red", (3, 200, 90)):
        yield Image.new("RGB", size, color)
    dotted = Image.new("RGB", size)
    ImageDraw.Draw(dotted).ellipse((3, 3, size[0] // 2, size[1] // 2), fill="yellow")
    yield dotted
    for values in (shade, shade[::-1], shade // 3, np.arange(size[0], 0, -1) // 32 % 256):
        gray = Image.fromarray(np.broadcast_to(values.astype(np.uint8), size[::-1]))
        yield from (gray, gray.convert("RGB"), gray.convert("CMYK"))


@pytest.mark.parametrize("size", [(24, 16), (640, 512), (4096, 64)])
@pytest.mark.parametrize("quality", [10, 75, 100])
def test_sound_plain_images_are_no_false_alarm(size, quality) -> None:
    with_zeros = 0
    for image in plain_images(size):
        for options in KINDS[:: 2 if image.mode == "RGB" else 5]:
            data = encoded(image, quality=quality, **options)
            with_zeros += bytes(256) in data
            opened(data + bytes(2000))  # of a file system
    assert with_zeros > 3 or size == (24, 16)


@pytest.mark.parametrize("options", KINDS)
def test_sound_photos_are_no_false_alarm(options) -> None:
    exif = Image.Exif()
    exif[0x010E] = "\0" * 3000  # zeros that are none of the pixels, as thumbnails have
    for quality in (20, 75, 95):
        data = encoded(photo(), quality=quality, exif=exif, icc_profile=bytes(1000), comment=bytes(500), **options)
        assert read_image(io.BytesIO(data + bytes(4096) + data)).shape == (192, 256, 3)


@pytest.mark.parametrize("count", [256, 512, 4096])
@pytest.mark.parametrize("options", [kind for kind in KINDS if not kind["progressive"]])
def test_zeroed_bytes_are_found(options, count) -> None:
    data = encoded(photo(), quality=90, **options)
    for start in range(1000, len(data) - count - 10, 3000):
        found = re.fullmatch(r"(\d+) zeroed bytes", fault(zeroed(data, start, count)))
        assert found and count <= int(found.group(1)) < count + 4  # with zeros beside them
        assert read_image(io.BytesIO(zeroed(data, start, 0))).shape == (192, 256, 3)


def test_zeroed_bytes_of_progressive_files_are_found_where_zeros_are_no_end_of_a_block() -> None:
    data = encoded(photo(), quality=95, progressive=True)
    found = 0
    for start in range(1000, len(data) - 600, 500):
        try:
            opened(zeroed(data, start, 512))
        except ImageError as error:
            found += error.detail == "512 zeroed bytes"
    assert found > (len(data) - 1600) // 500 // 3  # others give a plain area, as sound files may have it


def mosaic() -> Image.Image:
    """Blocks of one shade each: all bits tell differences of DC, whose lowest bit is 0."""
    shades = np.random.default_rng(0).integers(0, 128, (64, 80)) * 2
    return Image.fromarray(np.kron(shades, np.ones((8, 8), int)).astype(np.uint8))


def test_zeroed_differences_of_plain_blocks_are_found_as_they_fall_below_black() -> None:
    data = encoded(mosaic(), optimize=True)
    assert fault(zeroed(data, len(data) // 2, 400)).endswith(" zeroed bytes")


def test_low_bits_of_progressive_files_may_be_zeros() -> None:
    data = encoded(mosaic(), progressive=True)
    assert bytes(600) in data
    np.testing.assert_array_equal(read_image(io.BytesIO(data))[..., 0], np.array(mosaic()))


def test_end_of_several_blocks_is_known_to_progressive_files_alone() -> None:
    parts = [jpeg._Part(1, None, jpeg._Zero(2, 0x10))]
    assert jpeg._may_be_zeros(8 * 256, parts, progressive=True)
    assert not jpeg._may_be_zeros(8 * 256, parts, progressive=False)


def test_bytes_behind_the_end_are_none_of_the_image() -> None:
    data = encoded(photo(), quality=90)
    np.testing.assert_array_equal(
        read_image(io.BytesIO(data + b"\0\2" + zeroed(data, len(data) // 2, 512))), read_image(io.BytesIO(data))
    )


def test_zeros_in_place_of_the_end_are_found_and_padding_is_not() -> None:
    data = encoded(photo(), quality=90)
    assert fault(zeroed(data, len(data) - 3000, 3000)) == "3000 zeroed bytes"
    padded = data[:-2] + bytes(3000) + data[-2:]  # as cameras with frames of fixed size write
    np.testing.assert_array_equal(read_image(io.BytesIO(padded)), read_image(io.BytesIO(data)))


def test_zeroed_quantization_table_is_found() -> None:
    data = encoded(photo())
    table = data.index(b"\xff\xdb")
    assert "quantization" in fault(zeroed(data, table + 10, 20))


def scans_added(data: bytes, count: int) -> bytes:
    """Repeats the last scan of a progressive file."""
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


def test_number_of_scans_is_bounded() -> None:
    data = encoded(photo(), progressive=True)
    assert opened(scans_added(data, 80)).size == (256, 192)
    assert fault(scans_added(data, 100)) == "more than 100 scans"
    # Bytes that look like scans, in metadata and behind the image, are none.
    assert opened(encoded(photo(), progressive=True, comment=b"\xff\xda" * 300) + b"\xff\xda" * 300).size == (256, 192)


def test_scans_of_single_components_are_counted_in_sequential_files() -> None:
    """The frame of a color image, and scans of its first component alone."""
    data = encoded(Image.new("RGB", (16, 16)))
    scan = data.index(b"\xff\xda")
    single = b"\xff\xda\0\x08\1\1\0\0\x3f\0" + data[scan + 14 : -2]
    assert fault(data[:scan] + single * 101 + data[-2:]) == "more than 100 scans"
    assert opened(data[:scan] + single * 3 + data[-2:]).size == (16, 16)
