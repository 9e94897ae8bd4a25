"""Sizes of the two sides of a pair: how they differ, and whether one can be brought to the other.

Training resizes a target to its source's size first (transforms.py), so a difference of aspect is a distortion.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

SAME_ASPECT = 1.01  # most change of aspect that rounding to whole pixels explains
SIZES = ("width", "height", "target_width", "target_height")  # columns of a pair, in pixels, upright
KINDS = ("same size", "same aspect", "other aspect")  # of pairs, in reports


def aspect_change(width: ArrayLike, height: ArrayLike, target_width: ArrayLike, target_height: ArrayLike) -> Any:
    """Returns the ratio of the sides' aspects, at least 1: how much a resize to the source's size distorts a target."""
    ratio = np.true_divide(width, height) * np.true_divide(target_height, target_width)
    return np.maximum(ratio, 1 / ratio)


def is_turned(width: int, height: int, target_width: int, target_height: int) -> bool:
    """Returns True if a target fits its source better after a quarter turn."""
    straight = aspect_change(width, height, target_width, target_height)
    return bool(straight > SAME_ASPECT and aspect_change(width, height, target_height, target_width) < straight)


def pair_kinds(
    width: NDArray[Any], height: NDArray[Any], target_width: NDArray[Any], target_height: NDArray[Any]
) -> dict[str, int]:
    """Returns how many of n pairs are of each of `KINDS`; arguments are [n], in pixels."""
    size = (width == target_width) & (height == target_height)
    aspect = aspect_change(width, height, target_width, target_height) <= SAME_ASPECT
    counts = np.bincount(np.where(size, 0, np.where(aspect, 1, 2)), minlength=len(KINDS))
    return dict(zip(KINDS, counts.tolist(), strict=True))
