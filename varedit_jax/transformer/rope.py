"""Two-dimensional rotary position embedding, and positions of tokens (model.md, section 6, "Positions")."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from varedit_jax.config import RopeLayout
from varedit_jax.scales import Grid, Pyramid

ROPE_BASE = 10000.0


def _target_positions(grids: tuple[Grid, ...], position_grid: Grid) -> np.ndarray:
    """Rows and columns on the position grid, int [L, 2], of all tokens of `grids`; ties round to even."""
    scales = []
    for rows, columns in grids:
        row = np.rint(np.arange(rows) * position_grid[0] / rows)
        column = np.rint(np.arange(columns) * position_grid[1] / columns)
        scales.append(np.stack(np.meshgrid(row, column, indexing="ij"), axis=-1).reshape(-1, 2))
    return np.concatenate(scales).astype(np.int64)


def positions(pyramid: Pyramid, conditioning: str, layout: RopeLayout) -> np.ndarray:
    """Positions of the whole sequence [source, target scales], int [S + L, 2] of (row, column).

    `paper`: a target token has its position on the position grid (U, V), a source token its position plus (U, V).
    `released`: the first S + L rows of the table [source of the full schedule, its target scales], whatever the
    resolution; the published weights were trained so below 1024 px. Both agree on the full schedule.
    """

    def table(grids: tuple[Grid, ...]) -> np.ndarray:
        source_grids = grids if conditioning == "full" else grids[-1:]
        source = _target_positions(source_grids, pyramid.position_grid) + np.array(pyramid.position_grid)
        return np.concatenate([source, _target_positions(grids, pyramid.position_grid)])

    if layout == "paper":
        return table(pyramid.grids)
    length = pyramid.source_tokens(conditioning) + pyramid.target_tokens
    return table(pyramid.full_grids)[:length]


def rotation(positions_L2: np.ndarray, head_size: int) -> np.ndarray:
    """Cosines and sines, float32 [2, L, D], each repeated for both channels of a pair.

    Pairs in the first half of a head turn by row * theta_i, the others by column * theta_i, with theta_i =
    10000^(-2i / (D / 2)) (model.md, section 6, "Self-attention").
    """
    quarter = head_size // 4
    frequency = ROPE_BASE ** (-2 * np.arange(quarter) / (head_size / 2))
    angles = positions_L2[:, :, None].astype(np.float64) * frequency  # [L, 2, D / 4]
    angles_LD = np.repeat(angles.reshape(len(positions_L2), head_size // 2), 2, axis=1)
    return np.stack([np.cos(angles_LD), np.sin(angles_LD)]).astype(np.float32)


def _quarter_turn(head_size: int) -> np.ndarray:
    """Matrix that rotates every pair by 90 degrees: (a, b) -> (-b, a)."""
    turn = np.zeros((head_size, head_size), np.float32)
    even = np.arange(0, head_size, 2)
    turn[even + 1, even] = -1
    turn[even, even + 1] = 1
    return turn


def rotate(x_BHLD: jax.Array, rotation_2LD: np.ndarray | jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rotates the interleaved pairs (2i, 2i + 1) of each head by the angles of `rotation`, to an array of `dtype`.

    x_BHLD is float32. The partner of each channel comes from a matmul with a constant matrix of 0 and +-1, which is
    exact in float32, of values rounded to `dtype`, and faster on accelerators than shuffling lanes.
    """
    cos, sin = rotation_2LD[:, None, None]  # [1, 1, L, D] each
    turn = jnp.asarray(_quarter_turn(x_BHLD.shape[-1]), dtype)
    precision = jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
    turned = jnp.einsum(
        "bhld,de->bhle", x_BHLD.astype(dtype), turn, precision=precision, preferred_element_type=jnp.float32
    )
    return (x_BHLD * cos + turned * sin).astype(dtype)
