"""Attention to a cache and to new tokens, each way of computing it against one softmax over both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varedit_jax.transformer.kernels import cached

LAYERS, BATCH, HEADS, HEAD_SIZE = 3, 2, 4, 128

WAYS = {
    "parts": cached.by_parts,
    "parts of 16 queries": functools.partial(cached.by_parts, block=16),
    "cudnn": functools.partial(cached.by_cudnn, implementation="xla"),
    "pallas": functools.partial(cached.by_pallas, interpret=True),
}


def arrays(new: int, room: int, dtype: str = "float32") -> tuple[jax.Array, ...]:
    """Queries, keys and values of new tokens, and caches, in which large numbers lie where nothing has been written."""
    draw = np.random.default_rng(0)
    shapes = [(BATCH, HEADS, new, HEAD_SIZE)] * 3 + [(LAYERS, BATCH, HEADS, room, HEAD_SIZE)] * 2
    return tuple(jnp.asarray(0.3 * draw.normal(size=shape), dtype) for shape in shapes)


def joined(q, k, v, cache_k, cache_v, layer, seen):
    """A softmax in float64 over the written part of a layer and the new tokens."""
    both = [np.concatenate([x[layer, :, :, :seen], y], axis=2) for x, y in ((cache_k, k), (cache_v, v))]
    q, keys, values = (np.asarray(x, np.float64) for x in (q, *both))
    scores = np.exp(q @ keys.swapaxes(2, 3))
    return scores / scores.sum(axis=-1, keepdims=True) @ values


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("new, seen, room", [(1, 1, 512), (37, 700, 1024), (600, 512, 1536), (130, 1024, 1024)])
def test_equals_one_softmax(way, new, seen, room):
    """One token, several blocks of queries and of keys, a cache that is full; what lies behind `seen` is not seen."""
    given = list(arrays(new, room))
    for place in (3, 4):
        given[place] = given[place].at[:, :, :, seen:].set(1e4)
    attention = jax.jit(functools.partial(WAYS[way], seen=seen))
    for layer in (0, 2):
        found = attention(*given, jnp.int32(layer))
        np.testing.assert_allclose(found, joined(*given, layer, seen), atol=2e-6)


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16(way):
    given = arrays(37, 512, "bfloat16")
    with jax.numpy_dtype_promotion("standard"):  # of JAX's own code in place of cuDNN
        found = WAYS[way](*given, jnp.int32(1), seen=300)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(found), joined(*map(np.float32, given), 1, 300), atol=4e-3)


@pytest.mark.parametrize("tokens, wanted", [(1, 512), (512, 512), (513, 1024), (2216, 2560)])
def test_caches_of_the_kernel_are_whole_blocks(tokens, wanted):
    assert cached.cache_tokens(tokens) == wanted


def test_no_layer_is_joined_with_what_is_new():
    """The program of `parts` holds no array as long as the cache and the new tokens together."""
    seen, new = 700, 37
    attention = functools.partial(cached.by_parts, seen=seen)
    text = jax.jit(attention).lower(*arrays(new, 1024), jnp.int32(1)).compile().as_text()
    assert f"{seen}" in text
    assert f",{seen + new}" not in text
