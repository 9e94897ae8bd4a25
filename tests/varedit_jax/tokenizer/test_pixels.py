"""Pixels to the model's range and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varedit_jax.tokenizer.pixels import to_model_range, to_uint8


@pytest.mark.parametrize("module", [np, jnp])
def test_ranges(module):
    pixels = module.arange(256, dtype=np.uint8).reshape(1, 4, 64, 1)
    floats = to_model_range(pixels)
    assert isinstance(floats, type(pixels))
    assert floats.dtype == np.float32
    assert floats.min() == -1
    assert floats.max() == 1
    back = to_uint8(floats)
    assert isinstance(back, type(pixels))
    assert back.dtype == np.uint8
    # Rounding down may lose one step where x / 255 * 2 - 1 was itself rounded down.
    step = pixels.astype(np.int32) - back.astype(np.int32)
    assert step.min() >= 0
    assert step.max() <= 1


def test_to_uint8_rounds_down_and_clips():
    values = np.array([-3, -1, -1 + 1.9 / 255, 0, 1 - 0.1 / 255, 1, 7], np.float32)
    wanted = [0, 0, 0, 127, 254, 255, 255]
    assert to_uint8(values).tolist() == wanted
    assert jax.jit(to_uint8)(jnp.asarray(values)).tolist() == wanted
    assert to_uint8(jnp.asarray(values, jnp.bfloat16)).dtype == jnp.uint8
