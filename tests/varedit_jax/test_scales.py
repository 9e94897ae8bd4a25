"""Pyramids: the published schedules, offsets and slices, aspects."""

import numpy as np
import pytest

from varedit_jax.config import PIXEL_BUDGETS, preset
from varedit_jax.scales import Pyramid, aspect_templates, editor_pyramid, image_size, nearest_aspect, published_pyramid

OBLONG = Pyramid(((1, 1), (2, 3), (4, 5)), ((1, 1), (2, 3), (4, 5), (8, 10)))


def test_square_schedules():
    """Model.md, section 1."""
    sides = {
        "0.06M": (1, 2, 4, 6, 8, 12, 16),
        "0.25M": (1, 2, 4, 6, 8, 12, 16, 20, 24, 32),
        "0.60M": (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48),
        "1M": (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64),
    }
    for budget, wanted in sides.items():
        pyramid = published_pyramid(budget)
        assert pyramid.grids == tuple((n, n) for n in wanted)
        assert pyramid.position_grid == (64, 64)


@pytest.mark.parametrize("budget", PIXEL_BUDGETS)
def test_all_aspects(budget):
    """15 templates: one token at first, then never coarser; an image of about the template's ratio and budget."""
    assert len(aspect_templates()) == 15
    for name in aspect_templates():
        pyramid = published_pyramid(budget, name)
        assert pyramid.grids[0] == (1, 1)
        assert (np.diff(pyramid.grids, axis=0) >= 0).all()
        rows, columns = pyramid.last
        assert rows / columns == pytest.approx(float(name), rel=0.07)  # grids are whole tokens
        pixels = rows * columns * 16 * 16
        assert pixels == pytest.approx({"0.06M": 256, "0.25M": 512, "0.60M": 768, "1M": 1024}[budget] ** 2, rel=0.25)
        assert pyramid.full_grids == published_pyramid("1M", name).grids
        assert pyramid.scales <= preset("2b").transformer.levels


def test_512_px_has_the_known_number_of_tokens():
    pyramid = published_pyramid("0.25M")
    assert pyramid.source_tokens("sar") + pyramid.target_tokens == 3545
    assert pyramid.source_tokens("full") == pyramid.target_tokens == 2521


def test_offsets_lengths_and_slices():
    assert OBLONG.scales == 3
    assert OBLONG.lengths == (1, 6, 20)
    assert OBLONG.offsets == (0, 1, 7, 27)
    assert OBLONG.target_tokens == 27
    tokens = np.arange(27)
    parts = [tokens[part] for part in OBLONG.slices()]
    assert [len(part) for part in parts] == [1, 6, 20]
    np.testing.assert_array_equal(np.concatenate(parts), tokens)
    assert OBLONG.last == (4, 5)
    assert OBLONG.position_grid == (8, 10)


def test_source_prefix():
    for conditioning in ("sar", "finest"):
        assert OBLONG.source_grids(conditioning) == ((4, 5),)
        assert OBLONG.source_tokens(conditioning) == 20
    assert OBLONG.source_grids("full") == OBLONG.grids
    assert OBLONG.source_tokens("full") == 27


def test_first_scales_keep_the_positions():
    first = OBLONG.first(2)
    assert (first.grids, first.position_grid) == (OBLONG.grids[:2], OBLONG.position_grid)
    assert OBLONG.first(OBLONG.scales).grids == OBLONG.grids
    for scales in (0, OBLONG.scales + 1):
        with pytest.raises(ValueError, match=f"no first {scales} scales"):
            OBLONG.first(scales)


def test_cells():
    assert OBLONG.cells(False) is OBLONG
    assert OBLONG.cells(True) == Pyramid(((2, 2), (4, 6), (8, 10)), ((2, 2), (4, 6), (8, 10), (16, 20)))


def test_nearest_aspect():
    """Of height / width, so a tall image takes a template above 1."""
    assert nearest_aspect(500, 500) == "1.0"
    assert nearest_aspect(1, 1000) == min(aspect_templates(), key=float)
    assert nearest_aspect(1000, 1) == max(aspect_templates(), key=float)
    assert float(nearest_aspect(600, 400)) == pytest.approx(1.5, abs=0.01)
    assert float(nearest_aspect(400, 600)) == pytest.approx(0.667, abs=0.01)
    for name in aspect_templates():
        rows, columns = published_pyramid("1M", name).last
        assert nearest_aspect(rows, columns) == name


def test_editor_pyramid_and_image_size():
    tiny, large = preset("tiny"), preset("8b")
    assert editor_pyramid(tiny) == editor_pyramid(tiny, "2.0") == Pyramid(tiny.grids, tiny.grids)
    assert image_size(tiny, editor_pyramid(tiny)) == (16, 16)  # 4 tokens of 4 px
    assert image_size(large, editor_pyramid(large)) == (512, 512)
    tall = editor_pyramid(large, "2.0")
    assert tall == published_pyramid("0.25M", "2.0")
    height, width = image_size(large, tall)
    assert (height, width) == (tall.last[0] * 16, tall.last[1] * 16)
    assert height > width


def test_mistakes():
    with pytest.raises(ValueError, match="unknown pixel budget '2M'; known are 0.06M, 0.25M, 0.60M, 1M"):
        published_pyramid("2M")
    with pytest.raises(ValueError, match="unknown aspect '3'; known are 1.0, "):
        published_pyramid("1M", "3")
    for grids in ((), ((0, 1),), ((1, 2, 3),)):
        with pytest.raises(ValueError, match="each at least 1"):
            Pyramid(grids, grids)
