"""The model of sums that devices make hop by hop: exact where nothing is rounded, and as theory has it where it is."""

import numpy as np
import pytest

from varedit_jax.analysis import sums

VALUES = 4096
WAYS = {
    "ring": lambda parts, sent: sums.ring(parts, sent),
    "torus": lambda parts, sent: sums.torus(parts, (4, len(parts) // 4), sent),
    "tree": lambda parts, sent: sums.tree(parts, sent),
}


def parts_of(devices: int, values: int = VALUES) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(devices, values)).astype(np.float32)


@pytest.mark.parametrize("way", WAYS)
def test_every_part_is_summed_once(way):
    """Of whole numbers, exactly; also where the values do not divide over the devices."""
    parts = np.random.default_rng(0).integers(-9, 9, (16, 37)).astype(np.float32)
    np.testing.assert_array_equal(WAYS[way](parts, sums.float32), parts.sum(axis=0))


def test_each_hop_rounds():
    """By hand: four devices; 1 + 2^-9 is 1 in bfloat16, as long as the small ones come one by one."""
    parts = np.array([[1], [2**-9], [2**-9], [2**-9]], np.float32)
    assert sums.ring(np.roll(parts, 1, axis=0), sums.bfloat16) == 1  # begins at device 1, with the 1
    assert sums.tree(parts, sums.bfloat16) == 1  # 1 + 2^-9 first, which is 1; then 2^-8, half of the next step
    assert sums.ring(parts, sums.bfloat16) == np.float32(1 + 2**-7)  # the small ones first


@pytest.mark.parametrize("devices", [64, 256])
def test_errors_of_normal_parts(devices):
    """A ring's error grows with the root of its hops, one of a tree with that of their logarithm."""
    parts = sums.bfloat16(parts_of(devices))
    exact = parts.sum(axis=0, dtype=np.float64)
    errors = {way: sums.relative_error(run(parts, sums.bfloat16), exact) for way, run in WAYS.items()}
    once = sums.relative_error(sums.bfloat16(exact), exact)
    # Hop k rounds a partial sum of k parts, whose square is k / N of the whole: in all, N / 2 roundings.
    assert errors["ring"] == pytest.approx(once * (devices / 2) ** 0.5, rel=0.1)
    assert once < errors["tree"] < errors["torus"] < errors["ring"]
    assert sums.relative_error(sums.ring(parts, sums.float32), exact) < 1e-6
