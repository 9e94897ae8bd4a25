"""Resizing: the constant matrices against loops over windows and against interpolation, point by point."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varedit_jax.resize import area_matrix, area_resize, linear_matrix, linear_resize

SIZES = [(4, 4), (8, 2), (5, 3), (7, 4), (3, 5), (1, 6), (9, 1), (64, 48), (20, 12)]  # from, to


@pytest.mark.parametrize("size_in, size_out", SIZES)
def test_area_matrix_averages_windows(size_in, size_out):
    x = np.random.default_rng(0).normal(size=size_in)
    wanted = []
    for i in range(size_out):
        window = x[math.floor(i * size_in / size_out) : math.ceil((i + 1) * size_in / size_out)]
        wanted.append(sum(window) / len(window))
    np.testing.assert_allclose(area_matrix(size_in, size_out) @ x, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size_in, size_out", SIZES)
def test_linear_matrix_interpolates_between_cell_centers(size_in, size_out):
    x = np.random.default_rng(0).normal(size=size_in)
    centers = (np.arange(size_out) + 0.5) / size_out
    wanted = np.interp(centers, (np.arange(size_in) + 0.5) / size_in, x)  # constant beyond the outer centers
    np.testing.assert_allclose(linear_matrix(size_in, size_out) @ x, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("matrix", [area_matrix, linear_matrix])
@pytest.mark.parametrize("size_in, size_out", SIZES)
def test_matrices_keep_constants(matrix, size_in, size_out):
    found = matrix(size_in, size_out)
    assert found.shape == (size_out, size_in)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=0, atol=1e-6)
    if size_in == size_out:
        np.testing.assert_array_equal(found, np.eye(size_in))


@pytest.mark.parametrize("resize, matrix", [(area_resize, area_matrix), (linear_resize, linear_matrix)])
def test_rows_by_rows_and_columns_by_columns(resize, matrix):
    """On an oblong grid, where a swap of the sides would show; leading axes and channels stay apart."""
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 3)).astype(np.float32)
    rows, columns = matrix(4, 2), matrix(5, 7)
    wanted = np.zeros((2, 2, 7, 3), np.float32)
    for b, y, xx, i, j in itertools.product(range(2), range(2), range(7), range(4), range(5)):
        wanted[b, y, xx] += rows[y, i] * columns[xx, j] * x[b, i, j]
    np.testing.assert_allclose(resize(jnp.asarray(x), (2, 7)), wanted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(resize(jnp.asarray(x[0]), (2, 7)), wanted[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("resize", [area_resize, linear_resize])
def test_the_same_grid_changes_nothing(resize):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 5, 3)), jnp.float32)
    assert resize(x, (4, 5)) is x


@pytest.mark.parametrize("resize", [area_resize, linear_resize])
def test_products_are_not_rounded_to_less_than_float32(resize):
    """A bit is the sign of a difference: every product of the resize asks for the highest precision."""
    text = jax.jit(lambda x: resize(x, (2, 3))).lower(jnp.zeros((1, 4, 5, 3))).as_text()
    assert text.count("stablehlo.dot_general") == text.count("precision = [HIGHEST, HIGHEST]") == 2
