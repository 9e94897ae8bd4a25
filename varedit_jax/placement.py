"""The way of an image to the model's size and back (model.md, section 8)."""

import dataclasses

import numpy as np
from PIL import Image

from varedit_jax.errors import UserError
from varedit_jax.images import shape_of

_STRIP_PIXELS = 16_000_000  # of a padded image that are in memory at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """The place of an image in the one that the model sees: at the top left, with white around."""

    original_hw: tuple[int, int]  # pixels of the image as given
    fitted_hw: tuple[int, int]  # pixels of the model's image
    content_hw: tuple[int, int]  # the part of these that the image fills
    padded_hw: tuple[int, int]  # pixels of the image as given, with its padding


def fit(image_HW3: np.ndarray, size_hw: tuple[int, int]) -> tuple[np.ndarray, Placement]:
    """Pads an image with white at the right or bottom to the aspect of `size_hw`, and resizes it (Lanczos).

    uint8 [H, W, 3] to uint8 [h, w, 3] with (h, w) = `size_hw`, and what `restore` needs to undo it. Raises UserError
    for an image so narrow that less than one row or column would be left of it.
    """
    height, width = shape_of(image_HW3)
    h, w = size_hw
    padded_height, padded_width = max(height, round(width * h / w)), max(width, round(height * w / h))
    rows, columns = height * h / padded_height, width * w / padded_width
    if min(rows, columns) < 1:
        raise UserError(
            f"the image is {width} x {height} pixels, too narrow to be shown to the model at {w} x {h}; crop it"
        )
    # Bit for bit what padding and then resizing gives, width before height; but a few rows at a time, since the padded
    # image of a long strip can be hundreds of times its size.
    image = Image.fromarray(image_HW3)
    canvas = Image.new("RGB", (w, padded_height), "white")
    step = max(1, _STRIP_PIXELS // padded_width)
    for top in range(0, height, step):
        bottom = min(top + step, height)
        strip = Image.new("RGB", (padded_width, bottom - top), "white")
        strip.paste(image.crop((0, top, width, bottom)), (0, 0))
        canvas.paste(strip.resize((w, bottom - top), Image.Resampling.LANCZOS), (0, top))
    placement = Placement(
        original_hw=(height, width),
        fitted_hw=(h, w),
        content_hw=(round(rows), round(columns)),
        padded_hw=(padded_height, padded_width),
    )
    return np.array(canvas.resize((w, h), Image.Resampling.LANCZOS)), placement


def restore(image_hw3: np.ndarray, placement: Placement) -> np.ndarray:
    """Crops the padding off an edited image and resizes it (Lanczos) to the size of the original.

    uint8 [h, w, 3] to uint8 [H, W, 3]. Raises ValueError if the image is not of the size that `fit` gave.
    """
    _check_fitted(image_hw3, placement)
    rows, columns = placement.content_hw
    height, width = placement.original_hw
    content = Image.fromarray(np.ascontiguousarray(image_hw3[:rows, :columns]))
    return np.array(content.resize((width, height), Image.Resampling.LANCZOS))


def restore_released(image_hw3: np.ndarray, placement: Placement) -> np.ndarray:
    """As `restore`, pixel by pixel as VAREdit's published code: the whole image is resized (Lanczos), then cropped.

    Where the padding begins, the two differ: here its white mixes with the last pixels of the image.
    """
    _check_fitted(image_hw3, placement)
    height, width = placement.original_hw
    padded_height, padded_width = placement.padded_hw
    fitted = Image.fromarray(np.ascontiguousarray(image_hw3))
    wide = fitted.resize((padded_width, fitted.height), Image.Resampling.LANCZOS).crop((0, 0, width, fitted.height))
    canvas = Image.new("RGB", (width, height))
    step = max(1, _STRIP_PIXELS // padded_height)  # columns; the padded image of a long strip is large, as in `fit`
    for left in range(0, width, step):
        right = min(left + step, width)
        strip = wide.crop((left, 0, right, fitted.height))
        tall = strip.resize((right - left, padded_height), Image.Resampling.LANCZOS)
        canvas.paste(tall.crop((0, 0, right - left, height)), (left, 0))
    return np.array(canvas)


def _check_fitted(image_hw3: np.ndarray, placement: Placement) -> None:
    if shape_of(image_hw3) != placement.fitted_hw:
        raise ValueError(f"the image is {shape_of(image_hw3)}, but it was placed in {placement.fitted_hw}")
