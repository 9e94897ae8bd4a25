"""Attention without a mask by cuDNN's fused kernel, whose residuals can be kept by name."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def full_attention(q_BLHD: jax.Array, k_BMHD: jax.Array, v_BMHD: jax.Array, implementation: str = "cudnn") -> jax.Array:
    """Softmax attention over all keys: [B, L, H, D]. No scaling: pre-scale the queries.

    What the backward pass needs of the forward one has the name "attention" for `jax.checkpoint`; without that the
    kernel would run again in every backward pass that is rematerialized.

    Args:
      q_BLHD, k_BMHD, v_BMHD: bfloat16 or float16 for cuDNN; D a multiple of 8.
      implementation: of `jax.nn.dot_product_attention`; "xla" works everywhere, for tests.
    """
    return _attention(implementation)(q_BLHD, k_BMHD, v_BMHD)


def _attention(implementation: Any) -> Callable[..., jax.Array]:
    return functools.partial(jax.nn.dot_product_attention, scale=1.0, implementation=implementation)


def _forward(
    q_BLHD: jax.Array, k_BMHD: jax.Array, v_BMHD: jax.Array, implementation: str
) -> tuple[jax.Array, Callable[..., Any]]:
    out_BLHD, pull = jax.vjp(_attention(implementation), q_BLHD, k_BMHD, v_BMHD)
    named_BLHD = checkpoint_name(out_BLHD, "attention")

    def name(leaf: jax.Array) -> jax.Array:
        if any(leaf is x for x in (q_BLHD, k_BMHD, v_BMHD)):
            return leaf  # cheap to make again
        return named_BLHD if leaf is out_BLHD else checkpoint_name(leaf, "attention")

    return named_BLHD, jax.tree.map(name, pull)


def _backward(implementation: str, pull: Callable[..., Any], gradient_BLHD: jax.Array) -> Any:
    return pull(gradient_BLHD)


full_attention.defvjp(_forward, _backward)
