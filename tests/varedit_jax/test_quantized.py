"""Kernels in int8: what rounding makes of them, and products with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varedit_jax.config import EditorConfig, preset
from varedit_jax.parameters import INIT, abstract_params, bytes_by_type, quantized_params, stored_params, summed_axes
from varedit_jax.quantized import Int8, dequantized, dot, quantize
from varedit_jax.scales import editor_pyramid
from varedit_jax.text.t5 import T5Encoder
from varedit_jax.transformer import products
from varedit_jax.transformer.model import Transformer
from varedit_jax.weights import names

TINY = preset("tiny")


def restored(params):
    """The tree with what int8 stands for, in float32."""
    return jax.tree.map(
        lambda leaf: dequantized(leaf.values, leaf.scale) if isinstance(leaf, Int8) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, Int8),
    )


# --- rounding


def test_a_case_by_hand():
    """Steps of 0.02 and 1 / 254; halves go to the even number; a channel of zeros has scale 1."""
    kernel = quantize(np.float32([[1.01, 0.5, 0], [-2.54, 0.1, 0], [0.03, -0.25, 0]]), (0,))
    np.testing.assert_array_equal(kernel.values, [[50, 127, 0], [-127, 25, 0], [2, -64, 0]])
    np.testing.assert_allclose(kernel.scale, [[0.02, 0.5 / 127, 1]], rtol=1e-6)
    assert (kernel.values.dtype, kernel.scale.dtype) == (np.int8, np.float32)


@pytest.mark.parametrize("shape, summed, scales", [
    ((6, 9), (0,), (1, 9)),
    ((6, 3, 2, 4), (0,), (1, 3, 2, 4)),
    ((5, 6, 9), (1,), (5, 1, 9)),
    ((5, 2, 4, 9), (1, 2), (5, 1, 1, 9)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_value_is_off_by_half_a_step_at_most(shape, summed, scales, dtype):
    """A step is that of its channel alone, whose largest value is 127 of them."""
    draw = np.random.default_rng(0)
    for _ in range(20):
        kernel = (draw.normal(size=shape) * 10 ** draw.uniform(-6, 6, scales)).astype(dtype)
        found = quantize(kernel, summed)
        exact = kernel.astype(np.float64)
        assert found.scale.shape == scales
        error = np.abs(found.values * found.scale.astype(np.float64) - exact)
        assert (error <= 0.5 * found.scale * (1 + 1e-5)).all()
        assert (np.abs(found.values.astype(int)).max(axis=summed) == 127).all()
        np.testing.assert_allclose(127 * found.scale, np.abs(exact).max(axis=summed, keepdims=True), rtol=1e-6)


def test_a_scan_takes_the_kernel_of_a_layer():
    """A stack is rounded as each of its layers alone, and `scan` slices values and scales."""
    stack = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    kernel = quantize(stack, (1,))
    x = np.float32([[1, 2, 3, 4]])
    _, found = jax.lax.scan(lambda carry, layer: (carry, dot(x, layer)), 0, kernel)
    np.testing.assert_array_equal(found, np.stack([dot(x, quantize(layer, (0,))) for layer in stack]))


# --- products


@pytest.mark.parametrize("dtype, error", [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
@pytest.mark.parametrize("shape, axes", [((6, 9), 1), ((6, 2, 4), 1), ((2, 3, 9), 2)])
def test_products_are_those_with_the_restored_kernel(dtype, error, shape, axes):
    """Rounded once, behind the scale."""
    draw = np.random.default_rng(0)
    kernel = quantize(draw.normal(size=shape).astype(np.float32), tuple(range(axes)))
    x = draw.normal(size=(2, 5, *shape[:axes])).astype(dtype)
    found = dot(x, kernel, axes)
    wanted = np.tensordot(x.astype(np.float64), dequantized(kernel.values, kernel.scale), axes)
    assert found.dtype == dtype and found.shape == wanted.shape
    assert np.abs(np.asarray(found, np.float64) - wanted).max() < error * np.abs(wanted).max()


@pytest.mark.parametrize("ordered", [False, True], ids=["rows", "heads"])
@pytest.mark.parametrize("mode", ["plain", "int8"])
def test_products_of_blocks(monkeypatch, ordered, mode):
    """Of all forms of kernels, in both orders of heads.

    With `products` in int8 too, they are bit for bit those of a float32 kernel, which is rounded alike.
    """
    monkeypatch.setattr(products, "matmuls_order_heads", lambda: ordered)
    config = dataclasses.replace(TINY.transformer, width=16, heads=2, products=mode)
    draw = np.random.default_rng(0)
    x = draw.normal(size=(2, 5, 16)).astype(np.float32)
    x_BHLD = draw.normal(size=(2, 2, 5, 8)).astype(np.float32)
    qkv, square = (draw.normal(size=shape).astype(np.float32) for shape in ((16, 3, 2, 8), (16, 16)))

    def all_forms(qkv, square):
        return (
            products.to_heads(x, qkv[:, 1], config),
            products.to_heads(x, square, config),
            *products.to_keys_and_values(x, qkv[:, :2], config),
            products.from_heads(x_BHLD, square, config),
            products.product(x, square, config),
        )

    kernels = quantize(qkv, (0,)), quantize(square, (0,))
    found = all_forms(*kernels)
    wanted = all_forms(qkv, square) if mode == "int8" else all_forms(*restored(kernels))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


def test_models_compute_with_int8_as_with_the_restored_weights(lively, quick_jit):
    """Blocks and text encoder, in float32; what the rounding itself changes is far more."""
    params = {part: lively(abstract_params(TINY, part)) for part in ("transformer", "text")}
    kept, draw = quantized_params(params), np.random.default_rng(0)
    ids_BT, length_B = np.int32([[3, 4, 5, 1], [7, 1, 0, 0]]), np.int32([4, 2])
    tokens = draw.normal(size=(2, 16, 4)).astype(np.float32), draw.normal(size=(2, 20, 4)).astype(np.float32)
    encode = quick_jit(T5Encoder(TINY.text).apply)
    predict = quick_jit(Transformer(TINY.transformer, editor_pyramid(TINY)).apply)

    def run(tree):
        features = encode({"params": tree["text"]}, ids_BT, length_B)
        return features, predict({"params": tree["transformer"]}, *tokens, features, length_B)

    for exact, found, wanted in zip(run(params), run(kept), run(restored(kept)), strict=True):
        apart, rounding = (np.abs(other - wanted).max() / np.std(wanted) for other in (found, exact))
        assert apart < 1e-4 < 3e-3 < rounding < 0.3


# --- trees


def test_which_parameters_are_int8():
    """The large matrices of blocks and layers; in the text encoder's output two axes are summed over."""
    kept = {
        part: {
            path for path, leaf in names.flat(stored_params(TINY, part, quantized=True)).items() if type(leaf) is Int8
        }
        for part in INIT
    }
    blocks = ("self_attention/qkv_kernel", "self_attention/proj/kernel", "cross_attention/q/kernel",
        "cross_attention/kv_kernel", "cross_attention/proj/kernel", "mlp/fc1/kernel", "mlp/fc2/kernel")  # fmt: skip
    layers = ("attention/query", "attention/key", "attention/value", "attention/out", "mlp/gate", "mlp/up", "mlp/down")
    assert kept["transformer"] == {f"{stack}/{name}" for stack in ("block_0", "blocks") for name in blocks}
    assert kept["text"] == {f"layers/{name}/kernel" for name in layers}
    assert kept["tokenizer"] == set()
    assert summed_axes("text", "layers/attention/out/kernel") == (1, 2)
    assert summed_axes("transformer", "block_0/mlp/fc1/kernel") == (0,)
    assert summed_axes("transformer", "blocks/mlp/fc1/kernel") == (1,)
    assert summed_axes("transformer", "head/kernel") == ()


def test_the_abstract_tree_is_that_of_rounded_parameters(lively):
    params = {part: lively(abstract_params(TINY, part)) for part in INIT}
    described = {part: stored_params(TINY, part, quantized=True) for part in INIT}
    shapes = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), quantized_params(params))
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), described)


def test_the_8b_editor_takes_a_quarter_of_the_memory():
    """With its encoders, where the rest of the text encoder is bfloat16."""
    config: EditorConfig = preset("8b")
    sizes = [bytes_by_type(stored_params(config, part, "bfloat16", quantized=True)) for part in INIT]
    matrices = config.transformer.depth * 16 * config.transformer.width**2
    text = config.text
    layers = text.layers * (4 * text.width * text.heads * text.head_size + 3 * text.width * text.mlp_width)
    assert sum(size.get("int8", 0) for size in sizes) == matrices + layers
    assert 9e9 < sum(sum(size.values()) for size in sizes) <= 12e9
