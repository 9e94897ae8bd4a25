"""Every fast kernel equals plain attention and a dense mask, forward and backward; who gets which kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varedit_jax.scales import Pyramid
from varedit_jax.transformer.attention import (
    Visibility,
    attend,
    grouped_attention,
    prefix_attention,
    splash_attention,
    visibility_mask,
)
from varedit_jax.transformer.kernels import splash

GRIDS = ((1, 1), (3, 2), (7, 9))
PYRAMID = Pyramid(GRIDS, GRIDS)
BLOCKS = {
    "finest": Visibility(PYRAMID, "finest", scale_aligned=False),
    "full": Visibility(PYRAMID, "full", scale_aligned=False),
    "sar, block 0": Visibility(PYRAMID, "sar", scale_aligned=True),
    "sar, others": Visibility(PYRAMID, "sar", scale_aligned=False),
}
BATCH, HEADS, SIZE = 2, 2, 8


def dense(q, k, v, visibility):
    """One product under the whole mask."""
    return attend(q, visibility.all_keys(k), visibility.all_keys(v), mask_LM=visibility_mask(visibility))


KERNELS = {
    "plain": prefix_attention,
    "plain, scores made again": functools.partial(prefix_attention, remat=True),
    "splash": functools.partial(splash_attention, interpret=True),
    "grouped": functools.partial(grouped_attention, implementation="xla", small=16),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks a sequence, as long ones have."""
    monkeypatch.setattr(splash, "LARGEST_BLOCK", 128)


@pytest.fixture(scope="module")
def compare(quick_jit):
    """(output, gradients of q, k and v) of an attention function on random arrays; compiled once each."""

    @functools.cache
    def run(function, visibility, tokens):
        q, k, v, cotangent = np.random.default_rng(0).normal(size=(4, BATCH, tokens, HEADS, SIZE)).astype(np.float32)

        @quick_jit
        def both(q, k, v):
            out, pull = jax.vjp(lambda q, k, v: function(q, k, v, visibility), q, k, v)
            return out, pull(jnp.asarray(cotangent))

        return jax.tree.leaves(both(q, k, v))

    return run


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("block", BLOCKS)
def test_equals_a_dense_mask_forward_and_backward(compare, block, kernel):
    visibility = BLOCKS[block]
    tokens = visibility.source_tokens + PYRAMID.target_tokens
    wanted = compare(dense, visibility, tokens)
    found = compare(KERNELS[kernel], visibility, tokens)
    for name, x, y in zip(("output", "dq", "dk", "dv"), found, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5, err_msg=name)
