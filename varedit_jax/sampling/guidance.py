"""From logits to bits: temperature, classifier-free guidance, top-p, greedy (model.md, section 8)."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from varedit_jax.config import SamplingConfig, per_scale

Array = jax.Array | np.ndarray


@flax.struct.dataclass
class Controls:
    """What a `SamplingConfig` says, as arrays with a row per image: no program depends on their values."""

    guidance_BK: Array  # float32 cfg
    without_BK: Array  # float32 1 - cfg, rounded once
    temperature_BK: Array  # float32 tau
    removed_B: Array  # float32, largest probability of a bit value that top-p removes
    greedy_B: Array  # bool


def controls(sampling: Sequence[SamplingConfig], scales: int) -> Controls:
    """The controls of images, one config each. Raises ValueError for a list of more numbers than scales."""
    guidance_BK, temperature_BK = (
        np.array([per_scale(getattr(config, name), scales) for config in sampling], np.float64)
        for name in ("guidance", "temperature")
    )
    return Controls(
        guidance_BK=guidance_BK.astype(np.float32),
        without_BK=(1 - guidance_BK).astype(np.float32),
        temperature_BK=temperature_BK.astype(np.float32),
        # The likelier value always stays.
        removed_B=np.array([min(1 - config.top_p, 0.5) if config.top_p else 0 for config in sampling], np.float32),
        greedy_B=np.array([config.greedy for config in sampling]),
    )


def guided_scales(sampling: Sequence[SamplingConfig], scales: int) -> int:
    """How many of the first scales run the unconditional half: up to the last that any image guides."""
    guided = [
        [scale for scale, value in enumerate(per_scale(config.guidance, scales), 1) if value != 1]
        for config in sampling
    ]
    return max((last for found in guided for last in found[-1:]), default=0)


def guided_margin(
    conditional_BLN2: jax.Array, unconditional_BLN2: jax.Array | None, controls: Controls, scale: int
) -> jax.Array:
    """Log-odds of every bit of a scale, float32 [B, L, N]: cfg * cond + (1 - cfg) * uncond on logits divided by tau.

    Two logits matter only by their difference, so guidance works on differences.
    """
    margin = conditional_BLN2[..., 1] - conditional_BLN2[..., 0]
    if unconditional_BLN2 is not None:
        other = unconditional_BLN2[..., 1] - unconditional_BLN2[..., 0]
        margin = _column(controls.guidance_BK, scale) * margin + _column(controls.without_BK, scale) * other
    return margin / _column(controls.temperature_BK, scale)


def _column(x_BK: Array, scale: int) -> jax.Array:
    return jnp.asarray(x_BK)[:, scale, None, None]


def choose_bits(margin_BLN: jax.Array, controls: Controls, keys_B: jax.Array) -> jax.Array:
    """Bits, bool [B, L, N], drawn independently from their log-odds.

    Args:
      margin_BLN: float32 log-odds.
      controls: where `greedy_B` is set, the likelier value is taken; of the others top-p removes the unlikely one.
      keys_B: one PRNG key per sample: an image's stream does not depend on its position in the batch.
    """
    one_BLN = jax.nn.sigmoid(margin_BLN)
    removed_B11 = controls.removed_B[:, None, None]
    one_BLN = jnp.where(one_BLN <= removed_B11, 0, jnp.where(one_BLN >= 1 - removed_B11, 1, one_BLN))
    uniform_BLN = jax.vmap(lambda key: jax.random.uniform(key, margin_BLN.shape[1:]))(keys_B)
    return jnp.where(controls.greedy_B[:, None, None], margin_BLN > 0, uniform_BLN < one_BLN)
