"""From logits to bits: temperature, classifier-free guidance, top-p, greedy (model.md, section 8)."""

import jax
import jax.numpy as jnp

from varedit_jax.config import SamplingConfig


def guided_margin(
    conditional_BLN2: jax.Array, unconditional_BLN2: jax.Array | None, guidance: float, temperature: float
) -> jax.Array:
    """Log-odds of every bit, float32 [B, L, N]: cfg * cond + (1 - cfg) * uncond on logits divided by tau.

    Two logits matter only by their difference, so guidance works on differences.
    """
    margin = conditional_BLN2[..., 1] - conditional_BLN2[..., 0]
    if unconditional_BLN2 is not None:
        without = unconditional_BLN2[..., 1] - unconditional_BLN2[..., 0]
        margin = guidance * margin + (1 - guidance) * without
    return margin / temperature


def choose_bits(margin_BLN: jax.Array, config: SamplingConfig, keys_B: jax.Array) -> jax.Array:
    """Bits, bool [B, L, N], drawn independently from their log-odds.

    Args:
      margin_BLN: float32 log-odds.
      config: `greedy` takes the likelier value; `top_p` removes a value of probability <= 1 - top_p.
      keys_B: one PRNG key per sample: an image's stream does not depend on its position in the batch.
    """
    if config.greedy:
        return margin_BLN > 0
    one_BLN = jax.nn.sigmoid(margin_BLN)
    if config.top_p > 0:
        removed = min(1 - config.top_p, 0.5)  # the likelier value always stays
        one_BLN = jnp.where(one_BLN <= removed, 0, jnp.where(one_BLN >= 1 - removed, 1, one_BLN))
    uniform_BLN = jax.vmap(lambda key: jax.random.uniform(key, margin_BLN.shape[1:]))(keys_B)
    return uniform_BLN < one_BLN
