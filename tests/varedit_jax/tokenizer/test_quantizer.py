"""The residual quantizer against a slow loop, cell by cell; self-correction; tokens and patches; losses."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varedit_jax.scales import Pyramid
from varedit_jax.tokenizer import quantizer

PYRAMIDS = {
    "square": ((1, 1), (2, 2), (4, 4)),
    "indivisible": ((1, 1), (2, 3), (3, 4), (5, 7)),
    "one scale": ((3, 2),),
    "wide to tall": ((1, 2), (4, 1), (6, 5)),
}


def pyramid(name: str) -> Pyramid:
    return Pyramid(PYRAMIDS[name], PYRAMIDS[name])


def features(cells: Pyramid, channels: int = 6, batch: int = 2, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.normal(size=(batch, *cells.last, channels)).astype(np.float32)


def slow_area(x: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Average over the window of every output cell."""
    (h, w), (rows, columns) = x.shape[1:3], grid
    out = np.zeros((len(x), rows, columns, x.shape[-1]))
    for i, j in itertools.product(range(rows), range(columns)):
        window = x[
            :, i * h // rows : math.ceil((i + 1) * h / rows), j * w // columns : math.ceil((j + 1) * w / columns)
        ]
        out[:, i, j] = window.mean(axis=(1, 2))
    return out


def slow_linear(x: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Bilinear interpolation at the center of every output cell."""
    (h, w), (rows, columns) = x.shape[1:3], grid
    out = np.zeros((len(x), rows, columns, x.shape[-1]))
    for i, j in itertools.product(range(rows), range(columns)):
        y = min(max((i + 0.5) * h / rows - 0.5, 0), h - 1)
        z = min(max((j + 0.5) * w / columns - 0.5, 0), w - 1)
        y0, z0 = int(y), int(z)
        y1, z1 = min(y0 + 1, h - 1), min(z0 + 1, w - 1)
        top = x[:, y0, z0] * (1 - z + z0) + x[:, y0, z1] * (z - z0)
        bottom = x[:, y1, z0] * (1 - z + z0) + x[:, y1, z1] * (z - z0)
        out[:, i, j] = top * (1 - y + y0) + bottom * (y - y0)
    return out


def slow_quantize(x: np.ndarray, cells: Pyramid, flips=None):
    """Model.md, section 3, word for word, in float64."""
    accumulated = np.zeros(x.shape)
    bits, inputs = [], []
    for k, grid in enumerate(cells.grids):
        residual = x - accumulated
        if k < cells.scales - 1:
            residual = slow_area(residual, grid)
        bits.append(residual > 0)
        seen = bits[-1] if flips is None else bits[-1] ^ flips[k]
        code = np.where(seen, 1.0, -1.0) / math.sqrt(x.shape[-1])
        accumulated = accumulated + slow_linear(code, cells.last)
        if k < cells.scales - 1:
            inputs.append(slow_linear(accumulated, cells.grids[k + 1]))
    return bits, inputs, accumulated


@pytest.fixture(scope="module")
def quantize(quick_jit):
    return quick_jit(quantizer.quantize, static_argnums=1)


def assert_close(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), np.asarray(other, np.float64), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", PYRAMIDS)
def test_against_a_slow_loop(quantize, quick_jit, name):
    cells = pyramid(name)
    x = features(cells)
    found = quantize(x, cells)
    bits, inputs, accumulated = slow_quantize(x, cells)
    assert_close(found.bits, bits)
    assert_close(found.inputs, inputs)
    assert_close([found.quantized], [accumulated])
    assert [b.shape[1:3] for b in found.bits] == list(cells.grids)
    assert all(b.dtype == jnp.bool_ for b in found.bits)
    assert_close([quick_jit(quantizer.dequantize, static_argnums=1)(found.bits, cells)], [accumulated])


def test_flips_reach_later_scales_but_not_their_own_labels(quantize):
    cells = pyramid("indivisible")
    x = features(cells)
    draw = np.random.default_rng(1)
    flips = tuple(draw.random((2, *grid, 6)) < 0.3 for grid in cells.grids)
    found = quantize(x, cells, flips)
    bits, inputs, accumulated = slow_quantize(x, cells, flips)
    assert_close(found.bits, bits)
    assert_close(found.inputs, inputs)
    assert_close([found.quantized], [accumulated])

    plain = quantize(x, cells)
    only_second = quantize(x, cells, (None, flips[1]))
    for scale in (0, 1):
        np.testing.assert_array_equal(only_second.bits[scale], plain.bits[scale])
    np.testing.assert_array_equal(only_second.inputs[0], plain.inputs[0])  # of scale 1
    for scale in (2, 3):
        assert np.abs(np.asarray(only_second.inputs[scale - 1]) - np.asarray(plain.inputs[scale - 1])).max() > 0.1
        assert (np.asarray(only_second.bits[scale]) != np.asarray(plain.bits[scale])).any()


def test_later_scales_repair_flipped_bits(quantize):
    """The labels after a flip lead nearer to the feature than the labels without it would."""
    cells = Pyramid(((4, 4),) * 6, ((4, 4),) * 6)
    x = 0.5 * features(cells, channels=4, batch=8)
    flip = np.zeros((8, 4, 4, 4), bool)
    flip[:, :, :, 0] = True
    plain, flipped = quantize(x, cells), quantize(x, cells, (flip,))
    ignoring = quantizer.dequantize([plain.bits[0] ^ flip, *plain.bits[1:]], cells)

    def error(quantized: jax.Array) -> float:
        return np.square(np.asarray(quantized) - x)[..., 0].mean()

    assert error(plain.quantized) <= error(flipped.quantized) < 0.5 * error(ignoring)


def test_zero_is_bit_zero(quantize):
    cells = pyramid("square")
    found = quantize(np.zeros((1, 4, 4, 4), np.float32), cells)
    assert not found.bits[0].any()
    assert float(found.inputs[0].max()) == -0.5  # -1 / sqrt(4)
    assert found.bits[1].all()  # what is left is 0.5
    np.testing.assert_array_equal(quantizer.code(jnp.array([[True, False]])), np.float32([[2**-0.5, -(2**-0.5)]]))


def test_size_of_the_feature_does_not_matter_at_the_first_scale(quantize):
    """Bits are signs: the published code normalizes the residual first, which changes none of them."""
    cells = pyramid("square")
    x = features(cells)
    for factor in (1e-20, 1e6):
        np.testing.assert_array_equal(quantize(np.float32(factor) * x, cells).bits[0], quantize(x, cells).bits[0])


def test_features_of_another_grid_are_refused():
    with pytest.raises(ValueError, match=r"features have grid \(4, 5\), the pyramid ends at \(4, 4\)"):
        quantizer.quantize(jnp.zeros((1, 4, 5, 4)), pyramid("square"))


# --- tokens


@pytest.mark.parametrize("patchify", [False, True])
def test_to_cells_undoes_to_tokens(patchify):
    x = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    tokens = quantizer.to_tokens(x, patchify)
    assert tokens.shape == ((2, 6, 12) if patchify else (2, 24, 3))
    grid = (2, 3) if patchify else (4, 6)
    np.testing.assert_array_equal(quantizer.to_cells(tokens, grid, patchify), x)


def test_order_of_channels_in_a_patch():
    """Token channel c * 4 + 2 * dy + dx holds cell channel c at (2y + dy, 2x + dx); tokens are row-major."""
    x = np.arange(4 * 6 * 3).reshape(1, 4, 6, 3)
    tokens = np.asarray(quantizer.to_tokens(jnp.asarray(x), True))
    for y, xx, c, dy, dx in itertools.product(range(2), range(3), range(3), range(2), range(2)):
        assert tokens[0, y * 3 + xx, c * 4 + 2 * dy + dx] == x[0, 2 * y + dy, 2 * xx + dx, c]
    plain = np.asarray(quantizer.to_tokens(jnp.asarray(x), False))
    assert (plain[0, 7] == x[0, 1, 1]).all()


# --- what a tokenizer is trained by


def test_straight_through_is_the_identity_backward():
    x, q = jnp.asarray(features(pyramid("square"))), jnp.ones((2, 4, 4, 6))
    np.testing.assert_allclose(quantizer.straight_through(x, q), q, rtol=0, atol=1e-6)
    cotangent = jnp.asarray(features(pyramid("square"), seed=1))
    gradients = jax.vjp(quantizer.straight_through, x, q)[1](cotangent)
    np.testing.assert_array_equal(gradients[0], cotangent)
    assert not gradients[1].any()


def test_no_gradient_flows_through_the_bits(quick_jit):
    cells = pyramid("square")
    gradient = quick_jit(jax.grad(lambda x: jnp.sum(quantizer.quantize(x, cells).quantized)))(features(cells))
    assert not gradient.any()


def test_commitment():
    x, q = jnp.asarray([[1.0, 3.0]]), jnp.asarray([[0.0, 1.0]])
    value, gradients = jax.value_and_grad(quantizer.commitment, argnums=(0, 1))(x, q)
    assert float(value) == 2.5
    np.testing.assert_array_equal(gradients[0], [[1.0, 2.0]])
    assert not gradients[1].any()


def slow_entropy(probability: np.ndarray) -> np.ndarray:
    p = np.clip(probability.astype(np.float64), 1e-12, 1 - 1e-12)
    return -p * np.log(p) - (1 - p) * np.log(1 - p)


def test_entropies_against_their_definition(quick_jit):
    cells = pyramid("indivisible")
    x = features(cells, batch=3)

    def entropies(x):
        residuals = quantizer.quantize(x, cells)
        return residuals.residuals, [quantizer.bit_entropy(x, residuals, cells, t) for t in (1.0, 0.3)]

    residuals, found = quick_jit(entropies)(x)
    for temperature, values in zip((1.0, 0.3), found, strict=True):
        token, batch = [], []
        for residual in residuals:
            unit = np.asarray(residual) / np.linalg.norm(residual, axis=-1, keepdims=True)
            probability = 1 / (1 + np.exp(-2 * unit * math.sqrt(6) / temperature))
            token.append(slow_entropy(probability).mean())
            batch.append(slow_entropy(probability.mean(axis=(0, 1, 2))).mean())
        np.testing.assert_allclose(values, [np.mean(token), np.mean(batch)], rtol=1e-5)


def test_losses_and_gradients_are_finite_at_zero_and_at_large_features(quick_jit):
    cells = pyramid("square")

    def losses(x):
        residuals = quantizer.quantize(x, cells)
        entropies = quantizer.bit_entropy(x, residuals, cells, 0.01)
        values = jnp.stack([quantizer.commitment(x, residuals.quantized), *entropies])
        return values, values

    run = quick_jit(jax.jacrev(losses, has_aux=True))
    for factor in (0.0, 1e-15, 1e4):
        gradients, values = run(np.float32(factor) * features(cells))
        assert np.isfinite(values).all()
        assert np.isfinite(gradients).all()
