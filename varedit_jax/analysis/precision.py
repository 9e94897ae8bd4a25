"""Bits of the tokenizer that a cheaper matmul precision of the frozen encoder flips.

A TPU multiplies in bfloat16. `default` precision is one such pass; `high` is three passes over the parts of a float32
(its upper 8 bits of mantissa, and the next 8), `highest` six. Here the first two are emulated by float32 convolutions
of rounded parts, so that any device shows the effect.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from varedit_jax.config import EditorConfig
from varedit_jax.scales import Pyramid
from varedit_jax.tokenizer.quantizer import quantize
from varedit_jax.tokenizer.tokens import encode_images
from varedit_jax.types import Params


def _rounded(x: jax.Array) -> jax.Array:
    # Not a pair of casts, which the compiler may remove.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _one_pass(left: jax.Array, right: jax.Array, *strides: Any, **how: Any) -> jax.Array:
    return jax.lax.conv_general_dilated(_rounded(left), _rounded(right), *strides, **how)


def _three_passes(left: jax.Array, right: jax.Array, *strides: Any, **how: Any) -> jax.Array:
    upper_left, upper_right = _rounded(left), _rounded(right)
    small = _one_pass(upper_left, right - upper_right, *strides, **how)
    small += _one_pass(left - upper_left, upper_right, *strides, **how)
    return small + _one_pass(upper_left, upper_right, *strides, **how)


_CONVOLUTIONS: dict[str, Callable[..., jax.Array]] = {"default": _one_pass, "high": _three_passes}


def bits_at(
    precision: str, params: Params, images_uint8: jax.Array, config: EditorConfig, pyramid: Pyramid
) -> tuple[jax.Array, ...]:
    """Bits of every scale, bool [B, h, w, Z] each, with the encoder's convolutions at a TPU's precision.

    Args:
      precision: default, high or highest.
      params: of the tokenizer.
      images_uint8: [B, y, x, 3].
      config, pyramid: of the editor.
    """

    def convolve(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, nn.Conv) and precision in _CONVOLUTIONS:
            object.__setattr__(context.module, "conv_general_dilated", _CONVOLUTIONS[precision])
        return call(*args, **kwargs)

    with jax.default_matmul_precision("highest"):
        with nn.intercept_methods(convolve):
            features = encode_images(params, images_uint8, config)
        return tuple(residual > 0 for residual in quantize(features, pyramid.cells(config.patchify)).residuals)


def changed_bits(ours: tuple[jax.Array, ...], others: tuple[jax.Array, ...]) -> list[float]:
    """Share of the bits of each scale that differ, and of all of them as the last entry."""
    differ = [jnp.not_equal(a, b) for a, b in zip(ours, others, strict=True)]
    everything = jnp.concatenate([scale.ravel() for scale in differ])
    return [float(jnp.mean(scale, dtype=jnp.float32)) for scale in (*differ, everything)]
