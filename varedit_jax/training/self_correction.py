"""Bitwise self-correction: flipped bits that later scales learn to repair (model.md, section 3; Infinity)."""

import jax
import jax.numpy as jnp

from varedit_jax.scales import Pyramid

STRENGTH_STEP = 0.01


def draw_flips(
    key: jax.Array, batch: int, channels: int, cells: Pyramid, noise_scales: int, noise_max: float
) -> tuple[jax.Array, ...]:
    """Returns masks of bits to flip, bool [B, h_k, w_k, Z], one per scale < `noise_scales`.

    The flip probability is drawn per scale for the whole batch, uniform over {0, 0.01, ..., noise_max}.
    """
    levels = round(noise_max / STRENGTH_STEP)
    if levels == 0:
        return ()
    flips = []
    for scale, grid in enumerate(cells.grids[:noise_scales]):
        strength_key, flip_key = jax.random.split(jax.random.fold_in(key, scale))
        strength = jax.random.randint(strength_key, (), 0, levels + 1).astype(jnp.float32) * STRENGTH_STEP
        flips.append(jax.random.bernoulli(flip_key, strength, (batch, *grid, channels)))
    return tuple(flips)
