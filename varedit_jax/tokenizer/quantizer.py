"""Multi-scale binary spherical residual quantizer (model.md, section 3; VAREdit, arXiv 2508.15772, section 3.1).

All grids here are in tokenizer cells (`Pyramid.cells`); tokens are cells, or 2x2 patches of them.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from varedit_jax.resize import area_resize, linear_resize
from varedit_jax.scales import Pyramid


@flax.struct.dataclass
class Residuals:
    """Results of the residual loop; tuples hold one array per scale."""

    bits: tuple[jax.Array, ...]  # bool [B, h_k, w_k, Z]: the labels
    inputs: tuple[jax.Array, ...]  # float32 [B, h_k, w_k, Z] for scales 1..K-1: teacher-forced inputs
    residuals: tuple[jax.Array, ...]  # float32 [B, h_k, w_k, Z], which each scale quantized
    accumulated: tuple[jax.Array, ...]  # float32 [B, h, w, Z]: sum of the codes through each scale

    @property
    def quantized(self) -> jax.Array:
        """The sum of all codes, which the decoder decodes: float32 [B, h, w, Z]."""
        return self.accumulated[-1]


def code(bits: jax.Array) -> jax.Array:
    """Bits [..., Z] as points on the unit sphere: float32 +-1/sqrt(Z)."""
    magnitude = bits.shape[-1] ** -0.5
    return jnp.where(bits, jnp.float32(magnitude), jnp.float32(-magnitude))


def accumulate(accumulated_BhwZ: jax.Array, bits_BhwZ: jax.Array, cells: Pyramid) -> jax.Array:
    """Adds the code of one scale, resized to the last grid, to the sum of the coarser scales."""
    return accumulated_BhwZ + linear_resize(code(bits_BhwZ), cells.last)


def next_input(accumulated_BhwZ: jax.Array, scale: int, cells: Pyramid) -> jax.Array:
    """Input of `scale` >= 1: the sum accumulated so far, resized to that scale's grid."""
    return linear_resize(accumulated_BhwZ, cells.grids[scale])


def quantize(features_BhwZ: jax.Array, cells: Pyramid, flips: Sequence[jax.Array | None] = ()) -> Residuals:
    """Residual bits of raw features, coarse to fine.

    Args:
      features_BhwZ: float32 raw features of the encoder at the last grid.
      cells: pyramid in tokenizer cells.
      flips: for each scale, None or a bool mask [B, h_k, w_k, Z] of bits that are accumulated flipped (bitwise
        self-correction); labels stay unflipped, so later scales learn to repair the error. Shorter is fine.

    Returns:
      Residuals. No gradient flows through them; see `straight_through`.

    Raises:
      ValueError: if the features are not at the last grid.
    """
    if features_BhwZ.shape[1:3] != cells.last:
        raise ValueError(f"features have grid {features_BhwZ.shape[1:3]}, the pyramid ends at {cells.last}")
    features_BhwZ = jax.lax.stop_gradient(features_BhwZ.astype(jnp.float32))
    accumulated_BhwZ = jnp.zeros_like(features_BhwZ)
    bits, inputs, residuals, sums = [], [], [], []
    for scale, grid in enumerate(cells.grids):
        if scale > 0:
            inputs.append(next_input(accumulated_BhwZ, scale, cells))
        residual_BhwZ = area_resize(features_BhwZ - accumulated_BhwZ, grid)
        bits_BhwZ = residual_BhwZ > 0
        flip = flips[scale] if scale < len(flips) else None
        seen_BhwZ = bits_BhwZ if flip is None else jnp.logical_xor(bits_BhwZ, flip)
        accumulated_BhwZ = accumulate(accumulated_BhwZ, seen_BhwZ, cells)
        bits.append(bits_BhwZ)
        residuals.append(residual_BhwZ)
        sums.append(accumulated_BhwZ)
    return Residuals(tuple(bits), tuple(inputs), tuple(residuals), tuple(sums))


def dequantize(bits: Sequence[jax.Array], cells: Pyramid) -> jax.Array:
    """Bits of the first scales, bool [B, h_k, w_k, Z] each, to the accumulated feature at the last grid."""
    accumulated_BhwZ = jnp.zeros((bits[0].shape[0], *cells.last, bits[0].shape[-1]), jnp.float32)
    for bits_BhwZ in bits:
        accumulated_BhwZ = accumulate(accumulated_BhwZ, bits_BhwZ, cells)
    return accumulated_BhwZ


def straight_through(features_BhwZ: jax.Array, quantized_BhwZ: jax.Array) -> jax.Array:
    """The quantized feature in the forward pass, the identity of the raw feature in the backward pass."""
    return features_BhwZ + jax.lax.stop_gradient(quantized_BhwZ - features_BhwZ)


def commitment(features_BhwZ: jax.Array, quantized_BhwZ: jax.Array) -> jax.Array:
    """Mean squared distance of raw features from their (fixed) quantization: keeps the residual loop in reach."""
    return jnp.mean(jnp.square(features_BhwZ - jax.lax.stop_gradient(quantized_BhwZ)))


def bit_entropy(
    features_BhwZ: jax.Array, quantized: Residuals, cells: Pyramid, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Entropy of soft bits (BSQ, arXiv 2406.07548, section 3.3): of one token's bits, and of the batch's mean bits.

    A soft bit is sigmoid(2 u / (temperature / sqrt(Z))) for the L2-normalized residual u. Small token entropy means
    confident bits; large batch entropy means every bit is used. Both in nats per bit, averaged over scales.
    """
    channels = features_BhwZ.shape[-1]
    token_entropy = batch_entropy = jnp.float32(0)
    for grid, residual in zip(cells.grids, quantized.residuals, strict=True):
        # The residual's value, with the gradient of the pooled feature.
        pooled = area_resize(features_BhwZ, grid)
        z = residual + pooled - jax.lax.stop_gradient(pooled)
        unit = z * jax.lax.rsqrt(jnp.sum(jnp.square(z), axis=-1, keepdims=True) + 1e-12)
        logits = 2 * unit * (channels**0.5 / temperature)
        token_entropy += jnp.mean(_binary_entropy(logits))
        mean_probability = jnp.mean(jax.nn.sigmoid(logits), axis=(0, 1, 2))
        batch_entropy += jnp.mean(_binary_entropy(_logit(mean_probability)))
    return token_entropy / cells.scales, batch_entropy / cells.scales


def _logit(probability: jax.Array) -> jax.Array:
    clipped = jnp.clip(probability, 1e-6, 1 - 1e-6)
    return jnp.log(clipped) - jnp.log1p(-clipped)


def _binary_entropy(logits: jax.Array) -> jax.Array:
    """Entropy in nats of a bit with these log-odds, without overflow."""
    return jax.nn.softplus(logits) - logits * jax.nn.sigmoid(logits)


def to_tokens(x_BhwZ: jax.Array, patchify: bool) -> jax.Array:
    """Cells [B, h, w, Z] to tokens [B, L, N], row-major.

    With `patchify` a token is a 2x2 patch: channel c * 4 + 2 * dy + dx holds cell channel c at (2y + dy, 2x + dx).
    """
    batch, height, width, channels = x_BhwZ.shape
    if not patchify:
        return x_BhwZ.reshape(batch, height * width, channels)
    x = x_BhwZ.reshape(batch, height // 2, 2, width // 2, 2, channels)
    x = x.transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, height * width // 4, channels * 4)


def to_cells(x_BLN: jax.Array, grid: tuple[int, int], patchify: bool) -> jax.Array:
    """Tokens [B, L, N] of a token grid to cells [B, h, w, Z]; inverse of `to_tokens`."""
    batch, _, channels = x_BLN.shape
    height, width = grid
    if not patchify:
        return x_BLN.reshape(batch, height, width, channels)
    x = x_BLN.reshape(batch, height, width, channels // 4, 2, 2)
    x = x.transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, 2 * height, 2 * width, channels // 4)
