"""From logits to bits: guidance, temperature, top-p, greedy, and one stream of random numbers an image."""

import jax
import numpy as np
import pytest

from varedit_jax.config import SamplingConfig
from varedit_jax.sampling.guidance import Controls, choose_bits, controls, guided_margin, guided_scales

SHAPE = (3, 5, 4)  # B, L, N


def logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*SHAPE, 2)).astype(np.float32)


def keys(*seeds: int) -> jax.Array:
    return jax.vmap(jax.random.key)(np.array(seeds, np.uint32))


def one_scale(count: int = SHAPE[0], **values) -> Controls:
    return controls([SamplingConfig(**values)] * count, 1)


def log_odds(probability: float) -> np.ndarray:
    return np.full((1, 100, 100), np.log(probability / (1 - probability)), np.float32)


@pytest.mark.parametrize("guidance, temperature", [(4.0, 0.5), (1.0, 1.0), (0.0, 2.0), (2.5, 0.7)])
def test_guided_margin_against_probabilities(guidance, temperature):
    """Model.md, section 8: logits / tau, then cfg * cond + (1 - cfg) * uncond, then a softmax over the two values."""
    conditional, unconditional = (logits(seed).astype(np.float64) / temperature for seed in (0, 1))
    guided = guidance * conditional + (1 - guidance) * unconditional
    weights = np.exp(guided)
    wanted = weights[..., 1] / weights.sum(axis=-1)
    margin = guided_margin(logits(0), logits(1), one_scale(guidance=guidance, temperature=temperature), 0)
    np.testing.assert_allclose(jax.nn.sigmoid(margin), wanted, rtol=0, atol=2e-6)


def test_guidance_one_is_no_guidance():
    for temperature in (0.5, 1.0):
        off = one_scale(guidance=1.0, temperature=temperature)
        with_half, without = (guided_margin(logits(0), other, off, 0) for other in (logits(1), None))
        np.testing.assert_array_equal(with_half, without)


def test_greedy_takes_the_likelier_value():
    margin = np.array([[[-3.0, -1e-6, 0.0, 1e-6, 3.0]]], np.float32)
    found = choose_bits(margin, one_scale(1, greedy=True), keys(0))
    assert found.tolist() == [[[False, False, False, True, True]]]  # a tie is bit 0


@pytest.mark.parametrize("probability", [0.02, 0.3, 0.5, 0.9])
def test_bits_are_one_with_their_probability(probability):
    found = np.asarray(choose_bits(log_odds(probability), one_scale(1), keys(0)))
    deviation = (probability * (1 - probability) / 10_000) ** 0.5
    assert abs(found.mean() - probability) < 4 * deviation
    both = (found[:, :, 1:] & found[:, :, :-1]).mean()  # neighbors are independent
    assert abs(both - probability**2) < 0.02


@pytest.mark.parametrize(
    "top_p, probability, wanted",
    [
        (0.97, 0.029, 0.0),
        (0.97, 0.2, 0.2),
        (0.97, 0.971, 1.0),
        (0.8, 0.19, 0.0),
        (0.8, 0.81, 1.0),
        (1.0, 0.01, 0.01),
        (0.3, 0.6, 1.0),  # the likelier value is never removed
        (0.3, 0.4, 0.0),
        (0.0, 0.01, 0.01),  # off
    ],
)
def test_top_p_removes_an_unlikely_value(top_p, probability, wanted):
    found = np.asarray(choose_bits(log_odds(probability), one_scale(1, top_p=top_p), keys(0)))
    if wanted in (0.0, 1.0):
        assert (found == bool(wanted)).all()
    else:
        assert abs(found.mean() - wanted) < 4 * (wanted * (1 - wanted) / 10_000) ** 0.5


def test_a_key_gives_the_same_bits_at_any_place_of_a_batch():
    margin = np.broadcast_to(logits(0)[:1, ..., 0], SHAPE)
    found = np.asarray(choose_bits(margin, one_scale(), keys(7, 8, 9)))
    turned = np.asarray(choose_bits(margin, one_scale(), keys(9, 7, 8)))
    alone = np.asarray(choose_bits(margin[:1], one_scale(1), keys(8)))
    np.testing.assert_array_equal(turned, found[[2, 0, 1]])
    np.testing.assert_array_equal(alone[0], found[1])
    assert len({row.tobytes() for row in found}) == 3


def test_images_of_a_batch_have_their_own_controls():
    """Each as in a batch of its own; other scales have other numbers."""
    configs = [
        SamplingConfig(guidance=(3.0, 1.5), temperature=(0.5, 2.0)),
        SamplingConfig(greedy=True),
        SamplingConfig(guidance=1.0, top_p=0.9),
    ]
    both = controls(configs, 3)
    for scale in range(3):
        margin = guided_margin(logits(0), logits(1), both, scale)
        bits = choose_bits(margin, both, keys(7, 8, 9))
        for row, config in enumerate(configs):
            part, own = slice(row, row + 1), controls([config], 3)
            alone = guided_margin(logits(0)[part], logits(1)[part], own, scale)
            np.testing.assert_array_equal(margin[part], alone)
            np.testing.assert_array_equal(bits[part], choose_bits(alone, own, keys(7 + row)))
    assert np.asarray(both.guidance_BK[0]).tolist() == [3.0, 1.5, 1.5]


@pytest.mark.parametrize("guidance, wanted", [
    ([4.0], 3), ([1.0], 0), ([(2.0, 1.0)], 1), ([(1.0, 2.0, 1.0)], 2), ([1.0, (3.0, 3.0, 1.0)], 2)
])  # fmt: skip
def test_scales_that_run_the_unconditional_half(guidance, wanted):
    assert guided_scales([SamplingConfig(guidance=value) for value in guidance], 3) == wanted


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"temperature": 0.0}, "sampling.temperature is 0.0; it must be above 0"),
        ({"temperature": (0.5, -1.0)}, r"sampling.temperature is \(0.5, -1.0\); it must be above 0"),
        ({"temperature": float("nan")}, "sampling.temperature is nan"),
        ({"top_p": 1.5}, "sampling.top_p is 1.5; it must be between 0 and 1"),
        ({"top_p": -0.1}, "sampling.top_p is -0.1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        SamplingConfig(**values)
