"""The bitwise loss against a plain two-way cross-entropy, token by token."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varedit_jax.config import LossConfig
from varedit_jax.scales import Pyramid
from varedit_jax.training.loss import bitwise_loss, token_weights

GRIDS = ((1, 1), (2, 3), (4, 5))
PYRAMID = Pyramid(GRIDS, GRIDS)
SCALE_OF_TOKEN = np.repeat(np.arange(3), [1, 6, 20])
BATCH, BITS = 2, 5


@pytest.fixture(scope="module")
def example() -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, L, N, 2] and residuals [B, L, N]."""
    draw = np.random.default_rng(0)
    logits = (3 * draw.normal(size=(BATCH, 27, BITS, 2))).astype(np.float32)
    return logits, draw.normal(size=(BATCH, 27, BITS)).astype(np.float32)


@pytest.fixture(scope="module")
def compute(quick_jit):
    """`bitwise_loss`, compiled once a configuration."""
    return quick_jit(bitwise_loss, static_argnums=(2, 3))


def slow_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[label] of every bit, float64 [B, L, N]."""
    out = np.zeros(labels.shape)
    for index in itertools.product(*map(range, labels.shape)):
        zero, one = map(float, logits[index])
        out[index] = math.log(math.exp(zero) + math.exp(one)) - (one if labels[index] else zero)
    return out


def slow_weights(power: float) -> list[float]:
    """model.md, section 7, whose reweighting is a power of 0.5."""
    weights = [(20 / (1, 6, 20)[scale]) ** power for scale in SCALE_OF_TOKEN]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_weights_of_tokens(power):
    weights = token_weights(PYRAMID, power)
    assert weights.dtype == np.float32
    assert weights.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(weights, slow_weights(power), rtol=1e-6)


def test_full_power_gives_every_scale_the_same_share():
    weights = token_weights(PYRAMID, 1.0)
    shares = [weights[scale == SCALE_OF_TOKEN].sum() for scale in range(3)]
    np.testing.assert_allclose(shares, [1 / 3] * 3, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("power", [0.0, 0.5])
def test_equals_plain_cross_entropy(compute, example, reduction, power):
    logits, residuals = example
    config = LossConfig(reduction=reduction, scale_power=power)
    loss, _ = compute(logits, residuals, PYRAMID, config)
    tokens = slow_entropy(logits, residuals > 0).mean(-1) * (BITS if reduction == "sum" else 1)
    expected = sum(weight * tokens[:, token].mean() for token, weight in enumerate(slow_weights(power)))
    assert loss.shape == () and loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_soft_labels(compute, example, temperature):
    """Each value's cross-entropy, weighted by its probability; the metrics stay those of the bits."""
    logits, residuals = example
    ones = 1 / (1 + np.exp(-residuals.astype(np.float64) / temperature))
    both = [slow_entropy(logits, np.full(residuals.shape, value)) for value in (False, True)]
    tokens = ((1 - ones) * both[0] + ones * both[1]).mean(-1)
    expected = sum(weight * tokens[:, token].mean() for token, weight in enumerate(slow_weights(0.5)))
    loss, metrics = compute(logits, residuals, PYRAMID, LossConfig(label_temperature=temperature))
    hard, of_bits = compute(logits, residuals, PYRAMID, LossConfig())
    assert float(loss) == pytest.approx(expected, rel=2e-6) and abs(float(loss) - float(hard)) > 0.01
    jax.tree.map(np.testing.assert_array_equal, metrics, of_bits)


def test_smoothed_labels(compute, example):
    """Each value gets half of the smoothing: by hand for one bit, then for all; the metrics stay those of the bits."""
    one = Pyramid(((1, 1),), ((1, 1),))
    logits = np.array([0.0, math.log(3)], np.float32).reshape(1, 1, 1, 2)  # probabilities 1/4 and 3/4
    loss, _ = compute(logits, np.ones((1, 1, 1), np.float32), one, LossConfig(label_smoothing=0.2))
    assert float(loss) == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4), rel=1e-6)

    logits, residuals = example
    both = [slow_entropy(logits, np.full(residuals.shape, value)) for value in (False, True)]
    right = np.where(residuals > 0, both[1], both[0])
    tokens = (0.7 * right + 0.15 * (both[0] + both[1])).mean(-1)
    expected = sum(weight * tokens[:, token].mean() for token, weight in enumerate(slow_weights(0.5)))
    loss, metrics = compute(logits, residuals, PYRAMID, LossConfig(label_smoothing=0.3))
    _, of_bits = compute(logits, residuals, PYRAMID, LossConfig())
    assert float(loss) == pytest.approx(expected, rel=2e-6)
    jax.tree.map(np.testing.assert_array_equal, metrics, of_bits)


@pytest.mark.parametrize(("name", "value"), [("label_temperature", -0.1), ("label_smoothing", 1.0)])
def test_labels_that_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        LossConfig(**{name: value})


def test_metrics_of_each_scale(compute, example):
    logits, residuals = example
    labels = residuals > 0
    _, metrics = compute(logits, residuals, PYRAMID, LossConfig())
    entropy, right = slow_entropy(logits, labels), (logits[..., 1] > logits[..., 0]) == labels
    of_scale = [scale == SCALE_OF_TOKEN for scale in range(3)]
    expected = {
        "bit_accuracy": right.mean(),
        "scale_loss": [entropy[:, tokens].mean() for tokens in of_scale],
        "scale_bit_accuracy": [right[:, tokens].mean() for tokens in of_scale],
        "scale_token_accuracy": [right[:, tokens].all(-1).mean() for tokens in of_scale],
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-6, err_msg=name)


def test_token_accuracy_wants_every_bit(compute):
    """One wrong bit in one token of the middle scale costs that token and no other."""
    residuals = np.full((BATCH, 27, BITS), -0.5, np.float32)
    logits = np.stack([np.ones(residuals.shape, np.float32), np.zeros(residuals.shape, np.float32)], axis=-1)
    logits[0, 2, 3, 1] = 5
    _, metrics = compute(logits, residuals, PYRAMID, LossConfig())
    np.testing.assert_allclose(metrics["scale_token_accuracy"], [1, 11 / 12, 1], rtol=1e-6)
    np.testing.assert_allclose(metrics["scale_bit_accuracy"], [1, 59 / 60, 1], rtol=1e-6)


def test_extreme_logits_stay_finite(quick_jit):
    """The loss and its gradient are finite for extreme logits, wrong and right ones."""
    labels = np.arange(BATCH * 27 * BITS).reshape(BATCH, 27, BITS) % 2 == 0
    logits = np.zeros((*labels.shape, 2), np.float32)
    logits[..., 1] = 1e4

    def loss_fn(logits: jax.Array) -> jax.Array:
        return bitwise_loss(logits, jnp.where(labels, 0.5, -0.5), PYRAMID, LossConfig(scale_power=0.0))[0]

    loss, gradient = quick_jit(jax.value_and_grad(loss_fn))(logits)
    assert float(loss) == pytest.approx(1e4 * np.mean(~labels), rel=1e-5)
    np.testing.assert_allclose(gradient[..., 1], np.where(labels, 0.0, 1 / labels.size), atol=1e-7)
