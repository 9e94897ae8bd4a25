"""Images of any size to the model's: what is kept, what is cut off, and what may be mirrored."""

import functools
import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines.transforms import decoded, draw_flip, fitted, fitted_pair, may_flip
from tests.data_pipelines.images import opened
from varedit_jax.placement import fit


def _ramp(width: int, height: int, kind: str = "PNG", **options: object) -> bytes:
    """Red grows to the right from 0 to 255, green downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0] = np.linspace(0, 255, width)
    pixels[:, :, 1] = np.linspace(0, 255, height)[:, None]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def _decoded(data: bytes) -> Image.Image:
    return decoded(opened(data))


def _noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def _released(image: Image.Image, h: int, w: int) -> np.ndarray:
    """The release's `transform`, restated: the whole image covers h x w, then its center is cut out."""
    width, height = image.size
    wide, high = (w, int(w / (width / height))) if width / height <= w / h else (int(width / height * h), h)
    pixels = np.array(image.resize((wide, high), resample=Image.Resampling.LANCZOS))
    top, left = (pixels.shape[0] - h) // 2, (pixels.shape[1] - w) // 2
    return pixels[top : top + h, left : left + w]


def test_an_image_of_the_size_is_left_alone() -> None:
    image = _noise(48, 32)
    np.testing.assert_array_equal(fitted(image, (32, 48), "crop"), image)
    np.testing.assert_array_equal(fitted(image, (32, 48), "crop", flip=True), np.asarray(image)[:, ::-1])


@pytest.mark.parametrize("size", [(300, 100), (101, 257), (640, 480), (1023, 767), (64, 64), (40, 50), (130, 131)])
@pytest.mark.parametrize("h, w", [(64, 64), (128, 128), (48, 80), (96, 56)])
def test_crop_is_the_release_pixel_by_pixel(size: tuple[int, int], h: int, w: int) -> None:
    source, target = _noise(*size), _noise(*size, seed=1)
    found = fitted_pair(source, target, (h, w), "crop")
    np.testing.assert_array_equal(found["source"], _released(source, h, w))
    np.testing.assert_array_equal(found["target"], _released(target, h, w))


def test_a_quotient_that_is_rounded_down_leaves_no_pixel_out() -> None:
    short = [(w, h) for w in range(60, 160) for h in range(60, 160) if int(57 / (w / h)) < h * 57 // w]
    assert short  # where the release would cut out one row less
    for width, height in short[:5]:
        assert fitted(_noise(width, height), (height * 57 // width, 57), "crop").shape == (height * 57 // width, 57, 3)


def test_a_crop_keeps_the_middle() -> None:
    found = fitted(_decoded(_ramp(300, 100)), (64, 64), "crop")
    assert abs(int(found[0, 0, 0]) - 85) <= 1 and abs(int(found[0, -1, 0]) - 170) <= 1  # a third of the way, and two
    assert found[0, 0, 1] <= 1 and found[-1, 0, 1] >= 254  # nothing is cut off above and below


@functools.cache
def _scene(width: int, height: int) -> Image.Image:
    """The same scene at any size, as a resize of one large image: blobs of many sizes."""
    draw = np.random.default_rng(3)
    pixels = np.zeros((1536, 2048, 3))
    for cells in (6, 24, 96):
        coarse = Image.fromarray(draw.integers(0, 256, (cells * 3 // 4, cells, 3), np.uint8))
        pixels += np.asarray(coarse.resize((2048, 1536), Image.Resampling.BICUBIC), np.float64) / 3
    return Image.fromarray(pixels.astype(np.uint8)).resize((width, height), Image.Resampling.LANCZOS)


def _psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(np.float64) - other) ** 2)))


@pytest.mark.parametrize("resize", ["crop", "pad"])
@pytest.mark.parametrize(
    "source, target, least",
    [
        ((640, 480), (1024, 1024), 50),
        ((1632, 1024), (1639, 1024), 54),
        ((910, 512), (896, 512), 50),
        ((480, 640), (720, 960), 50),
        ((1000, 400), (500, 210), 38),  # half the pixels, so half the detail
    ],
)
def test_an_unedited_pair_of_two_sizes_becomes_two_equal_images(
    source: tuple[int, int], target: tuple[int, int], least: float, resize: str
) -> None:
    pair = fitted_pair(_scene(*source), _scene(*target), (512, 512), resize)
    assert _psnr(pair["source"], pair["target"]) > least
    if source[0] * target[1] != source[1] * target[0]:
        apart = _psnr(pair["source"], fitted(_scene(*target), (512, 512), resize))
        assert apart < least - 4  # each side at its own middle, or with its own margin


def test_a_target_gets_the_size_of_its_source_as_the_release_gives_it() -> None:
    source, target = _noise(300, 200), _noise(128, 128, seed=1)
    found = fitted_pair(source, target, (96, 96), "crop")
    np.testing.assert_array_equal(found["target"], _released(target.resize((300, 200)), 96, 96))
    np.testing.assert_array_equal(found["source"], _released(source, 96, 96))


def test_both_sides_are_mirrored_after_they_were_aligned() -> None:
    source, target = _noise(90, 60), _noise(45, 33, seed=1)
    for resize in ("crop", "pad"):
        plain = fitted_pair(source, target, (64, 64), resize)
        mirrored = fitted_pair(source, target, (64, 64), resize, flip=True)
        if resize == "crop":
            for side in ("source", "target"):
                np.testing.assert_array_equal(mirrored[side], plain[side][:, ::-1])
        else:
            turned = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in (source, target.resize((90, 60)))]
            np.testing.assert_array_equal(mirrored["target"], fitted(turned[1], (64, 64), "pad"))


def test_pad_is_what_editing_does() -> None:
    data = _ramp(60, 100)
    expected, _ = fit(np.asarray(Image.open(io.BytesIO(data))), (64, 64))
    np.testing.assert_array_equal(fitted(_decoded(data), (64, 64), "pad"), expected)
    mirrored, _ = fit(np.asarray(Image.open(io.BytesIO(data)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)), (64, 64))
    np.testing.assert_array_equal(fitted(_decoded(data), (64, 64), "pad", flip=True), mirrored)
    assert (expected[:, 42:] >= 250).all() and expected[:, :38].max(axis=2).min() < 100  # white at the right


def test_a_turned_photo_is_upright_and_a_transparent_image_on_white() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    data = _ramp(128, 64, "JPEG", quality=100, subsampling=0, exif=exif)
    turned = fitted(_decoded(data), (128, 64), "crop")
    assert turned[0, 0, 0] < 10 and turned[-1, 0, 0] > 245  # what grew to the right grows downwards
    file = io.BytesIO()
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(file, "PNG")
    assert (fitted(_decoded(file.getvalue()), (16, 16), "crop") == 255).all()


@pytest.mark.parametrize(
    "instruction",
    [
        "remove the cat on the left",
        "Turn it to the RIGHT",
        "change the text to hello",
        'write "open" on the door',
        "replace the sign",
        "make it say HELLO",
        "the word Café in gold",
        "make the handwriting bolder",
        "erase the inscription on the stone",
        "translate it into German",
        "set the time to 10:30",
        "把左边的猫去掉",
        "entferne die linke Lampe",
        "enlève le chien à gauche",
        "quita el perro de la derecha",
        "убери кота слева",
    ],
)
def test_sides_and_writing_are_not_mirrored(instruction: str) -> None:
    assert not may_flip(instruction)
    assert not any(draw_flip(0, index, 0, instruction) for index in range(20))


@pytest.mark.parametrize(
    "instruction", ["make it bright", "add a design of flowers", "turn the sky upright blue", "把猫去掉", "don't move"]
)
def test_other_instructions_are_mirrored_in_half_of_the_passes(instruction: str) -> None:
    assert may_flip(instruction)
    flips = np.array([[draw_flip(3, index, number, instruction) for number in range(16)] for index in range(64)])
    assert 0.45 < flips.mean() < 0.55 and len({tuple(row) for row in flips}) == 64
