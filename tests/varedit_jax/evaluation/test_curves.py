"""Curve sheets, by the pixels of their lines."""

import math

import numpy as np
import pytest
from PIL import Image

from varedit_jax.evaluation.curves import Panel, curve_sheet

BLUE, ORANGE, RED = (0, 114, 178), (213, 94, 0), (200, 46, 42)


def pixels_of(color: tuple[int, int, int], sheet: Image.Image, below: int = 46) -> np.ndarray:
    """Returns (x, y) of every pixel of exactly this color, below title and legend."""
    found = np.argwhere(np.all(np.asarray(sheet) == np.array(color, np.uint8), axis=-1))[:, ::-1]
    return found[found[:, 1] > below]


def test_falling_line_falls_and_rising_line_rises():
    falling, rising = [(x, 9.0 - x) for x in range(10)], [(x, 1.0 * x) for x in range(10)]
    sheet = curve_sheet([Panel(title="two lines", lines={"falling": falling, "rising": rising})])
    for color, sign in ((BLUE, 1), (ORANGE, -1)):  # y grows downwards in an image
        line = pixels_of(color, sheet)
        assert np.corrcoef(line.T)[0, 1] * sign > 0.99
        assert np.ptp(line[:, 0]) > 250
        assert np.ptp(line[:, 1]) > 140


def test_logarithmic_axis_straightens_an_exponential():
    points = [(x, 10.0 ** (-x / 10)) for x in range(60)]
    bends = {}
    for log in (False, True):
        line = pixels_of(BLUE, curve_sheet([Panel(title="loss", lines={"loss": points}, log_y=log)]))
        bends[log] = 1 - np.corrcoef(line.T)[0, 1]
    assert bends[True] < 1e-3 < 0.05 < bends[False]


def test_value_that_is_not_finite_leaves_a_gap():
    points = [(x, math.nan if 40 <= x < 60 else 1.0 + x) for x in range(100)]
    columns = np.unique(pixels_of(BLUE, curve_sheet([Panel(title="norm", lines={"norm": points})]))[:, 0])
    assert np.diff(columns).max() > 40


def test_a_point_between_gaps_is_marked():
    points = [(0, 1.0), (1, math.nan), (2, 2.0), (3, math.nan), (4, 1.0)]
    columns = np.unique(pixels_of(BLUE, curve_sheet([Panel(title="norm", lines={"norm": points})]))[:, 0])
    assert (np.diff(columns) > 40).sum() == 2


@pytest.mark.parametrize(
    ("lines", "log"),
    [
        ({"one point": [(5, 3.0)]}, False),
        ({"constant": [(0, 0.0), (10, 0.0)], "the same": [(0, 0.0), (10, 0.0)]}, False),
        ({"wide": [(0, 1e-30), (9, 1e30)]}, True),
        ({f"close {n}": [(1e6, 1 + 1e-7), (1e6 + 1, 1.0)] for n in range(6)}, False),
    ],
)
def test_odd_series_are_drawn(lines, log):
    sheet = curve_sheet([Panel(title="odd", lines=lines, log_y=log)])
    assert len(pixels_of(BLUE, sheet)) + len(pixels_of(ORANGE, sheet)) > 8


def test_nothing_to_draw_is_said():
    sheet = curve_sheet([Panel(title="loss", lines={"a": [(0, math.inf), (1, math.nan)]})])
    assert len(pixels_of(RED, sheet)) > 5  # "no finite value"; smoothed edges have other colors
    assert not len(pixels_of(BLUE, sheet))


def test_panels_fill_rows():
    panel = Panel(title="loss", lines={"loss": [(0, 1.0), (1, 0.5)]})
    one, two, four = (curve_sheet([panel] * n) for n in (1, 2, 4))
    assert (two.width > 1.8 * one.width, two.height) == (True, one.height)
    assert four.height > 1.8 * one.height
    assert curve_sheet([panel] * 4, columns=2).size == (two.width, four.height)
    assert curve_sheet([panel], heading="training").height > one.height


@pytest.mark.parametrize(
    ("panels", "message"),
    [
        ([], "panels is empty"),
        ([Panel(title="loss", lines={})], "panel 'loss' has no line"),
        ([Panel(title="loss", lines={"a": [(0, 1.0)], "b": []})], "a line without a point"),
        ([Panel(title="loss", lines={"a": [(math.nan, 1.0)]})], "panel 'loss' has a point whose x is not finite"),
        ([Panel(title="loss", lines={f"{n}": [(0, 1.0)] for n in range(7)})], "has 7 lines; at most 6"),
    ],
)
def test_bad_panels_are_named(panels, message):
    with pytest.raises(ValueError, match=message):
        curve_sheet(panels)


def test_bad_columns_are_named():
    with pytest.raises(ValueError, match="columns is 0"):
        curve_sheet([Panel(title="loss", lines={"a": [(0, 1.0)]})], columns=0)
