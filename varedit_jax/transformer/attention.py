"""Attention by prefixes: every scale sees one prefix of the sequence, so no mask is needed (model.md, section 6).

With the scale-aligned reference (SAR), queries of scale k see the source's keys and values area-resized to the grid of
k instead of the source itself; block 0 alone works that way (model.md, section 6, "What each block may see").
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from varedit_jax.config import TransformerConfig
from varedit_jax.parallel.constrain import constrain, gather_tokens, per_shard, scatter_tokens
from varedit_jax.parallel.mesh import BATCH
from varedit_jax.transformer.kernels import Kernel, apart, blocked, cached, choose, cudnn, platform, splash
from varedit_jax.transformer.products import add_bias, from_heads, to_heads, to_keys_and_values
from varedit_jax.transformer.rope import rotate
from varedit_jax.transformer.visibility import SMALL_GROUP, Visibility, query_groups, visibility_mask

MAX_LOG_SCALE = float(np.log(100.0))


@flax.struct.dataclass
class Cache:
    """Keys and values of a stack of blocks, [layers, B, H, tokens, D]."""

    k: jax.Array  # of source tokens and of the target tokens so far, with room for more
    v: jax.Array
    text_k: jax.Array
    text_v: jax.Array

    def with_room(self, tokens: int) -> "Cache":
        """The cache padded with zeros up to `tokens`."""
        return dataclasses.replace(self, **{name: _padded(getattr(self, name), tokens) for name in ("k", "v")})

    def write(self, k: jax.Array, v: jax.Array, start: int) -> "Cache":
        """The cache with the keys and values of new tokens, as those that it has, at token `start`."""

        def put(buffer: jax.Array, x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(buffer, x, start, axis=-2)

        return dataclasses.replace(self, k=put(self.k, k), v=put(self.v, v))

    def first_samples(self, count: int) -> "Cache":
        """The cache of the first `count` samples of the batch."""
        return jax.tree.map(lambda x: x[:, :count], self)

    def text(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the text in one block, [B, H, T, D] each."""
        return self.text_k[layer], self.text_v[layer]


def attend(
    q_BHLD: jax.Array,
    k_BHMD: jax.Array,
    v_BHMD: jax.Array,
    mask_BM: jax.Array | None = None,
    mask_LM: np.ndarray | None = None,
) -> jax.Array:
    """Softmax attention over all keys, softmax in float32: [B, H, L, D]. No scaling: pre-scale the queries.

    mask_BM: bool, True where a key is real; None if all are.
    mask_LM: bool, True where a query sees a key; None if each sees all.
    """
    # q k^T per head. model.md, section 6: cos-attention has no other scale than that in q; nor has the text's here.
    logits_BHLM = jnp.einsum("bhld,bhmd->bhlm", q_BHLD, k_BHMD, preferred_element_type=jnp.float32)
    if mask_BM is not None:
        logits_BHLM = jnp.where(mask_BM[:, None, None, :], logits_BHLM, jnp.float32(-1e30))
    if mask_LM is not None:
        logits_BHLM = jnp.where(mask_LM[None, None], logits_BHLM, jnp.float32(-1e30))
    weights_BHLM = jax.nn.softmax(logits_BHLM, axis=-1).astype(v_BHMD.dtype)
    return jnp.einsum("bhlm,bhmd->bhld", weights_BHLM, v_BHMD)  # softmax(q k^T) v


def prefix_attention(
    q_BHLD: jax.Array, k_BHLD: jax.Array, v_BHLD: jax.Array, visibility: Visibility, remat: bool = False
) -> jax.Array:
    """Self-attention of a whole sequence [source S][target scales], one call per scale: [B, H, S + L, D].

    Of the source alone if there are no more tokens. With `remat` the backward pass recomputes the scores, one group at
    a time, instead of keeping those of all groups.
    """
    attention = jax.checkpoint(attend, prevent_cse=False) if remat else attend
    source, pyramid = visibility.source_tokens, visibility.pyramid
    outputs = [
        attention(q_BHLD[:, :, queries], k_BHLD[:, :, keys], v_BHLD[:, :, keys])
        for queries, keys in visibility.source_groups()
    ]
    for scale, tokens in enumerate(pyramid.slices() if q_BHLD.shape[2] > source else ()):
        queries = slice(source + tokens.start, source + tokens.stop)
        keys, values = (visibility.keys(x, scale, tokens.stop) for x in (k_BHLD, v_BHLD))
        outputs.append(attention(q_BHLD[:, :, queries], keys, values))
    return checkpoint_name(jnp.concatenate(outputs, axis=2), "attention")


def splash_attention(
    q_BHLD: jax.Array, k_BHLD: jax.Array, v_BHLD: jax.Array, visibility: Visibility, tokens: int, *, interpret: bool
) -> jax.Array:
    """`prefix_attention` of the first `tokens` by one call of the splash kernel, as long as the arrays are.

    `interpret` for other platforms than TPUs.
    """
    mask_LM = visibility_mask(visibility)[:tokens]
    if tokens == visibility.source_tokens:
        mask_LM = mask_LM[:, :tokens]
    elif visibility.scale_aligned:
        keys = splash.padded_keys(mask_LM.shape[1])
        k_BHLD, v_BHLD = (_padded(visibility.all_keys(x[:, :, :tokens]), keys) for x in (k_BHLD, v_BHLD))
    return splash.masked_attention(q_BHLD, k_BHLD, v_BHLD, mask_LM, interpret=interpret)


def grouped_attention(
    q_BHLD: jax.Array,
    k_BHLD: jax.Array,
    v_BHLD: jax.Array,
    visibility: Visibility,
    implementation: str = "cudnn",
    small: int = SMALL_GROUP,
) -> jax.Array:
    """`prefix_attention` by one call of a kernel without a mask for each large scale; small ones share a plain matmul.

    cuDNN takes a mask as a dense bias to add, whose lengths must be even. The small scales are 7 % of the pairs of
    query and key at 512 px. `implementation` is as of `cudnn.full_attention`.
    """
    if q_BHLD.shape[2] > visibility.source_tokens:
        k_BHLD, v_BHLD = visibility.all_keys(k_BHLD), visibility.all_keys(v_BHLD)
    outputs = []
    for group in query_groups(visibility, q_BHLD.shape[2], small):
        queries = q_BHLD[:, :, group.queries]
        keys, values = (
            jnp.concatenate([x_BHMD[:, :, piece] for piece in group.keys], axis=2) for x_BHMD in (k_BHLD, v_BHLD)
        )
        if group.mask is None and queries.shape[2] >= small:
            outputs.append(cudnn.full_attention(queries, keys, values, None, "attention", implementation))
        else:
            masked = jax.checkpoint(functools.partial(attend, mask_LM=group.mask), prevent_cse=False)
            outputs.append(checkpoint_name(masked(queries, keys, values), "attention"))
    return jnp.concatenate(outputs, axis=2)


def blocked_attention(q_BHLD: jax.Array, k_BHLD: jax.Array, v_BHLD: jax.Array, visibility: Visibility) -> jax.Array:
    """`prefix_attention` by `blocked.grouped_attention`; every scale is a group of its own."""
    if q_BHLD.shape[2] > visibility.source_tokens:
        k_BHLD, v_BHLD = visibility.all_keys(k_BHLD), visibility.all_keys(v_BHLD)
    groups = tuple(
        blocked.Group((group.queries.start, group.queries.stop), tuple((keys.start, keys.stop) for keys in group.keys))
        for group in query_groups(visibility, q_BHLD.shape[2], small=0)
    )
    return blocked.grouped_attention(q_BHLD, k_BHLD, v_BHLD, None, groups)


def self_attention(
    q_BHLD: jax.Array,
    k_BHLD: jax.Array,
    v_BHLD: jax.Array,
    visibility: Visibility,
    tokens: int,
    kernel: Kernel,
    remat: bool = False,
) -> jax.Array:
    """`prefix_attention` of the first `tokens` by `kernel`; padding may follow, there and in the result.

    Each device works on the examples and heads that it holds, over all tokens.
    """
    if kernel == "splash":
        by_splash = functools.partial(splash_attention, interpret=platform() != "tpu")
        return per_shard(functools.partial(by_splash, visibility=visibility, tokens=tokens), q_BHLD, k_BHLD, v_BHLD)
    functions: dict[Kernel, Callable[..., jax.Array]] = {
        "plain": functools.partial(prefix_attention, remat=remat),
        "blocked": blocked_attention,
        "cudnn": grouped_attention,
    }
    real = (x[:, :, :tokens] for x in (q_BHLD, k_BHLD, v_BHLD))
    return _padded(per_shard(functools.partial(functions[kernel], visibility=visibility), *real), q_BHLD.shape[2])


def _padded(x: jax.Array, tokens: int) -> jax.Array:
    """Zeros behind the tokens [..., L, D], until there are `tokens`."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, tokens - x.shape[-2]), (0, 0)])


def scale_attention(
    q_BHLD: jax.Array,
    k_BHLD: jax.Array,
    v_BHLD: jax.Array,
    cache: Cache,
    layer: jax.Array,
    visibility: Visibility,
    scale: int,
    kernel: Kernel,
) -> jax.Array:
    """Attention of the tokens of one scale to themselves and to what they see of a cache, by `kernel`: [B, H, L, D].

    Each device works on the examples and heads that it holds.
    """
    cache_k, cache_v, seen = cache.k, cache.v, visibility.source_tokens + visibility.pyramid.offsets[scale]
    if not visibility.is_prefix:  # a copy of what one layer sees
        stop = visibility.pyramid.offsets[scale]
        keys, values = (visibility.keys(x[layer], scale, stop) for x in (cache_k, cache_v))
        seen, layer = keys.shape[2], jnp.int32(0)
        room = cached.cache_tokens(seen) if kernel == "splash" else seen
        cache_k, cache_v = (_padded(x, room)[None] for x in (keys, values))
    functions: dict[Kernel, Callable[..., jax.Array]] = {
        "plain": cached.by_parts,
        "blocked": cached.by_parts,
        "splash": functools.partial(cached.by_pallas, interpret=platform() != "tpu"),
        "cudnn": cached.by_cudnn,
    }
    attention = functools.partial(functions[kernel], seen=seen)
    return per_shard(attention, q_BHLD, k_BHLD, v_BHLD, cache_k, cache_v, layer)


def cross_attention(
    q_BHLD: jax.Array,
    k_BHTD: jax.Array,
    v_BHTD: jax.Array,
    mask_BT: jax.Array,
    kernel: Kernel,
    remat: bool = False,
    implementation: str = "cudnn",
) -> jax.Array:
    """Attention to the text, whose real tokens come first, by `kernel`; each device as in `self_attention`.

    With `remat` the backward pass of plain attention recomputes its scores. `implementation` is as of
    `cudnn.full_attention`.
    """

    def by_splash(q: jax.Array, k: jax.Array, v: jax.Array, mask_BT: jax.Array) -> jax.Array:
        every = np.ones((q.shape[2], k.shape[2]), bool)
        return splash.masked_attention(q, k, v, every, mask_BT, name="cross_attention", interpret=platform() != "tpu")

    def by_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask_BT: jax.Array) -> jax.Array:
        real_B = jnp.sum(mask_BT, axis=1, dtype=jnp.int32)
        return cudnn.full_attention(q, k, v, real_B, "cross_attention", implementation)

    def by_blocks(q: jax.Array, k: jax.Array, v: jax.Array, mask_BT: jax.Array) -> jax.Array:
        every = (blocked.Group((0, q.shape[2]), ((0, k.shape[2]),)),)
        return blocked.grouped_attention(q, k, v, mask_BT, every, "cross_attention")

    functions: dict[Kernel, Callable[..., jax.Array]] = {
        "plain": jax.checkpoint(attend, prevent_cse=False) if remat else attend,
        "blocked": by_blocks,
        "splash": by_splash,
        "cudnn": by_cudnn,
    }
    output_BHLD = per_shard(functions[kernel], q_BHLD, k_BHTD, v_BHTD, mask_BT)
    # A kernel's output has the name already, together with what else its backward pass needs.
    return checkpoint_name(output_BHLD, "cross_attention") if kernel == "plain" else output_BHLD


def _normalized(x: jax.Array) -> jax.Array:
    """L2 norm 1 over the last axis, in float32."""
    x = x.astype(jnp.float32)
    norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
    return x / norm


def kernel_init(scale: float = 1.0) -> Callable[..., jax.Array]:
    """Truncated normal of standard deviation `scale` / sqrt(fan in) before truncation; the input axis comes first.

    JAX's `variance_scaling` is another one: it widens the normal so that the deviation holds after truncation.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        deviation = scale * shape[0] ** -0.5
        return jax.random.truncated_normal(key, -2, 2, shape, dtype) * jnp.asarray(deviation, dtype)

    return init


def _by_heads(x_BHLD: jax.Array, name: str) -> jax.Array:
    """Splits it by heads, under a name for `jax.checkpoint`."""
    return checkpoint_name(constrain(x_BHLD, BATCH, "tensor"), name)


class ToHeads(nn.Module):
    """Linear(C, C), split by heads; parameters as of `nn.Dense`."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BLC: jax.Array) -> jax.Array:
        """[B, L, C] -> [B, H, L, D]."""
        config = self.config
        kernel = self.param("kernel", kernel_init(), (config.width, config.width))
        bias = self.param("bias", nn.initializers.zeros, (config.width,))
        out_BHLD = _by_heads(to_heads(x_BLC, kernel, config), "cross_q")
        return add_bias(out_BHLD, bias.reshape(config.heads, config.head_size))


class FromHeads(nn.Module):
    """Linear(C, C) of what heads have attended to; parameters as of `nn.Dense`."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BHLD: jax.Array) -> jax.Array:
        """[B, H, L, D] -> [B, L, C]."""
        config = self.config
        init = kernel_init((2 * config.depth) ** -0.5)
        kernel = self.param("kernel", init, (config.width, config.width))
        bias = self.param("bias", nn.initializers.zeros, (config.width,))
        return add_bias(from_heads(constrain(x_BHLD, BATCH, "tensor"), kernel, config), bias)


class SelfAttention(nn.Module):
    """Cos-attention with 2-D RoPE (model.md, section 6): q and k are normalized; one learned scale per head."""

    config: TransformerConfig
    visibility: Visibility

    @nn.compact
    def __call__(
        self,
        x_BLC: jax.Array,
        rotation_2LD: jax.Array,
        cache: Cache | None = None,
        layer: jax.Array | None = None,
        scale: int | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Attends within the whole sequence, or from one scale to the cache and itself.

        Args:
          x_BLC: tokens: [source, targets] without a cache; the source alone to prefill one; one scale with a cache.
            Padding may follow, which nothing sees.
          rotation_2LD: RoPE cosines and sines of these tokens, without the padding.
          cache: keys and values of the tokens before, of a stack of blocks.
          layer: place of this block in the stack, an int32 scalar; only with a cache.
          scale: which scale x_BLC is; only with a cache.

        Returns:
          (output [B, L, C], keys and values of x_BLC, [B, H, L, D] each, without the padding).
        """
        config = self.config
        heads, head_size, width = config.heads, config.head_size, config.width
        dtype = jnp.dtype(config.dtype)
        qkv_kernel = self.param("qkv_kernel", kernel_init(), (width, 3, heads, head_size))
        q_bias = self.param("q_bias", nn.initializers.zeros, (heads, head_size))
        v_bias = self.param("v_bias", nn.initializers.zeros, (heads, head_size))
        initial_scale = nn.initializers.constant(np.log(config.initial_attention_scale))
        scale_mul = self.param("scale_mul", initial_scale, (heads,))
        x_BLC, tokens = apart(gather_tokens(x_BLC.astype(dtype))), rotation_2LD.shape[1]
        rotation_2LD = jnp.pad(rotation_2LD, ((0, 0), (0, x_BLC.shape[1] - tokens), (0, 0)))
        # One matmul each: their concatenation could not be split over heads.
        q, k, v = (_by_heads(to_heads(x_BLC, qkv_kernel[:, part], config), "qkv") for part in range(3))
        q_scale = jnp.exp(jnp.minimum(scale_mul, MAX_LOG_SCALE))[None, :, None, None]
        q = _normalized(add_bias(q, q_bias)) * q_scale
        k = _normalized(k)
        v = add_bias(v, v_bias)
        q, k = rotate(q, rotation_2LD, dtype), rotate(k, rotation_2LD, dtype)

        kernel = choose(config.attention, head_size, dtype)
        if cache is not None and layer is not None and scale is not None:
            q, k, v = (x[:, :, :tokens] for x in (q, k, v))
            attended_BHLD = scale_attention(q, k, v, cache, layer, self.visibility, scale, kernel)
            output_BHLD = _padded(attended_BHLD, x_BLC.shape[1])
        else:
            output_BHLD = self_attention(q, k, v, self.visibility, tokens, kernel, remat=config.remat != "none")
        output_BLC = apart(FromHeads(config, name="proj")(output_BHLD))
        return checkpoint_name(scatter_tokens(output_BLC), "proj"), k[:, :, :tokens], v[:, :, :tokens]


class CrossAttention(nn.Module):
    """Attention to the text (model.md, section 6); scale 1 / sqrt(D), no positions."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x_BLC: jax.Array,
        memory_BTC: jax.Array,
        mask_BT: jax.Array,
        cache: Cache | None = None,
        layer: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, L, C] and text [B, T, C] -> ([B, L, C], keys and values of the text, [B, H, T, D] each)."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        heads, head_size, width = config.heads, config.head_size, config.width
        q = ToHeads(config, name="q")(apart(gather_tokens(x_BLC.astype(dtype)))) * jnp.asarray(head_size**-0.5, dtype)
        kv_kernel = self.param("kv_kernel", kernel_init(), (width, 2, heads, head_size))
        v_bias = self.param("v_bias", nn.initializers.zeros, (heads, head_size))
        if cache is None or layer is None:
            both = to_keys_and_values(memory_BTC.astype(dtype), kv_kernel, config)
            k, v = (_by_heads(x_BHTD, "cross_kv") for x_BHTD in both)
            v = add_bias(v, v_bias)
        else:
            k, v = cache.text(layer)
        kernel = choose(config.attention, head_size, dtype)
        output_BHLD = cross_attention(q, k, v, mask_BT, kernel, remat=config.remat != "none")
        output_BLC = apart(FromHeads(config, name="proj")(output_BHLD))
        return checkpoint_name(scatter_tokens(output_BLC), "cross_proj"), k, v
