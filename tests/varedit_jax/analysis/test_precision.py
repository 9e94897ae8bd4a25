"""The effect of a TPU's cheaper products, emulated."""

import dataclasses

import jax
import numpy as np
import pytest

from varedit_jax.analysis.precision import bits_at, changed_bits
from varedit_jax.config import preset
from varedit_jax.parameters import abstract_params
from varedit_jax.scales import editor_pyramid

TINY = preset("tiny")
MODEL = dataclasses.replace(TINY, grids=((1, 1), (2, 2)))
PYRAMID = editor_pyramid(MODEL)


@pytest.fixture(scope="module")
def bits(lively):
    params = lively(abstract_params(MODEL, "tokenizer"))
    side = PYRAMID.last[0] * MODEL.token_stride
    images = np.random.default_rng(0).integers(0, 256, (32, side, side, 3), np.uint8)
    return {
        precision: jax.device_get(bits_at(precision, params, images, MODEL, PYRAMID))
        for precision in ("highest", "high", "default")
    }


def test_one_pass_flips_more_bits_than_three(bits):
    """bfloat16 alone turns some; three products of parts turn fewer than a tenth of that."""
    once, thrice = (changed_bits(bits["highest"], bits[precision])[-1] for precision in ("default", "high"))
    assert 0.001 < once < 0.2
    assert thrice < 0.1 * once


def test_shares_are_of_each_scale_and_of_all():
    ours = (np.zeros((1, 1, 1, 2), bool), np.zeros((1, 2, 2, 2), bool))
    others = (np.array([[[[True, False]]]]), np.zeros((1, 2, 2, 2), bool))
    assert changed_bits(ours, others) == pytest.approx([0.5, 0.0, 0.1])
