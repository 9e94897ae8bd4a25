"""Images of any size to the model's: what is kept, what is cut off, and what may be mirrored."""

import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines.transforms import draw_flip, fitted, may_flip
from tests.data_pipelines.images import opened
from varedit_jax.images import fit


def _ramp(width: int, height: int, kind: str = "PNG", **options: object) -> bytes:
    """Red grows to the right from 0 to 255, green downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0] = np.linspace(0, 255, width)
    pixels[:, :, 1] = np.linspace(0, 255, height)[:, None]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def test_a_image_of_the_size_is_left_alone() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    np.testing.assert_array_equal(fitted(opened(file.getvalue()), (32, 48), "crop"), pixels)
    np.testing.assert_array_equal(fitted(opened(file.getvalue()), (32, 48), "crop", flip=True), pixels[:, ::-1])


def test_crop_is_lanczos_of_the_middle() -> None:
    data = _ramp(300, 100)
    found = fitted(opened(data), (64, 64), "crop")
    whole = Image.open(io.BytesIO(data))
    expected = np.asarray(whole.resize((64, 64), Image.Resampling.LANCZOS, box=(100, 0, 200, 100)))
    np.testing.assert_array_equal(found, expected)
    assert abs(int(found[0, 0, 0]) - 85) <= 1 and abs(int(found[0, -1, 0]) - 170) <= 1  # a third of the way, and two
    assert found[0, 0, 1] <= 1 and found[-1, 0, 1] >= 254  # nothing is cut off above and below


def test_pad_is_what_editing_does() -> None:
    data = _ramp(60, 100)
    expected, _ = fit(np.asarray(Image.open(io.BytesIO(data))), (64, 64))
    np.testing.assert_array_equal(fitted(opened(data), (64, 64), "pad"), expected)
    mirrored, _ = fit(np.asarray(Image.open(io.BytesIO(data)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)), (64, 64))
    np.testing.assert_array_equal(fitted(opened(data), (64, 64), "pad", flip=True), mirrored)
    assert (expected[:, 42:] >= 250).all() and expected[:, :38].max(axis=2).min() < 100  # white at the right


def test_a_turned_photo_is_upright_and_a_transparent_image_on_white() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = fitted(opened(_ramp(128, 64, "JPEG", quality=100, subsampling=0, exif=exif)), (128, 64), "crop")
    assert turned[0, 0, 0] < 10 and turned[-1, 0, 0] > 245  # what grew to the right grows downwards
    file = io.BytesIO()
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(file, "PNG")
    assert (fitted(opened(file.getvalue()), (16, 16), "crop") == 255).all()


@pytest.mark.parametrize("resize", ["crop", "pad"])
def test_a_decoder_that_reduces_changes_next_to_nothing(resize: str) -> None:
    """512 to 64 pixels: the decoder gives 256, four times what is needed. Details are of two pixels of the result."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    image = Image.fromarray(pixels).resize((512, 512), Image.Resampling.BICUBIC)
    jpeg, png = io.BytesIO(), io.BytesIO()
    image.save(jpeg, "JPEG", quality=95)
    Image.open(io.BytesIO(jpeg.getvalue())).save(png, "PNG")  # the same pixels, decoded in full
    reduced, full = (fitted(opened(file.getvalue()), (64, 64), resize).astype(float) for file in (jpeg, png))
    assert 0 < np.abs(reduced - full).max() <= 3 and np.abs(reduced - full).mean() < 0.5


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
