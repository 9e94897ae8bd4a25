"""Attention without a dense mask by cuDNN's fused kernel, whose residuals can be kept by name."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def full_attention(
    q_BLHD: jax.Array,
    k_BMHD: jax.Array,
    v_BMHD: jax.Array,
    keys_B: jax.Array | None = None,
    name: str = "attention",
    implementation: str = "cudnn",
) -> jax.Array:
    """Softmax attention over all keys, or the first few: [B, L, H, D]. No scaling: pre-scale the queries.

    The residuals for the backward pass have a name for `jax.checkpoint`; unnamed, a rematerialized backward pass would
    run the kernel again.

    Args:
      q_BLHD, k_BMHD, v_BMHD: bfloat16 or float16 for cuDNN; D a multiple of 8.
      keys_B: int32, how many of the keys are real, 1 or more, the first ones; None if all are.
      name: of the residuals.
      implementation: of `jax.nn.dot_product_attention`; "xla" works everywhere, for tests.
    """
    return _attention(implementation, keys_B)(q_BLHD, k_BMHD, v_BMHD)


def _attention(implementation: Any, keys_B: jax.Array | None) -> Callable[..., jax.Array]:
    return functools.partial(
        jax.nn.dot_product_attention, scale=1.0, key_value_seq_lengths=keys_B, implementation=implementation
    )


def _forward(
    q_BLHD: jax.Array,
    k_BMHD: jax.Array,
    v_BMHD: jax.Array,
    keys_B: jax.Array | None,
    name: str,
    implementation: str,
) -> tuple[jax.Array, Callable[..., Any]]:
    out_BLHD, pull = jax.vjp(_attention(implementation, keys_B), q_BLHD, k_BMHD, v_BMHD)
    named_BLHD = checkpoint_name(out_BLHD, name)

    def mark(leaf: jax.Array) -> jax.Array:
        if any(leaf is x for x in (q_BLHD, k_BMHD, v_BMHD, keys_B)):
            return leaf  # cheap to recompute
        return named_BLHD if leaf is out_BLHD else checkpoint_name(leaf, name)

    return named_BLHD, jax.tree.map(mark, pull)


def _backward(name: str, implementation: str, pull: Callable[..., Any], gradient_BLHD: jax.Array) -> Any:
    del name, implementation
    return *pull(gradient_BLHD), None


full_attention.defvjp(_forward, _backward)
