"""Positions of tokens against model.md, section 6, token by token; rotation against complex numbers."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from varedit_jax.scales import Pyramid, aspect_templates, published_pyramid
from varedit_jax.transformer import rope

OBLONG = Pyramid(((1, 1), (2, 3), (4, 5)), ((1, 1), (2, 3), (4, 5), (8, 10)))


def by_hand(grids, source_grids, U, V) -> list[tuple[int, int]]:
    def places(rows, columns, offset):
        for i, j in itertools.product(range(rows), range(columns)):
            yield round(i * U / rows) + offset[0], round(j * V / columns) + offset[1]  # round: ties to even

    source = [place for grid in source_grids for place in places(*grid, (U, V))]
    return source + [place for grid in grids for place in places(*grid, (0, 0))]


@pytest.mark.parametrize("conditioning", ["sar", "finest", "full"])
def test_paper_layout(conditioning):
    found = rope.positions(OBLONG, conditioning, "paper")
    wanted = by_hand(OBLONG.grids, OBLONG.source_grids(conditioning), 8, 10)
    assert found.tolist() == [list(place) for place in wanted]


def test_ties_round_to_even():
    pyramid = Pyramid(((2, 4),), ((5, 6),))
    found = rope.positions(pyramid, "sar", "paper")[8:]
    assert found.tolist() == [[row, column] for row in (0, 2) for column in (0, 2, 3, 4)]  # of 2.5; 1.5, 3, 4.5


def test_paper_layout_of_published_pyramids():
    for budget, aspect in (("0.06M", "1.0"), ("0.60M", "1.25"), ("1M", "0.5")):
        pyramid = published_pyramid(budget, aspect)
        wanted = by_hand(pyramid.grids, pyramid.grids[-1:], *pyramid.position_grid)
        np.testing.assert_array_equal(rope.positions(pyramid, "sar", "paper"), wanted)


def test_the_papers_offset_of_the_source():
    square = published_pyramid("1M")
    found = rope.positions(square, "sar", "paper")
    assert found[0].tolist() == [64, 64]
    assert found[64 * 64 - 1].tolist() == [127, 127]
    assert found[64 * 64].tolist() == [0, 0]


@pytest.mark.parametrize("conditioning", ["sar", "full"])
def test_both_layouts_agree_at_the_full_schedule(conditioning):
    for aspect in aspect_templates():
        pyramid = published_pyramid("1M", aspect)
        np.testing.assert_array_equal(
            rope.positions(pyramid, conditioning, "released"), rope.positions(pyramid, conditioning, "paper")
        )


def test_released_layout_is_the_beginning_of_the_full_table():
    """Below 1M every token sits at row-major places of the full source grid, offset included."""
    pyramid = published_pyramid("0.06M", "1.25")
    rows, columns = pyramid.position_grid
    found = rope.positions(pyramid, "sar", "released")
    assert len(found) == pyramid.source_tokens("sar") + pyramid.target_tokens
    wanted = [(index // columns + rows, index % columns + columns) for index in range(len(found))]
    np.testing.assert_array_equal(found, wanted)


def test_released_layout_runs_into_the_targets_where_it_is_longer_than_the_source():
    found = rope.positions(OBLONG, "sar", "released")  # 20 + 27 tokens of a table whose source has 80
    assert found.tolist() == [[8 + n // 10, 10 + n % 10] for n in range(47)]
    larger = Pyramid(((1, 1), (2, 3), (4, 5)), ((1, 1), (2, 3), (4, 5)))
    assert rope.positions(larger, "sar", "released")[20].tolist() == [0, 0]


def test_rotation_against_complex_numbers():
    """Pairs (2i, 2i + 1) as complex numbers turn by row * theta_i, then by column * theta_i."""
    D = 16
    places = np.array([[0, 0], [3, 5], [127, 64]])
    x = np.random.default_rng(0).normal(size=(2, 4, 3, D)).astype(np.float32)
    found = rope.rotate(jnp.asarray(x), rope.rotation(places, D), jnp.float32)
    theta = [10000 ** (-2 * i / (D / 2)) for i in range(D // 4)]
    pairs = x[..., 0::2] + 1j * x[..., 1::2]
    for token, i in itertools.product(range(3), range(D // 4)):
        row, column = places[token]
        pairs[:, :, token, i] *= np.exp(1j * row * theta[i])
        pairs[:, :, token, D // 4 + i] *= np.exp(1j * column * theta[i])
    np.testing.assert_allclose(found[..., 0::2], pairs.real, rtol=0, atol=2e-6)
    np.testing.assert_allclose(found[..., 1::2], pairs.imag, rtol=0, atol=2e-6)


def test_products_depend_on_relative_positions_alone():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def product(place_q, place_k):
        turned = [
            rope.rotate(jnp.asarray(x), rope.rotation(np.array([place]), 8), jnp.float32)
            for x, place in ((q, place_q), (k, place_k))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    near = product((3, 4), (1, 9))
    assert product((23, 14), (21, 19)) == pytest.approx(near, abs=1e-5)
    assert abs(product((4, 3), (9, 1)) - near) > 1e-2  # rows are not columns


def test_types():
    """A result of 16 bits differs from that of 32 bits by its rounding, and that of each channel's partner."""
    places, x = np.array([[3, 5], [0, 9]]), np.random.default_rng(0).normal(size=(1, 1, 2, 8)).astype(np.float32)
    exact, rounded = (rope.rotate(x, rope.rotation(places, 8), dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16 and exact.dtype == rope.rotation(places, 8).dtype == np.float32
    np.testing.assert_allclose(rounded.astype(np.float32), exact, rtol=0, atol=2 * 2**-9 * np.abs(x).max())
