"""The number and places of the bits that self-correction flips."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from varedit_jax.scales import Pyramid
from varedit_jax.training.self_correction import draw_flips, strength_groups

GRIDS = ((1, 2), (16, 16), (16, 12), (4, 4))
CELLS = Pyramid(GRIDS, GRIDS)
BATCH, CHANNELS, DRAWS, MAX = 32, 16, 64, 0.03


@pytest.fixture(scope="module")
def drawn() -> list[np.ndarray]:
    """Flips of the first three scales for 64 keys: [draw, B, h_k, w_k, Z]."""
    draw = jax.jit(jax.vmap(lambda key: draw_flips(key, BATCH, CHANNELS, CELLS, 3, MAX)))
    return [np.asarray(flips) for flips in draw(jax.random.split(jax.random.key(0), DRAWS))]


def test_only_the_first_scales_flip(drawn):
    expected = [(DRAWS, BATCH, *grid, CHANNELS) for grid in GRIDS[:3]]
    assert [flips.shape for flips in drawn] == expected
    assert all(flips.dtype == bool for flips in drawn)
    many = draw_flips(jax.random.key(0), 1, 2, CELLS, 99, MAX)
    assert len(many) == len(GRIDS)


@pytest.mark.parametrize("noise_scales, noise_max", [(3, 0.0), (0, 0.3)])
def test_no_noise_no_flips(noise_scales, noise_max):
    assert draw_flips(jax.random.key(0), 2, 4, CELLS, noise_scales, noise_max) == ()


def test_strengths_are_uniform_over_hundredths(drawn):
    """Each share of flipped bits lies at 0, 0.01, 0.02 or 0.03, and each of the four comes up about as often."""
    for flips in drawn[1:3]:
        shares = flips.mean(axis=(1, 2, 3, 4))
        levels = np.round(shares * 100)
        np.testing.assert_allclose(shares, levels / 100, atol=0.003)  # ~5 standard deviations of 98,304 bits
        counts = np.bincount(levels.astype(int), minlength=4)
        assert len(counts) == 4 and counts.min() >= 6, counts  # 16 expected; 6 is 3 standard deviations below
        assert not flips[levels == 0].any()


def test_one_strength_for_the_whole_batch_and_one_per_scale(drawn):
    """Samples of a batch share the strength; scales do not; bits and samples are drawn one by one."""
    flips = drawn[1]
    strength = np.round(flips.mean(axis=(1, 2, 3, 4)) * 100) / 100
    by_sample = flips.mean(axis=(2, 3, 4))
    bound = 6 * np.sqrt(MAX * (1 - MAX) / flips[0, 0].size)
    np.testing.assert_allclose(by_sample, np.repeat(strength[:, None], BATCH, 1), atol=bound)
    other = np.round(drawn[2].mean(axis=(1, 2, 3, 4)) * 100) / 100
    assert 0.05 < np.mean(strength == other) < 0.6
    strongest = flips[np.argmax(strength)]
    assert (strongest[0] != strongest[1]).any() and (strongest[..., 0] != strongest[..., 1]).any()


def test_a_strength_for_each_part_of_a_batch():
    """With several groups each has a strength of its own, shared by its examples; one group is the plain draw."""
    draw = jax.jit(jax.vmap(lambda key: draw_flips(key, BATCH, CHANNELS, CELLS, 2, 0.3, BATCH // 4)[1]))
    shares = np.asarray(draw(jax.random.split(jax.random.key(0), DRAWS))).mean(axis=(2, 3, 4))
    shares = shares.reshape(DRAWS, BATCH // 4, 4)
    bound = 6 * np.sqrt(0.3 * 0.7 / (16 * 16 * CHANNELS))
    assert np.ptp(shares, axis=2).max() < 2 * bound  # within a group
    levels = np.round(shares.mean(axis=2) * 100)
    assert levels.max() <= 31 and len(np.unique(levels)) > 25
    assert np.median([len(set(of_one)) for of_one in levels]) > 6  # of 8 groups of a batch
    alone = [draw_flips(jax.random.key(3), BATCH, CHANNELS, CELLS, 2, 0.3, *groups)[1] for groups in ((), (1,))]
    np.testing.assert_array_equal(*alone)


def test_who_shares_a_strength():
    """Without a mesh there is one device; on one, every device of data x fsdp counts, those of `tensor` do not."""
    assert [strength_groups(name, 24) for name in ("batch", "device", "example")] == [1, 1, 24]
    with jax.sharding.use_abstract_mesh(AbstractMesh((2, 3, 4), ("data", "fsdp", "tensor"))):
        assert [strength_groups(name, 24) for name in ("batch", "device", "example")] == [1, 6, 24]


def test_the_default_draws_what_it_drew():
    """A run that was begun before strengths could be shared otherwise goes on with equal bits."""
    flips = draw_flips(jax.random.key(5), 2, 3, Pyramid(((2, 2),), ((2, 2),)), 1, 0.3)[0]
    strength_key, flip_key = jax.random.split(jax.random.fold_in(jax.random.key(5), 0))
    strength = jax.random.randint(strength_key, (), 0, 31).astype(np.float32) * 0.01
    np.testing.assert_array_equal(flips, jax.random.bernoulli(flip_key, strength, (2, 2, 2, 3)))
    assert np.asarray(flips).any()


def test_key_decides():
    first, again, other = (draw_flips(jax.random.key(seed), 2, CHANNELS, CELLS, 2, 0.3)[1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()
