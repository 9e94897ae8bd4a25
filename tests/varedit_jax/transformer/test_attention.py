"""Prefix attention against a dense mask and against the specification read plainly; what each query is touched by."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varedit_jax.config import TransformerConfig
from varedit_jax.scales import Pyramid
from varedit_jax.transformer import rope
from varedit_jax.transformer.attention import MAX_LOG_SCALE, SelfAttention, attend, prefix_attention
from varedit_jax.transformer.visibility import Visibility, visibility_mask

GRIDS = ((1, 1), (2, 3), (4, 5))
PYRAMID = Pyramid(GRIDS, GRIDS)
STOPS = (1, 7, 27)  # targets up to and with each scale
BLOCKS = {
    "finest": Visibility(PYRAMID, "finest", scale_aligned=False),
    "full": Visibility(PYRAMID, "full", scale_aligned=False),
    "sar, block 0": Visibility(PYRAMID, "sar", scale_aligned=True),
    "sar, others": Visibility(PYRAMID, "sar", scale_aligned=False),
}
HEADS, SIZE = 2, 4


def qkv(visibility: Visibility) -> np.ndarray:
    tokens = visibility.source_tokens + PYRAMID.target_tokens
    return np.random.default_rng(0).normal(size=(3, 2, tokens, HEADS, SIZE)).astype(np.float32)


def scale_of_target(token: int) -> int:
    return next(k for k, stop in enumerate(STOPS) if token < stop)


def window_mean(x_BSHD: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Adaptive average pooling of the source's keys or values, cell by cell."""
    (h, w), (rows, columns) = GRIDS[-1], grid
    plane = x_BSHD.reshape(2, h, w, HEADS, SIZE)
    cells = [
        plane[
            :, i * h // rows : math.ceil((i + 1) * h / rows), j * w // columns : math.ceil((j + 1) * w / columns)
        ].mean(axis=(1, 2))
        for i, j in itertools.product(range(rows), range(columns))
    ]
    return np.stack(cells, axis=1)


def plainly(name: str, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Model.md, "What each block may see": one query at a time, in float64."""
    conditioning = name.split(",")[0]
    S = 27 if conditioning == "full" else 20
    out = np.zeros(q.shape)
    for query in range(q.shape[1]):
        if query < S:
            stop = STOPS[scale_of_target(query)] if conditioning == "full" else S
            seen = [x[:, :stop] for x in (k, v)]
        else:
            scale = scale_of_target(query - S)
            targets = slice(S, S + STOPS[scale])
            if name == "sar, block 0":
                seen = [np.concatenate([window_mean(x[:, :S], GRIDS[scale]), x[:, targets]], axis=1) for x in (k, v)]
            elif conditioning == "full":
                seen = [np.concatenate([x[:, : STOPS[scale]], x[:, targets]], axis=1) for x in (k, v)]
            else:
                seen = [np.concatenate([x[:, :S], x[:, targets]], axis=1) for x in (k, v)]
        weights = np.exp(np.einsum("bhd,bmhd->bhm", q[:, query].astype(np.float64), seen[0]))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[:, query] = np.einsum("bhm,bmhd->bhd", weights, seen[1])
    return out


def tokens_first(function):
    """The function of arrays [B, H, L, D] as one of arrays [B, L, H, D], which these tests index by token."""

    def run(q, k, v, *rest):
        return jnp.swapaxes(function(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), *rest), 1, 2)

    return run


@pytest.fixture(scope="module")
def attention(quick_jit):
    return quick_jit(tokens_first(prefix_attention), static_argnums=3)


@pytest.mark.parametrize("name", BLOCKS)
def test_against_the_specification(attention, name):
    q, k, v = qkv(BLOCKS[name])
    np.testing.assert_allclose(attention(q, k, v, BLOCKS[name]), plainly(name, q, k, v), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["finest", "full", "sar, others"])
def test_against_a_dense_mask(attention, name):
    visibility = BLOCKS[name]
    q, k, v = qkv(visibility)
    mask = visibility_mask(visibility)
    logits = np.where(mask, np.einsum("blhd,bmhd->bhlm", q, k), -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    wanted = np.einsum("bhlm,bmhd->blhd", weights / weights.sum(axis=-1, keepdims=True), v)
    np.testing.assert_allclose(attention(q, k, v, visibility), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["finest", "full"])
def test_dense_mask(name):
    """One query and key at a time."""
    mask = visibility_mask(BLOCKS[name])
    S = 27 if name == "full" else 20
    for query, key in itertools.product(range(S + 27), repeat=2):
        scale, source_scale = scale_of_target((query - S) % 27), scale_of_target(key % 27)
        if query < S:
            wanted = key < S and (name != "full" or source_scale <= scale_of_target(query))
        elif key < S:
            wanted = name != "full" or source_scale <= scale
        else:
            wanted = scale_of_target(key - S) <= scale
        assert mask[query, key] == wanted, (query, key)


@pytest.mark.parametrize("name", BLOCKS)
def test_causality_by_gradient(quick_jit, name):
    """An output of scale k has gradient exactly 0 on keys and values it must not see, and not 0 on those it may."""
    visibility = BLOCKS[name]
    S = visibility.source_tokens
    q, k, v = qkv(visibility)

    @quick_jit
    def pull(cotangent):
        return jax.vjp(
            lambda k, v: tokens_first(prefix_attention)(q, k, v, visibility), jnp.asarray(k), jnp.asarray(v)
        )[1](cotangent)

    draw = np.random.default_rng(1)
    for scale in (None, 0, 1, 2):
        start, stop = (0, S) if scale is None else (S + (0, *STOPS)[scale], S + STOPS[scale])
        cotangent = np.zeros(q.shape, np.float32)
        cotangent[:, start:stop] = draw.normal(size=(2, stop - start, HEADS, SIZE))
        for gradient in pull(cotangent):
            touched = np.abs(np.asarray(gradient)).max(axis=(2, 3))
            seen = np.zeros(S + 27, bool)
            source_stop = STOPS[scale] if name == "full" and scale is not None else S
            seen[:source_stop] = True
            if scale is not None:
                seen[S : S + STOPS[scale]] = True
            assert (touched[:, ~seen] == 0).all()
            # A single key has a constant softmax: its gradient is 0 although it is seen.
            assert (touched[:, seen] > 0).all()


def test_masked_keys_have_no_weight(quick_jit):
    q, k, v = qkv(BLOCKS["finest"])
    run = quick_jit(tokens_first(attend))
    real = np.arange(k.shape[1])[None] < np.array([[5], [9]])
    found = run(q, k, v, real)
    for sample, stop in enumerate((5, 9)):
        weights = np.exp(np.einsum("bhd,mhd->bhm", q[sample], k[sample, :stop]))
        wanted = np.einsum("bhm,mhd->bhd", weights / weights.sum(axis=-1, keepdims=True), v[sample, :stop])
        np.testing.assert_allclose(found[sample], wanted, rtol=0, atol=1e-6)
    junk = np.where(real[:, :, None, None], v, np.float32(1e30))
    np.testing.assert_array_equal(run(q, k, junk, real), found)


def test_bfloat16_keeps_its_softmax_in_float32():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(BLOCKS["finest"]))
    found = tokens_first(attend)(q, k, v)
    assert found.dtype == jnp.bfloat16
    exact = tokens_first(attend)(*(x.astype(jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=0, atol=0.02)
    text = jax.jit(attend).lower(q, k, v).as_text()
    assert "stablehlo.exponential" in text
    assert all("bf16" not in line for line in text.splitlines() if "stablehlo.exponential" in line)


def test_cos_attention(lively, quick_jit):
    """q and k of length 1, q times exp(min(scale, log 100)), before RoPE; q and v have a bias, k has none."""
    config = TransformerConfig(width=HEADS * SIZE, heads=HEADS, depth=2, text_width=8)
    layer = SelfAttention(config, BLOCKS["finest"])
    tokens = 47
    x = np.random.default_rng(0).normal(size=(2, tokens, config.width)).astype(np.float32)
    straight = rope.rotation(np.zeros((tokens, 2), int), SIZE)  # no turn
    params = lively(jax.eval_shape(layer.init, jax.random.key(0), x, straight)["params"])
    params["scale_mul"] = np.array([1.3, 9.0], np.float32)  # the second is beyond the bound
    found, keys, values = quick_jit(layer.apply)({"params": params}, x, straight)

    q, k, v = np.einsum("blc,cnhd->nblhd", x, params["qkv_kernel"])
    q = q + params["q_bias"]
    q = q / np.linalg.norm(q, axis=-1, keepdims=True) * np.array([np.exp(1.3), 100.0])[:, None]
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    v = v + params["v_bias"]
    np.testing.assert_allclose(keys, k.swapaxes(1, 2), rtol=0, atol=1e-6)
    np.testing.assert_allclose(values, v.swapaxes(1, 2), rtol=0, atol=2e-6)
    heads = plainly("finest", q, k, v).reshape(2, tokens, -1)
    wanted = heads @ params["proj"]["kernel"] + params["proj"]["bias"]
    # A head scaled by 100 has logits up to 100: rounding of q and k is 100 times what it is elsewhere.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-5)
    assert pytest.approx(math.log(100)) == MAX_LOG_SCALE


def test_zero_queries_and_keys_have_finite_gradients(lively, quick_jit):
    config = TransformerConfig(width=HEADS * SIZE, heads=HEADS, depth=2, text_width=8)
    layer = SelfAttention(config, BLOCKS["finest"])
    x, rotation = np.zeros((1, 47, 8), np.float32), rope.rotation(np.zeros((47, 2), int), SIZE)
    params = lively(jax.eval_shape(layer.init, jax.random.key(0), x, rotation)["params"])
    params["q_bias"] *= 0
    value_and_grad = quick_jit(jax.value_and_grad(lambda p: jnp.sum(layer.apply({"params": p}, x, rotation)[0])))
    value, gradient = value_and_grad(params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
