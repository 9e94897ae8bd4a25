"""Matrices that are rounded while they are read: whatever the block, the same values and scales."""

import numpy as np
import pytest

from varedit_jax.quantized import quantize
from varedit_jax.weights import blocks, native
from varedit_jax.weights.int8 import _Rounded


@pytest.mark.parametrize("shape, summed", [((6, 3, 4), (0,)), ((5, 6, 8), (1,)), ((5, 2, 4, 6), (1, 2))])
def test_blocks_of_a_host_are_those_of_the_whole(shape, summed):
    """A block with a part of what a channel is made of has the channel's scale."""
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    whole = quantize(kernel, summed)
    view = _Rounded(native.Leaf(shape, kernel.dtype, kernel, "kernel"), summed, np.ones(whole.scale.shape, np.float32))
    asked = tuple((size // 2, size) for size in shape)
    parts = list(view.parts_of(asked))
    assert len(parts) == (1 if 0 in summed else shape[0] - shape[0] // 2)
    for part in parts:
        np.testing.assert_array_equal(view.read_block(part, np.dtype(np.int8)), whole.values[blocks.slices(part)])
    channels = blocks.slices(tuple((0, 1) if axis in summed else part for axis, part in enumerate(asked)))
    np.testing.assert_array_equal(view.scale[channels], whole.scale[channels])
    assert (view.scale != whole.scale).any()
