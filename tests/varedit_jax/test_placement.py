"""The way of an image to the model's size and back."""

import numpy as np
import pytest
from PIL import Image

from tests.varedit_jax.test_images import photo
from varedit_jax.errors import UserError
from varedit_jax.placement import Placement, fit, restore, restore_released


def padded_first(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """The padded image as a whole, then one resize."""
    height, width, _ = image.shape
    h, w = size_hw
    padded = Image.new("RGB", (max(width, round(height * w / h)), max(height, round(width * h / w))), "white")
    padded.paste(Image.fromarray(image), (0, 0))
    return np.array(padded.resize((w, h), Image.Resampling.LANCZOS))


@pytest.mark.parametrize(
    "shape, size_hw, content_hw",
    [
        ((64, 64), (32, 32), (32, 32)),
        ((30, 90), (48, 48), (16, 48)),
        ((90, 30), (48, 48), (48, 16)),
        ((37, 53), (64, 48), (33, 48)),
        ((53, 37), (48, 64), (48, 33)),
        ((20, 30), (64, 96), (64, 96)),
        ((1, 1), (16, 16), (16, 16)),
        ((3, 32), (16, 16), (2, 16)),
    ],
)
def test_fit_equals_padding_then_resizing(shape, size_hw, content_hw):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    fitted, placement = fit(image, size_hw)
    assert fitted.shape == (*size_hw, 3)
    np.testing.assert_array_equal(fitted, padded_first(image, size_hw))
    padded_hw = (
        max(shape[0], round(shape[1] * size_hw[0] / size_hw[1])),
        max(shape[1], round(shape[0] * size_hw[1] / size_hw[0])),
    )
    assert placement == Placement(original_hw=shape, fitted_hw=size_hw, content_hw=content_hw, padded_hw=padded_hw)
    assert restore(fitted, placement).shape == restore_released(fitted, placement).shape == image.shape


def test_fit_in_strips_equals_one_piece():
    """An image of more rows than are padded at a time."""
    image = np.random.default_rng(0).integers(0, 256, (6000, 1500, 3), np.uint8)
    fitted, _ = fit(image, (64, 64))
    np.testing.assert_array_equal(fitted, padded_first(image, (64, 64)))


def test_fit_pads_with_white_at_the_right_and_bottom():
    black = np.zeros((32, 64, 3), np.uint8)
    fitted, placement = fit(black, (64, 64))
    assert placement.content_hw == (32, 64)
    assert (fitted[:32] == 0).all()
    assert (fitted[32:] == 255).all()
    fitted, placement = fit(black.transpose(1, 0, 2).copy(), (64, 64))
    assert placement.content_hw == (64, 32)
    assert (fitted[:, :32] == 0).all()
    assert (fitted[:, 32:] == 255).all()


@pytest.mark.parametrize("back", [restore, restore_released])
@pytest.mark.parametrize("shape", [(64, 64), (64, 40), (17, 64)])
def test_there_and_back_at_the_same_size_changes_nothing(shape, back):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    fitted, placement = fit(image, (64, 64))
    np.testing.assert_array_equal(back(fitted, placement), image)


@pytest.mark.parametrize("back", [restore, restore_released])
@pytest.mark.parametrize("shape", [(300, 300), (300, 187), (123, 300)])
def test_there_and_back_keeps_the_geometry(shape, back):
    image = photo(*shape)
    fitted, placement = fit(image, (128, 128))
    error = np.abs(back(fitted, placement).astype(int) - image)
    inner = error[: shape[0] * 9 // 10, : shape[1] * 9 // 10]  # the white mixes in at the very edge
    assert inner.max() <= 4  # of 255; one pixel of the model's image is a step of 4 here at most


def test_too_narrow_images_are_refused_before_they_are_padded():
    with pytest.raises(UserError, match="33 x 1 pixels, too narrow to be shown to the model at 32 x 32; crop it"):
        fit(np.zeros((1, 33, 3), np.uint8), (32, 32))
    with pytest.raises(UserError, match="too narrow"):
        fit(np.zeros((10_000_000, 1, 3), np.uint8), (32, 32))
    assert fit(np.zeros((1, 32, 3), np.uint8), (32, 32))[1].content_hw == (1, 32)


def test_fit_and_restore_check_what_they_get():
    _, placement = fit(photo(), (32, 32))
    for back in (restore, restore_released):
        with pytest.raises(ValueError, match=r"\(16, 16\), but it was placed in \(32, 32\)"):
            back(np.zeros((16, 16, 3), np.uint8), placement)
    for wrong in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((0, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="expected uint8"):
            fit(wrong, (32, 32))


@pytest.mark.parametrize("shape", [(64, 64), (30, 91), (91, 30), (1, 1), (200, 333), (333, 64), (7, 128), (4500, 900)])
def test_squares_are_those_of_the_release_in_every_pixel(shape):
    """White to the longer side, at the right or bottom, and one resize; back likewise, then the corner is cut out.

    The largest is restored in strips.
    """
    draw, side = np.random.default_rng(0), max(shape)
    image, edited = (draw.integers(0, 256, (*size, 3), np.uint8) for size in (shape, (48, 48)))
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(Image.fromarray(image), (0, 0))
    wanted = square.resize((48, 48), resample=Image.Resampling.LANCZOS)
    fitted, placement = fit(image, (48, 48))
    np.testing.assert_array_equal(fitted, np.array(wanted))
    back = Image.fromarray(edited).resize((side, side), resample=Image.Resampling.LANCZOS)
    wanted = back.crop((0, 0, shape[1], shape[0]))
    np.testing.assert_array_equal(restore_released(edited, placement), np.array(wanted))
