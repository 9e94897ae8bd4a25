"""Pixels <-> the model's range (model.md, sections 2 and 8)."""

from typing import TypeVar

import jax
import numpy as np

ArrayT = TypeVar("ArrayT", np.ndarray, jax.Array)


def to_model_range(image: ArrayT) -> ArrayT:
    """uint8 pixels of any shape to float32 in [-1, 1]: x / 255 * 2 - 1. NumPy in, NumPy out; JAX likewise."""
    return image.astype(np.float32) / 255 * 2 - 1


def to_uint8(image: ArrayT) -> ArrayT:
    """Floats in [-1, 1] of any shape to uint8 pixels: floor((x + 1) / 2 * 255), clipped. Inverse but for rounding down.

    NumPy in, NumPy out; JAX likewise.
    """
    return ((image.astype(np.float32) + 1) / 2 * 255).clip(0, 255).astype(np.uint8)
