"""Softmax attention by blocks of queries for CPUs, whose backward pass computes the scores again block by block.

What stays of the scores is the output and the log-sum-exp of each query, as with the kernels for accelerators.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

LARGEST_BLOCK = 512  # queries whose scores exist at one time
HIDDEN = -1e30  # score of a key that is padding

Span = tuple[int, int]  # start and stop


class Group(NamedTuple):
    """Queries that all see the same keys."""

    queries: Span
    keys: tuple[Span, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def grouped_attention(
    q_BHLD: jax.Array,
    k_BHMD: jax.Array,
    v_BHMD: jax.Array,
    mask_BM: jax.Array | None,
    groups: tuple[Group, ...],
    name: str = "attention",
) -> jax.Array:
    """Returns the softmax attention of each group of queries to its keys, [B, H, L, D]. No scaling: pre-scale q.

    The softmax is in float32. The residuals for the backward pass (output and log-sum-exp) have a name for
    `jax.checkpoint`.

    Args:
      q_BHLD, k_BHMD, v_BHMD: queries, keys and values.
      mask_BM: bool, True where a key is real, as at least one is for every group; None if all are.
      groups: they cover the L queries in order; what is not visible is not computed.
      name: of the residuals.
    """
    return _forward(q_BHLD, k_BHMD, v_BHMD, mask_BM, groups, name)[0]


def _blocks(groups: tuple[Group, ...]) -> list[Group]:
    """Returns the groups, the large ones in blocks of equal size but for rounding."""
    found = []
    for (start, stop), keys in groups:
        count = -(-(stop - start) // LARGEST_BLOCK)
        bounds = [start + (stop - start) * part // count for part in range(count + 1)]
        found += [Group(span, keys) for span in zip(bounds[:-1], bounds[1:], strict=True)]
    return found


def _take(x: jax.Array, spans: tuple[Span, ...]) -> jax.Array:
    """Returns the rows [..., spans, D] of x [..., M, D]."""
    parts = [x[..., start:stop, :] for start, stop in spans]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-2)


def _product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _sum_over_queries(x_BHLM: jax.Array, y_BHLD: jax.Array) -> jax.Array:
    """Returns x' y per head, float32 [B, H, M, D]."""
    # As (y' x)', whose right operand is in memory as the matmul reads it: 1.5 times as fast for 512 keys on a CPU.
    turned_BHDM = jax.lax.optimization_barrier(_product("bhld,bhlm->bhdm", y_BHLD, x_BHLM))
    return jnp.swapaxes(turned_BHDM, 2, 3)


def _scores(q_BHLD: jax.Array, k_BHMD: jax.Array, mask_BM: jax.Array | None, keys: tuple[Span, ...]) -> jax.Array:
    """Returns q k^T, float32 [B, H, L, M], HIDDEN where a key is padding."""
    scores_BHLM = _product("bhld,bhmd->bhlm", q_BHLD, k_BHMD)
    if mask_BM is None:
        return scores_BHLM
    real_BM = _take(mask_BM[..., None], keys)[..., 0]
    return jnp.where(real_BM[:, None, None], scores_BHLM, jnp.float32(HIDDEN))


def _forward(
    q_BHLD: jax.Array,
    k_BHMD: jax.Array,
    v_BHMD: jax.Array,
    mask_BM: jax.Array | None,
    groups: tuple[Group, ...],
    name: str,
) -> tuple[jax.Array, Any]:
    outputs, sums = [], []
    for queries, keys in _blocks(groups):
        v = _take(v_BHMD, keys)
        scores_BHLM = _scores(_take(q_BHLD, (queries,)), _take(k_BHMD, keys), mask_BM, keys)
        top_BHL = jnp.max(scores_BHLM, axis=-1, keepdims=True)
        weights_BHLM = jnp.exp(scores_BHLM - top_BHL)
        sum_BHL = jnp.sum(weights_BHLM, axis=-1, keepdims=True)
        # Divided after the product: D numbers per query instead of M.
        out = _product("bhlm,bhmd->bhld", weights_BHLM.astype(v.dtype), v) / sum_BHL
        outputs.append(out.astype(q_BHLD.dtype))
        sums.append(top_BHL + jnp.log(sum_BHL))
    out_BHLD = checkpoint_name(jnp.concatenate(outputs, axis=2), name)
    sum_BHL1 = checkpoint_name(jnp.concatenate(sums, axis=2), name)
    return out_BHLD, (q_BHLD, k_BHMD, v_BHMD, mask_BM, out_BHLD, sum_BHL1)


def _backward(groups: tuple[Group, ...], name: str, residuals: Any, gradient_BHLD: jax.Array) -> Any:
    """With P the weights, O the output and G its gradient: dV = P'G, dS = P (G V' - G.O), dQ = dS K, dK = dS' Q."""
    del name
    q_BHLD, k_BHMD, v_BHMD, mask_BM, out_BHLD, sum_BHL1 = residuals
    product_BHLD = gradient_BHLD.astype(jnp.float32) * out_BHLD.astype(jnp.float32)
    dot_BHL1 = jnp.sum(product_BHLD, axis=-1, keepdims=True)
    dk_BHMD, dv_BHMD = (jnp.zeros(x.shape, jnp.float32) for x in (k_BHMD, v_BHMD))
    dqs = []
    for queries, keys in _blocks(groups):
        q, gradient, sums, dot = (_take(x, (queries,)) for x in (q_BHLD, gradient_BHLD, sum_BHL1, dot_BHL1))
        k, v = _take(k_BHMD, keys), _take(v_BHMD, keys)
        weights_BHLM = jnp.exp(_scores(q, k, mask_BM, keys) - sums)
        dweights_BHLM = _product("bhld,bhmd->bhlm", gradient, v)
        dscores_BHLM = (weights_BHLM * (dweights_BHLM - dot)).astype(q.dtype)
        dqs.append(_product("bhlm,bhmd->bhld", dscores_BHLM, k).astype(q.dtype))
        dk = _sum_over_queries(dscores_BHLM, q)
        dv = _sum_over_queries(weights_BHLM.astype(v.dtype), gradient)
        done = 0
        for start, stop in keys:
            rows = slice(done, done + stop - start)
            dk_BHMD = dk_BHMD.at[:, :, start:stop].add(dk[:, :, rows])
            dv_BHMD = dv_BHMD.at[:, :, start:stop].add(dv[:, :, rows])
            done = rows.stop
    dq_BHLD = jnp.concatenate(dqs, axis=2)
    return dq_BHLD, dk_BHMD.astype(k_BHMD.dtype), dv_BHMD.astype(v_BHMD.dtype), None


grouped_attention.defvjp(_forward, _backward)
