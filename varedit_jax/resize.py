"""Area and linear resizing as static matmuls (model.md, section 3).

Every resize of the residual loop is between two fixed grids, so it is two small constant matrices, one per side.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from varedit_jax.scales import Grid


@functools.cache
def area_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Adaptive average pooling along one side: float32 [size_out, size_in], rows summing to 1.

    Output i averages the window [floor(i * in / out), ceil((i + 1) * in / out)).
    """
    matrix = np.zeros((size_out, size_in), np.float32)
    for i in range(size_out):
        start = i * size_in // size_out
        stop = -(-(i + 1) * size_in // size_out)
        matrix[i, start:stop] = 1.0 / (stop - start)
    return matrix


@functools.cache
def linear_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Linear interpolation along one side: float32 [size_out, size_in], half-pixel centers, no antialias."""
    scale = np.float32(size_in) / np.float32(size_out)
    center = np.maximum(scale * (np.arange(size_out, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), 0)
    low = np.minimum(center.astype(np.int64), size_in - 1)
    high = np.minimum(low + 1, size_in - 1)
    weight = (center - low).astype(np.float32)
    matrix = np.zeros((size_out, size_in), np.float32)
    rows = np.arange(size_out)
    np.add.at(matrix, (rows, low), 1 - weight)
    np.add.at(matrix, (rows, high), weight)
    return matrix


def _resize(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    # HIGHEST: a bit is the sign of a difference, so matmuls must not round to bfloat16 or TF32.
    x = jnp.einsum("...hwz,xw->...hxz", x, columns, precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("...hwz,yh->...ywz", x, rows, precision=jax.lax.Precision.HIGHEST)


def area_resize(x: jax.Array, grid: Grid) -> jax.Array:
    """Adaptive average pooling of float32 [..., h, w, Z] to `grid` = (rows, columns)."""
    height, width = x.shape[-3:-1]
    if (height, width) == grid:
        return x
    return _resize(x, area_matrix(height, grid[0]), area_matrix(width, grid[1]))


def linear_resize(x: jax.Array, grid: Grid) -> jax.Array:
    """Bilinear resize of float32 [..., h, w, Z] to `grid` = (rows, columns), without antialias."""
    height, width = x.shape[-3:-1]
    if (height, width) == grid:
        return x
    return _resize(x, linear_matrix(height, grid[0]), linear_matrix(width, grid[1]))
