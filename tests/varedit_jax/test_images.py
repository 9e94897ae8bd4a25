"""Images in: every kind that is read, and every reason to refuse one."""

import errno
import io
import os
import pathlib
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from varedit_jax import images
from varedit_jax.errors import UserError


def photo(height: int = 20, width: int = 30) -> np.ndarray:
    """A smooth image with a different value in every corner and channel."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 200 // height + 20, x * 200 // width + 30, (x + y) * 200 // (width + height)], -1).astype(
        np.uint8
    )


def png(path: pathlib.Path, image: Image.Image | None = None, **options) -> pathlib.Path:
    (image or Image.fromarray(photo())).save(path, "PNG", **options)
    return path


# --- what is read


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "tga"])
def test_lossless_files_are_read_exactly(tmp_path, suffix):
    path = tmp_path / f"in.{suffix}"
    Image.fromarray(photo()).save(path)
    for source in (path, str(path), path.open("rb"), Image.open(path), photo()):
        result = images.read_image(source)
        assert result.dtype == np.uint8
        np.testing.assert_array_equal(result, photo())
        for opened in (source,) if hasattr(source, "close") else ():
            opened.close()


@pytest.mark.parametrize("suffix", ["jpg", "webp", "gif"])
def test_lossy_files_are_read(tmp_path, suffix):
    path = tmp_path / f"in.{suffix}"
    Image.fromarray(photo()).save(path)
    result = images.read_image(path).astype(int)
    assert result.shape == (20, 30, 3)
    assert np.abs(result - photo()).mean() < 8  # of 255; a channel or an axis in the wrong place gives over 30


def test_suffix_does_not_matter(tmp_path):
    np.testing.assert_array_equal(images.read_image(png(tmp_path / "in.jpg")), photo())


def test_stream_that_cannot_seek(tmp_path):
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "wb") as pipe:
        Image.fromarray(photo()).save(pipe, "PNG")
    with os.fdopen(read_end, "rb") as pipe:
        np.testing.assert_array_equal(images.read_image(pipe), photo())


def test_open_file_is_read_from_its_start_and_left_open(tmp_path):
    with png(tmp_path / "in.png").open("rb") as file:
        file.seek(40)
        np.testing.assert_array_equal(images.read_image(file), photo())
        assert not file.closed


def test_palette(tmp_path):
    image = Image.fromarray(photo() // 64 * 64).convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_array_equal(images.read_image(png(tmp_path / "in.png", image)), np.array(image.convert("RGB")))


def test_palette_with_transparency_is_on_white(tmp_path):
    indices = np.array([[0, 1, 2]], np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    path = png(tmp_path / "in.png", image, transparency=b"\xff\x00\xff")
    assert images.read_image(path).tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]


def test_gray_and_one_bit(tmp_path):
    gray = photo()[:, :, 0]
    result = images.read_image(png(tmp_path / "gray.png", Image.fromarray(gray)))
    np.testing.assert_array_equal(result, np.repeat(gray[:, :, None], 3, 2))
    bits = gray > 100
    result = images.read_image(png(tmp_path / "bits.png", Image.fromarray(bits)))
    np.testing.assert_array_equal(result, np.repeat(bits[:, :, None], 3, 2) * np.uint8(255))


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_sixteen_bit_gray(tmp_path, suffix):
    deep = np.array([[0, 128, 129, 257, 32768, 65535 - 129, 65535 - 128, 65535]], np.uint16)
    path = tmp_path / f"deep.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 8 1 65535\n" + deep.astype(">u2").tobytes())
    else:
        Image.fromarray(deep).save(path)
    assert images.read_image(path)[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]
    assert images.read_image(path).shape == (1, 8, 3)


def test_sixteen_bit_gray_of_the_other_byte_order(tmp_path):
    deep = np.array([[0, 257, 65535]], np.uint16)
    image = Image.frombytes("I;16B", (3, 1), deep.astype(">u2").tobytes())
    assert images.read_image(image)[0, :, 0].tolist() == [0, 1, 255]


def test_transparent_value_of_sixteen_bit_gray_is_white(tmp_path):
    path = png(tmp_path / "in.png", Image.fromarray(np.array([[0, 300, 65535]], np.uint16)))
    data = path.read_bytes()
    chunk = b"tRNS" + struct.pack(">H", 300)
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(data[:33] + chunk + data[33:])  # after the header
    assert images.read_image(path)[0, :, 0].tolist() == [0, 255, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("values", [[-5, 70000], [0, 255], [0, 65535]])
def test_gray_of_32_bits_is_refused_with_its_range(tmp_path, dtype, values):
    """255 as white would be black if 65535 were."""
    path = tmp_path / "in.tiff"
    Image.fromarray(np.array([values], dtype)).save(path)
    low, high = (re.escape(str(dtype(value))) for value in values)
    with pytest.raises(
        UserError, match=rf"in\.tiff has gray values of 32 bits, from {low} to {high}, which do not say"
    ):
        images.read_image(path)


def test_sixteen_bits_in_a_wider_mode():
    """PIL's own convention for 16 bits in memory."""
    image = Image.fromarray(np.array([[0, 257, 65535]], np.int32))
    assert images.read_image(image)[0, :, 0].tolist() == [0, 1, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_on_white(tmp_path, mode):
    color = (10, 20, 30) if mode == "RGBA" else (10,)
    image = Image.new(mode, (3, 1))
    for x, alpha in enumerate((255, 0, 51)):
        image.putpixel((x, 0), (*color, alpha))
    rgb = np.broadcast_to(np.array(color), (3,))
    wanted = [rgb.tolist(), [255] * 3, np.round(0.2 * rgb + 0.8 * 255).astype(int).tolist()]
    assert images.read_image(png(tmp_path / "in.png", image)).tolist() == [wanted]


def test_transparent_color_is_white(tmp_path):
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    path = png(tmp_path / "in.png", image, transparency=(4, 5, 6))
    assert images.read_image(path).tolist() == [[[1, 2, 3], [255, 255, 255]]]


@pytest.mark.parametrize("suffix", ["tiff", "jpg"])
def test_cmyk(tmp_path, suffix):
    path = tmp_path / f"in.{suffix}"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path)  # red
    assert np.abs(images.read_image(path).astype(int) - (255, 0, 0)).max() <= 2  # JPEG rounds


def test_colors_that_cannot_become_rgb_are_refused():
    with pytest.raises(UserError, match=r"unknown colors \(La\).*save it as RGB"):
        images.read_image(Image.new("La", (2, 2)))  # gray, multiplied by its alpha


# The image as the camera wrote it, for every orientation tag; EXIF 2.3, table 6.
AS_WRITTEN = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("orientation", AS_WRITTEN)
def test_exif_orientation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"in.{suffix}"
    Image.fromarray(np.ascontiguousarray(AS_WRITTEN[orientation](photo()))).save(path, exif=exif)
    np.testing.assert_array_equal(images.read_image(path), photo())


@pytest.mark.parametrize("mode", ["L", "I;16", "1", "RGBA", "CMYK", "P"])
def test_exif_orientation_in_every_mode(tmp_path, mode):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "in.tiff"
    Image.new(mode, (30, 20)).save(path, exif=exif)
    assert images.read_image(path).shape == (30, 20, 3)


def test_unreadable_exif_is_ignored(tmp_path):
    path = tmp_path / "in.jpg"
    Image.fromarray(photo()).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f garbage")
    assert images.read_image(path).shape == (20, 30, 3)


def test_camera_preview_behind_the_photo_is_no_second_frame(tmp_path):
    path = tmp_path / "in.jpg"
    preview = Image.new("RGB", (4, 4))
    Image.fromarray(photo()).save(path, "MPO", save_all=True, append_images=[preview])
    with Image.open(path) as image:
        assert image.format == "MPO"
        assert image.n_frames == 2
    assert images.read_image(path).shape == (20, 30, 3)


@pytest.mark.parametrize("shape", [(20, 30), (20, 30, 1), (20, 30, 3), (20, 30, 4)])
def test_arrays(shape):
    values = np.full(shape, 100, np.uint8)
    if shape[-1] == 4:
        values[:, :, 3] = 0
    np.testing.assert_array_equal(images.read_image(values), 255 if shape[-1] == 4 else 100)
    assert images.read_image(values).shape == (20, 30, 3)


def test_array_is_copied_and_may_be_a_view():
    values = photo()
    result = images.read_image(values[::-1, ::2])
    np.testing.assert_array_equal(result, values[::-1, ::2])
    result[:] = 0
    np.testing.assert_array_equal(values, photo())


# --- what is refused


def refusal(source, **options) -> str:
    """The one sentence that refuses `source`."""
    with pytest.raises(UserError) as caught:
        images.read_image(source, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_missing_file(tmp_path):
    path = tmp_path / "none.png"
    assert refusal(path) == f"there is no image {path}; check the path"
    assert "path is empty" in refusal("")


def test_directory_and_impossible_names(tmp_path):
    assert "Is a directory" in refusal(tmp_path)
    assert "null" in refusal("a\0b.png")
    assert "choose a shorter one" in refusal("x" * 300)


def test_unreadable_file(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "open", denied)  # a real mode of 0 does not stop the superuser
    assert "Permission denied" in refusal(tmp_path / "in.png")


def test_empty_file(tmp_path):
    path = tmp_path / "in.png"
    path.touch()
    assert refusal(path) == f"{path} is empty (0 bytes); save the image again"
    assert "is empty" in refusal(io.BytesIO())


@pytest.mark.parametrize("content", [b"\0", b"hello, I am text\n" * 50, b"%PDF-1.7\n", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_not_a_image(tmp_path, content):
    path = tmp_path / "in.png"
    path.write_bytes(content)
    message = refusal(path)
    assert str(path) in message
    assert "save it" in message or "copy or save" in message


def test_program_text_is_not_run(tmp_path):
    """PIL would hand EPS to another program."""
    path = tmp_path / "in.eps"
    Image.fromarray(photo()).save(path)
    assert "not an image of a known kind" in refusal(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tiff", "bmp"])
def test_truncated_file(tmp_path, suffix):
    draw = np.random.default_rng(0)
    path = tmp_path / f"in.{suffix}"
    Image.fromarray(draw.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    data = path.read_bytes()
    for share in (0.95, 0.5, 0.1):
        path.write_bytes(data[: int(len(data) * share)])
        assert str(path) in refusal(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tiff", "bmp", "ppm", "tga", "jp2", "ico"])
def test_damaged_bytes_never_leak_another_error(tmp_path, suffix):
    path = tmp_path / f"in.{suffix}"
    Image.fromarray(photo(48, 64)).save(path)
    data = np.frombuffer(path.read_bytes(), np.uint8)
    draw = np.random.default_rng(1)
    refused = 0
    for _ in range(60):
        damaged = data.copy()
        damaged[draw.integers(0, min(len(data), 200), 4)] = draw.integers(0, 256, 4)
        try:
            result = images.read_image(io.BytesIO(damaged.tobytes()), max_pixels=100_000)
        except UserError:
            refused += 1
        else:
            assert result.dtype == np.uint8
            assert result.shape[2] == 3
    assert refused > 0


def test_too_many_pixels(tmp_path):
    path = png(tmp_path / "in.png")
    message = refusal(path, max_pixels=599)
    assert "30 x 20 pixels" in message and "0.000599 million" in message
    assert images.read_image(path, max_pixels=600).shape == (20, 30, 3)
    assert "30 x 20" in refusal(photo(), max_pixels=599)
    assert "30 x 20" in refusal(Image.fromarray(photo()), max_pixels=599)


@pytest.mark.parametrize("width, height", [(8001, 8000), (10_000, 10_000), (40_000, 40_000), (2**31 - 1, 1)])
def test_decompression_bomb_is_refused_by_its_header(tmp_path, width, height):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path = tmp_path / "in.png"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    assert "at most 64 million can be edited; make it smaller" in refusal(path)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_several_frames(tmp_path, suffix):
    path = tmp_path / f"in.{suffix}"
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 100, 200)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    message = refusal(path)
    assert "has 3 frames" in message
    assert "first frame" in message
    with Image.open(path) as image:
        assert "has 3 frames" in refusal(image)


def test_pages_are_not_counted_without_end(tmp_path):
    path = tmp_path / "in.tiff"
    frames = [Image.new("L", (8, 8), value) for value in range(110)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert "has more than 100 frames" in refusal(path)


def tiff_of_rows(rows: int) -> io.BytesIO:
    """A file whose rows, 16 pixels wide, are strips that share their bytes."""
    tags = [(256, 3, 1, 16), (257, 4, 1, rows), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(273, 4, rows, 200), (278, 3, 1, 1), (279, 4, rows, 200 + 4 * rows)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    start = (b"II*\0" + struct.pack("<I", 8) + directory).ljust(200, b"\0")
    return io.BytesIO(start + struct.pack("<I", 100) * rows + struct.pack("<I", 16) * rows)


def test_image_of_very_many_pieces_is_refused():
    assert images.read_image(tiff_of_rows(1000)).shape == (1000, 16, 3)
    assert "stored in 100001 pieces, but at most 100000" in refusal(tiff_of_rows(100_001))


def test_fewer_pixels_of_a_slow_kind(tmp_path):
    path = tmp_path / "in.jp2"
    Image.fromarray(photo()).save(path)
    assert images.read_image(path, max_pixels=2400).shape == (20, 30, 3)
    assert "30 x 20 pixels, but at most 0.000599 million" in refusal(path, max_pixels=2399)


def test_no_pixels():
    assert "has no pixels (it is 5 x 0)" in refusal(np.zeros((0, 5, 3), np.uint8))
    assert "has no pixels (it is 0 x 4)" in refusal(Image.new("RGB", (0, 4)))


def test_arrays_of_other_types_and_shapes():
    assert "type float32; give uint8" in refusal(np.zeros((4, 4, 3), np.float32))
    assert "shape (1, 4, 4, 3)" in refusal(np.zeros((1, 4, 4, 3), np.uint8))
    assert "shape (3, 4, 5)" in refusal(np.zeros((3, 4, 5), np.uint8))
    assert "a value of type int is not an image" in refusal(5)


def test_text_and_closed_files(tmp_path):
    text = tmp_path / "in.txt"
    text.write_text("hello")
    with text.open() as file:
        assert "opened as text" in refusal(file)
    assert "binary mode" in refusal(file)
    with png(tmp_path / "in.png").open() as file:
        assert "binary mode" in refusal(file)


# --- written, and turned


def test_an_image_is_written_through_a_link(tmp_path: pathlib.Path):
    """To the file that it points to, as another program would expect; the link stays."""
    (tmp_path / "site").mkdir()
    (tmp_path / "latest.png").symlink_to("site/1.png")
    for value in (0, 255):
        image = np.full((4, 5, 3), value, np.uint8)
        images.write_image(tmp_path / "latest.png", image)
        np.testing.assert_array_equal(images.read_image(tmp_path / "site" / "1.png"), image)
    assert (tmp_path / "latest.png").is_symlink() and len(list((tmp_path / "site").iterdir())) == 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "MPO", "AVIF"])
def test_the_size_of_an_opened_image_is_the_one_it_will_have(kind: str) -> None:
    for value in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = value
        file = io.BytesIO()
        Image.new("RGB", (32, 16)).save(file, kind, exif=exif)
        image = images.open_image(io.BytesIO(file.getvalue()))
        before = images.upright_size(image)
        images.load_image(image)
        assert before == images.upright_size(image) == images.upright(image).size == ((32, 16), (16, 32))[value >= 5]
