"""Bitwise cross-entropy and its accuracies (model.md, section 7)."""

import jax
import jax.numpy as jnp
import numpy as np

from varedit_jax.config import LossConfig
from varedit_jax.scales import Pyramid

BY_EXAMPLE = ("example_loss", "example_bit_accuracy")  # metrics of each example, for evaluation


def token_weights(pyramid: Pyramid, scale_power: float) -> np.ndarray:
    """Returns the weight of every target token in the loss, float32 [L], summing to 1.

    A token of scale k weighs (h_K w_K / (h_k w_k))^scale_power times one of the last scale.
    """
    last = pyramid.lengths[-1]
    scale_weights = [(last / length) ** scale_power for length in pyramid.lengths]
    weights = np.repeat(scale_weights, pyramid.lengths)
    return (weights / weights.sum()).astype(np.float32)


def bitwise_loss(
    logits_BLN2: jax.Array, residuals_BLN: jax.Array, pyramid: Pyramid, config: LossConfig, by_example: bool = False
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the two-way cross-entropy of the bits, in nats.

    Args:
      logits_BLN2: float32 logits of values 0 and 1.
      residuals_BLN: float32 residuals whose signs are the bits. With `config.label_temperature` T > 0 the target is not
        the bit but its soft assignment sigmoid(residual / T), as in BSQ's entropy term (arXiv 2406.07548, section
        3.3), so that undecided bits weigh little. With `config.label_smoothing` e > 0 a target t becomes
        (1 - e) t + e / 2. The metrics are of the bits either way.
      pyramid: gives the scale of each of the L tokens.
      config: temperature and smoothing of the labels, reduction over bits and weights over tokens.
      by_example: True for `BY_EXAMPLE` of each example [B] among the metrics.

    Returns:
      (scalar loss averaged over the batch, metrics): `bit_accuracy` over all bits, and per scale [K]
      `scale_loss` (mean over bits), `scale_bit_accuracy`, `scale_token_accuracy` (all bits of a token right).
    """
    # The cross-entropy of two logits is a softplus of their difference, signed by the label.
    margin_BLN = logits_BLN2[..., 1] - logits_BLN2[..., 0]
    labels_BLN = residuals_BLN > 0
    entropy_BLN = jax.nn.softplus(jnp.where(labels_BLN, -margin_BLN, margin_BLN))
    loss_BLN = entropy_BLN
    if config.label_temperature or config.label_smoothing:
        targets_BLN = labels_BLN.astype(jnp.float32)
        if config.label_temperature:
            targets_BLN = jax.nn.sigmoid(residuals_BLN / config.label_temperature)
        targets_BLN = (1 - config.label_smoothing) * targets_BLN + config.label_smoothing / 2
        loss_BLN = jax.nn.softplus(margin_BLN) - targets_BLN * margin_BLN
    token_BL = jnp.mean(loss_BLN, axis=-1) if config.reduction == "mean" else jnp.sum(loss_BLN, axis=-1)
    loss_B = token_BL @ token_weights(pyramid, config.scale_power)
    loss = jnp.mean(loss_B)

    right_BLN = (margin_BLN > 0) == labels_BLN
    entropy_L = jnp.mean(entropy_BLN, axis=(0, 2))
    bit_L = jnp.mean(right_BLN, axis=(0, 2), dtype=jnp.float32)
    token_L = jnp.mean(jnp.all(right_BLN, axis=-1), axis=0, dtype=jnp.float32)

    def by_scale(x_L: jax.Array) -> jax.Array:
        return jnp.stack([jnp.mean(x_L[tokens]) for tokens in pyramid.slices()])

    metrics = {
        "bit_accuracy": jnp.mean(bit_L),
        "scale_loss": by_scale(entropy_L),
        "scale_bit_accuracy": by_scale(bit_L),
        "scale_token_accuracy": by_scale(token_L),
    }
    if by_example:
        of_examples = (loss_B, jnp.mean(right_BLN, axis=(1, 2), dtype=jnp.float32))
        metrics |= dict(zip(BY_EXAMPLE, of_examples, strict=True))
    return loss, metrics
