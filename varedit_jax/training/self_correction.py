"""Bitwise self-correction: flipped bits that later scales learn to repair (model.md, section 3; Infinity)."""

import math

import jax
import jax.numpy as jnp

from varedit_jax.parallel.mesh import BATCH
from varedit_jax.scales import Pyramid

STRENGTH_STEP = 0.01


def strength_groups(sharing: str, batch: int) -> int:
    """Returns the parts of a microbatch of `batch` examples that have a strength each (`LossConfig.noise_strength`)."""
    if sharing == "batch":
        return 1
    if sharing == "example":
        return batch
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH)


def draw_flips(
    key: jax.Array, batch: int, channels: int, cells: Pyramid, noise_scales: int, noise_max: float, groups: int = 1
) -> tuple[jax.Array, ...]:
    """Returns masks of bits to flip, bool [B, h_k, w_k, Z], one per scale < `noise_scales`.

    The flip probability is drawn per scale, uniform over {0, 0.01, ..., noise_max}, for each of `groups` equal parts of
    the batch, which are consecutive examples.
    """
    levels = round(noise_max / STRENGTH_STEP)
    if levels == 0:
        return ()
    flips = []
    for scale, grid in enumerate(cells.grids[:noise_scales]):
        strength_key, flip_key = jax.random.split(jax.random.fold_in(key, scale))
        shape = () if groups == 1 else (groups,)
        strength = jax.random.randint(strength_key, shape, 0, levels + 1).astype(jnp.float32) * STRENGTH_STEP
        if groups > 1:
            strength = jnp.repeat(strength, batch // groups)[:, None, None, None]
        flips.append(jax.random.bernoulli(flip_key, strength, (batch, *grid, channels)))
    return tuple(flips)
