"""Sizes of the two sides of a pair."""

import numpy as np
import pytest

from data_pipelines.geometry import aspect_change, is_turned, pair_kinds


@pytest.mark.parametrize(
    "source, target, change, turned",
    [
        ((640, 480), (640, 480), 1.0, False),
        ((640, 480), (1024, 1024), 4 / 3, False),  # neither way is better
        ((640, 480), (480, 640), 16 / 9, True),
        ((640, 480), (768, 1024), 16 / 9, True),
        ((1100, 1000), (1000, 1100), 1.21, True),
        ((1000, 1001), (1001, 1000), 1.002, False),  # a pixel is no turn
        ((512, 512), (512, 512), 1.0, False),
        ((1600, 900), (1024, 1024), 16 / 9, False),
    ],
)
def test_a_change_of_aspect_and_a_quarter_turn(
    source: tuple[int, int], target: tuple[int, int], change: float, turned: bool
) -> None:
    assert aspect_change(*source, *target) == pytest.approx(change, rel=1e-3)
    assert aspect_change(*target, *source) == pytest.approx(aspect_change(*source, *target), rel=1e-12)
    assert is_turned(*source, *target) is turned


def test_pairs_are_counted_by_how_their_sides_differ() -> None:
    sides = np.array([(64, 48, 64, 48), (64, 48, 128, 96), (1639, 1024, 1632, 1024), (64, 48, 64, 64)]).T
    assert pair_kinds(*sides) == {"same size": 1, "same aspect": 2, "other aspect": 1}
