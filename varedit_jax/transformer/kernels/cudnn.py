"""Attention without a dense mask by cuDNN's fused kernel, whose residuals can be kept by name."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def full_attention(
    q_BHLD: jax.Array,
    k_BHMD: jax.Array,
    v_BHMD: jax.Array,
    keys_B: jax.Array | None = None,
    name: str = "attention",
    implementation: str = "cudnn",
) -> jax.Array:
    """Softmax attention over all keys, or the first few: [B, H, L, D]. No scaling: pre-scale the queries.

    The residuals for the backward pass have a name for `jax.checkpoint`; unnamed, a rematerialized backward pass would
    run the kernel again.

    Args:
      q_BHLD, k_BHMD, v_BHMD: bfloat16 or float16 for cuDNN; D a multiple of 8.
      keys_B: int32, how many of the keys are real, 1 or more, the first ones; None if all are.
      name: of the residuals.
      implementation: of `jax.nn.dot_product_attention`; "xla" works everywhere, for tests.
    """
    return _attention(implementation, keys_B)(q_BHLD, k_BHMD, v_BHMD)


def _attention(implementation: Any, keys_B: jax.Array | None) -> Callable[..., jax.Array]:
    def attention(*arrays_BHLD: jax.Array) -> jax.Array:
        # The compiler makes what is in front of and behind the kernel give and take this order.
        arrays_BLHD = [jnp.swapaxes(x_BHLD, 1, 2) for x_BHLD in arrays_BHLD]
        out_BLHD = jax.nn.dot_product_attention(
            *arrays_BLHD, scale=1.0, key_value_seq_lengths=keys_B, implementation=implementation
        )
        return jnp.swapaxes(out_BLHD, 1, 2)

    return attention


def _forward(
    q_BHLD: jax.Array,
    k_BHMD: jax.Array,
    v_BHMD: jax.Array,
    keys_B: jax.Array | None,
    name: str,
    implementation: str,
) -> tuple[jax.Array, Callable[..., Any]]:
    out_BHLD, pull = jax.vjp(_attention(implementation, keys_B), q_BHLD, k_BHMD, v_BHMD)
    named_BHLD = checkpoint_name(out_BHLD, name)

    def mark(leaf: jax.Array) -> jax.Array:
        if any(leaf is x for x in (q_BHLD, k_BHMD, v_BHMD, keys_B)):
            return leaf  # cheap to recompute
        return named_BHLD if leaf is out_BHLD else checkpoint_name(leaf, name)

    return named_BHLD, jax.tree.map(mark, pull)


def _backward(name: str, implementation: str, pull: Callable[..., Any], gradient_BHLD: jax.Array) -> Any:
    del name, implementation
    return *pull(gradient_BHLD), None


full_attention.defvjp(_forward, _backward)
