"""Attention of a few new tokens to a cache of keys and values and to themselves, without joining the two.

The caches of all layers are one array, which is read in place: no layer of it is copied, and of its tokens those alone
are read that have been written.
"""

import functools
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from varedit_jax.lazy import LazyModule

if TYPE_CHECKING:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu
else:
    pl, pltpu = LazyModule("jax.experimental.pallas"), LazyModule("jax.experimental.pallas.tpu")

BLOCK = 512  # keys of the cache that a step of the TPU's kernel reads
QUERIES = 1024  # of a step at most; each block of them reads all keys
LANES = 128  # rows that lengths are padded to on TPUs
_VMEM = 8 * 2**20  # bytes of blocks and scores in a step, of 16 MiB
_NOTHING = -1e30  # score of a key that is not there


def cache_tokens(tokens: int) -> int:
    """Returns the tokens that a cache has room for on TPUs, of which `tokens` are used: whole blocks."""
    return -(-tokens // BLOCK) * BLOCK


def _of_layer(x: jax.Array, layer: jax.Array, tokens: int) -> jax.Array:
    """Returns the first tokens of a layer, [B, H, tokens, D] of [layers, B, H, M, D]."""
    _, batch, heads, _, head_size = x.shape
    start = (layer, *[jnp.zeros((), layer.dtype)] * 4)
    return jax.lax.dynamic_slice(x, start, (1, batch, heads, tokens, head_size))[0]


def by_parts(
    q_BHLD: jax.Array,
    k_BHLD: jax.Array,
    v_BHLD: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    layer: jax.Array,
    *,
    seen: int,
    block: int = BLOCK,
) -> jax.Array:
    """Softmax attention to the first `seen` tokens of a layer's cache and to the new ones: [B, H, L, D]. No scaling.

    In ordinary operations, for blocks of `block` queries at a time; the softmax is in float32.

    Args:
      q_BHLD, k_BHLD, v_BHLD: of the new tokens.
      cache_k, cache_v: [layers, B, H, M, D].
      layer: int32 scalar.
      seen: tokens of the cache, 1 or more; static.
    """
    parts = [tuple(_of_layer(x, layer, seen) for x in (cache_k, cache_v)), (k_BHLD, v_BHLD)]
    tokens = q_BHLD.shape[2]
    count = -(-tokens // block)
    bounds = [tokens * part // count for part in range(count + 1)]
    outputs = []
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        q = q_BHLD[:, :, start:stop]
        scores = [jnp.einsum("bhld,bhmd->bhlm", q, k, preferred_element_type=jnp.float32) for k, _ in parts]
        top_BHL1 = functools.reduce(jnp.maximum, [jnp.max(x, axis=-1, keepdims=True) for x in scores])
        weights = [jnp.exp(x - top_BHL1) for x in scores]
        sums = [jnp.sum(x, axis=-1, keepdims=True) for x in weights]
        products = [
            jnp.einsum("bhlm,bhmd->bhld", x.astype(v.dtype), v, preferred_element_type=jnp.float32)
            for x, (_, v) in zip(weights, parts, strict=True)
        ]
        outputs.append(((products[0] + products[1]) / (sums[0] + sums[1])).astype(q.dtype))
    return outputs[0] if count == 1 else jnp.concatenate(outputs, axis=2)


def by_cudnn(
    q_BHLD: jax.Array,
    k_BHLD: jax.Array,
    v_BHLD: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    layer: jax.Array,
    *,
    seen: int,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> jax.Array:
    """`by_parts` by two calls of cuDNN, joined by their log-sum-exps. `implementation`: as of cudnn.full_attention."""
    batch = q_BHLD.shape[0]
    # The whole layer with a length: its first tokens alone would be a copy.
    keys, values = (_of_layer(x, layer, x.shape[3]) for x in (cache_k, cache_v))
    seen_B = jnp.full((batch,), seen, jnp.int32)
    outputs, sums = [], []
    parts: list[tuple[jax.Array, jax.Array, jax.Array | None]] = [(keys, values, seen_B), (k_BHLD, v_BHLD, None)]
    for k, v, length_B in parts:
        q_BLHD, k_BMHD, v_BMHD = (jnp.swapaxes(x, 1, 2) for x in (q_BHLD, k, v))
        out_BLHD, sum_BLH = jax.nn.dot_product_attention(
            q_BLHD,
            k_BMHD,
            v_BMHD,
            scale=1.0,
            key_value_seq_lengths=length_B,
            implementation=implementation,
            return_residual=True,
        )
        outputs.append(out_BLHD.astype(jnp.float32))
        sums.append(sum_BLH.astype(jnp.float32)[..., None])
    total = jnp.logaddexp(*sums)
    out_BLHD = outputs[0] * jnp.exp(sums[0] - total) + outputs[1] * jnp.exp(sums[1] - total)
    return jnp.swapaxes(out_BLHD, 1, 2).astype(q_BHLD.dtype)


def by_pallas(
    q_BHLD: jax.Array,
    k_BHLD: jax.Array,
    v_BHLD: jax.Array,
    cache_k: jax.Array,
    cache_v: jax.Array,
    layer: jax.Array,
    *,
    seen: int,
    interpret: bool = False,
) -> jax.Array:
    """`by_parts` by one kernel for TPUs, which reads the blocks of its layer from the caches.

    M has to be a multiple of BLOCK (`cache_tokens`). interpret: as ordinary operations, on any platform.
    """
    batch, heads, tokens, head_size = q_BHLD.shape
    rows = min(-(-tokens // 16) * 16, QUERIES)
    keys = min(-(-tokens // LANES) * LANES, BLOCK)
    q_BHLD, k_BHLD, v_BHLD = (
        jnp.pad(x, ((0, 0), (0, 0), (0, -tokens % size), (0, 0)))
        for x, size in ((q_BHLD, rows), (k_BHLD, keys), (v_BHLD, keys))
    )
    group = _heads_at_once(heads, rows, keys, head_size, q_BHLD.dtype.itemsize)
    before, own = -(-seen // BLOCK), k_BHLD.shape[2] // keys

    # Places of blocks by example, group of heads, block of queries, and block of keys, of which the cache's come first.
    queries = pl.BlockSpec((1, group, rows, head_size), lambda b, h, i, j, layer: (b, h, i, jnp.int32(0)))
    own_keys = pl.BlockSpec(
        (1, group, keys, head_size), lambda b, h, i, j, layer: (b, h, jnp.maximum(j - before, 0), jnp.int32(0))
    )
    cache = pl.BlockSpec(
        (1, 1, group, BLOCK, head_size),
        lambda b, h, i, j, layer: (layer[0], b, h, jnp.minimum(j, before - 1), jnp.int32(0)),
    )
    out_BHLD = pl.pallas_call(
        functools.partial(_kernel, seen=seen, before=before, own=own, tokens=tokens),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads // group, q_BHLD.shape[2] // rows, before + own),
            in_specs=[queries, own_keys, own_keys, cache, cache],
            out_specs=queries,
            scratch_shapes=[
                pltpu.VMEM((group, rows, LANES), jnp.float32),
                pltpu.VMEM((group, rows, LANES), jnp.float32),
                pltpu.VMEM((group, rows, head_size), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q_BHLD.shape, q_BHLD.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
        ),
        cost_estimate=_cost(q_BHLD, k_BHLD, seen=seen, tokens=tokens, rows=rows),
        interpret=interpret,
        name="cached_attention",
    )(layer.reshape(1).astype(jnp.int32), q_BHLD, k_BHLD, v_BHLD, cache_k, cache_v)
    return out_BHLD[:, :, :tokens]


def _cost(q_BHLD: jax.Array, k_BHLD: jax.Array, *, seen: int, tokens: int, rows: int) -> pl.CostEstimate:
    """For the compiler's schedule, and for whoever counts: operations without padding, and what is read and written."""
    batch, heads, padded, head_size = q_BHLD.shape
    keys = padded // rows * (k_BHLD.shape[2] + -(-seen // BLOCK) * BLOCK)  # for each block of queries
    return pl.CostEstimate(
        flops=batch * heads * tokens * (seen + tokens) * 4 * head_size,
        transcendentals=batch * heads * tokens * (seen + tokens),
        bytes_accessed=batch * heads * (2 * padded + 2 * keys) * head_size * q_BHLD.dtype.itemsize,
    )


def _heads_at_once(heads: int, rows: int, keys: int, head_size: int, itemsize: int) -> int:
    """Returns how many heads a step works on: as many as fit, for a step of few queries takes longer to begin."""
    blocks = 2 * (2 * rows + 2 * keys + 2 * BLOCK) * head_size * itemsize  # twice: the next ones are on their way
    scores = 2 * rows * BLOCK * 4 + rows * (2 * LANES + head_size) * 4
    return max(
        size for size in range(1, heads + 1) if heads % size == 0 and (size == 1 or size * (blocks + scores) <= _VMEM)
    )


def _kernel(
    layer: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    cache_k_ref: Any,
    cache_v_ref: Any,
    out_ref: Any,
    top_ref: Any,
    sum_ref: Any,
    acc_ref: Any,
    *,
    seen: int,
    before: int,
    own: int,
    tokens: int,
) -> None:
    """One block of queries of some heads, and one of keys: those of the cache come first."""
    del layer
    step = pl.program_id(3)

    @pl.when(step == 0)
    def _() -> None:
        top_ref[...] = jnp.full(top_ref.shape, _NOTHING, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def add(k: jax.Array, v: jax.Array, first: jax.Array, real: int) -> None:
        """The keys from `first` on, of which those before `real` are there."""
        scores = jax.lax.dot_general(q_ref[0], k, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32)
        place = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
        scores = jnp.where(place < real, scores, _NOTHING)
        top = jnp.maximum(top_ref[:, :, :1], jnp.max(scores, axis=2, keepdims=True))
        weights = jnp.exp(scores - top)
        kept = jnp.exp(top_ref[:, :, :1] - top)
        sums = kept * sum_ref[:, :, :1] + jnp.sum(weights, axis=2, keepdims=True)
        product = jax.lax.dot_general(
            weights.astype(v.dtype), v, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32
        )
        acc_ref[...] = acc_ref[...] * kept + product
        top_ref[...] = jnp.broadcast_to(top, top_ref.shape)
        sum_ref[...] = jnp.broadcast_to(sums, sum_ref.shape)

    @pl.when(step < before)
    def _() -> None:
        add(cache_k_ref[0, 0], cache_v_ref[0, 0], step * BLOCK, seen)

    @pl.when(step >= before)
    def _() -> None:
        add(k_ref[0], v_ref[0], (step - before) * k_ref.shape[2], tokens)

    @pl.when(step == before + own - 1)
    def _() -> None:
        out_ref[0] = (acc_ref[...] / sum_ref[:, :, :1]).astype(out_ref.dtype)
