"""Two-dimensional rotary position embedding and where tokens sit (model.md, section 6, "Positions")."""

import jax
import jax.numpy as jnp
import numpy as np

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

    `paper`: a target token sits at its place on the position grid (U, V), a source token at its place plus (U, V).
    `released`: the first S + L rows of the table [source of the full schedule, its target scales], whatever the
    resolution; that is how the published weights were trained below 1024 px. Both agree on the full schedule.
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
    """Cosines and sines, float32 [2, L, D / 2]: the first D / 4 pairs turn by rows, the others by columns."""
    quarter = head_size // 4
    frequency = ROPE_BASE ** (-2 * np.arange(quarter) / (head_size / 2))
    angles = positions_L2[:, :, None].astype(np.float64) * frequency  # [L, 2, D / 4]
    angles = angles.reshape(len(positions_L2), head_size // 2)
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def rotate(x_BLHD: jax.Array, rotation_2LD: np.ndarray | jax.Array) -> jax.Array:
    """Turns the interleaved pairs (2i, 2i + 1) of each head by the angles of `rotation`; keeps the dtype."""
    cos, sin = rotation_2LD[:, None, :, None, :]  # [1, L, 1, D / 2] each
    pairs = x_BLHD.astype(jnp.float32).reshape(*x_BLHD.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x_BLHD.shape).astype(x_BLHD.dtype)
