"""Attention by prefixes: every scale sees one prefix of the sequence, so no mask is ever made (model.md, section 6)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from varedit_jax.config import TransformerConfig
from varedit_jax.scales import Pyramid
from varedit_jax.tokenizer.resize import area_resize
from varedit_jax.transformer.rope import rotate

MAX_LOG_SCALE = float(np.log(100.0))


@dataclasses.dataclass(frozen=True)
class Visibility:
    """What the tokens of each scale may see in one block, as static slices of [source S][targets L]."""

    pyramid: Pyramid
    conditioning: str
    scale_aligned: bool  # this block sees the source area-resized to the scale (block 0 of "sar")

    @property
    def source_tokens(self) -> int:
        """S."""
        return self.pyramid.source_tokens(self.conditioning)

    def source_groups(self) -> list[tuple[slice, slice]]:
        """Query tokens of the source and the keys they see: the source only, never the target."""
        if self.conditioning != "full":
            return [(slice(0, self.source_tokens), slice(0, self.source_tokens))]
        return [(tokens, slice(0, tokens.stop)) for tokens in self.pyramid.slices()]

    def keys(self, x_BMHD: jax.Array, scale: int, target_stop: int) -> jax.Array:
        """Keys (or values) visible to `scale`: its part of the source, then targets [0, target_stop).

        x_BMHD is the buffer [source S][targets ...]; the result is [B, visible, H, D].
        """
        source = self.source_tokens
        if self.scale_aligned:
            reference = self._reference(x_BMHD[:, :source], scale)
        elif self.conditioning == "full":
            reference = x_BMHD[:, : self.pyramid.offsets[scale + 1]]
        else:
            return x_BMHD[:, : source + target_stop]
        return jnp.concatenate([reference, x_BMHD[:, source : source + target_stop]], axis=1)

    def _reference(self, x_BSHD: jax.Array, scale: int) -> jax.Array:
        """The source's keys or values, area-resized per head and channel to the grid of `scale`."""
        batch, _, heads, head_size = x_BSHD.shape
        x_BhwC = x_BSHD.reshape(batch, *self.pyramid.last, heads * head_size)
        resized = area_resize(x_BhwC.astype(jnp.float32), self.pyramid.grids[scale])
        return resized.reshape(batch, -1, heads, head_size).astype(x_BSHD.dtype)


def attend(q_BLHD: jax.Array, k_BMHD: jax.Array, v_BMHD: jax.Array, mask_BM: jax.Array | None = None) -> jax.Array:
    """Softmax attention over all keys, softmax in float32: [B, L, H, D]. No scaling: pre-scale the queries.

    mask_BM: bool, True where a key is real; None if all are.
    """
    logits_BHLM = jnp.einsum("blhd,bmhd->bhlm", q_BLHD, k_BMHD, preferred_element_type=jnp.float32)
    if mask_BM is not None:
        logits_BHLM = jnp.where(mask_BM[:, None, None, :], logits_BHLM, jnp.float32(-1e30))
    weights_BHLM = jax.nn.softmax(logits_BHLM, axis=-1).astype(v_BMHD.dtype)
    return jnp.einsum("bhlm,bmhd->blhd", weights_BHLM, v_BMHD)


def prefix_attention(q_BLHD: jax.Array, k_BLHD: jax.Array, v_BLHD: jax.Array, visibility: Visibility) -> jax.Array:
    """Self-attention of a whole sequence [source S][target scales], one product a scale: [B, S + L, H, D]."""
    outputs = [
        attend(q_BLHD[:, queries], k_BLHD[:, keys], v_BLHD[:, keys]) for queries, keys in visibility.source_groups()
    ]
    source = visibility.source_tokens
    for scale, tokens in enumerate(visibility.pyramid.slices()):
        queries = slice(source + tokens.start, source + tokens.stop)
        keys, values = (visibility.keys(x, scale, tokens.stop) for x in (k_BLHD, v_BLHD))
        outputs.append(attend(q_BLHD[:, queries], keys, values))
    return jnp.concatenate(outputs, axis=1)


def visibility_mask(visibility: Visibility) -> np.ndarray:
    """The same visibility as a dense mask, bool [S + L, S + L]: the slow reference that tests compare against.

    Defined for blocks that are not scale-aligned.
    """
    source, pyramid = visibility.source_tokens, visibility.pyramid
    mask = np.zeros((source + pyramid.target_tokens,) * 2, bool)
    for queries, keys in visibility.source_groups():
        mask[queries, keys] = True
    for scale, tokens in enumerate(pyramid.slices()):
        seen = pyramid.offsets[scale + 1] if visibility.conditioning == "full" else source
        mask[source + tokens.start : source + tokens.stop, :seen] = True
        mask[source + tokens.start : source + tokens.stop, source : source + tokens.stop] = True
    return mask


def _normalized(x: jax.Array) -> jax.Array:
    """L2 norm 1 over the last axis, in float32."""
    x = x.astype(jnp.float32)
    norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
    return x / norm


def kernel_init(scale: float = 1.0) -> Callable[..., jax.Array]:
    """Truncated normal, before truncation of standard deviation `scale` / sqrt(fan in); the input axis comes first."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        deviation = scale * shape[0] ** -0.5
        return jax.random.truncated_normal(key, -2, 2, shape, dtype) * jnp.asarray(deviation, dtype)

    return init


class SelfAttention(nn.Module):
    """Cos-attention with 2-D RoPE: q and k are normalized; one learned scale a head; no bias on k."""

    config: TransformerConfig
    visibility: Visibility

    @nn.compact
    def __call__(
        self,
        x_BLC: jax.Array,
        rotation_2LD: jax.Array,
        cache: dict[str, jax.Array] | None = None,
        scale: int | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Attends within the whole sequence, or from one scale to the cache and itself.

        Args:
          x_BLC: tokens: [source, targets] without a cache; the source alone to fill one; one scale with a cache.
          rotation_2LD: RoPE cosines and sines of these tokens.
          cache: keys `k` and values `v`, [B, S + targets of scales before the last, H, D], of what came before.
          scale: which scale x_BLC is; only with a cache.

        Returns:
          (output [B, L, C], the keys and values of x_BLC, [B, L, H, D] each, for the cache).
        """
        config = self.config
        heads, head_size, width = config.heads, config.head_size, config.width
        dtype = jnp.dtype(config.dtype)
        qkv_kernel = self.param("qkv_kernel", kernel_init(), (width, 3, heads, head_size))
        q_bias = self.param("q_bias", nn.initializers.zeros, (heads, head_size))
        v_bias = self.param("v_bias", nn.initializers.zeros, (heads, head_size))
        initial_scale = nn.initializers.constant(np.log(config.initial_attention_scale))
        scale_mul = self.param("scale_mul", initial_scale, (heads,))
        qkv = x_BLC.astype(dtype) @ qkv_kernel.reshape(width, -1).astype(dtype)
        q, k, v = (part.reshape(*x_BLC.shape[:2], heads, head_size) for part in jnp.split(qkv, 3, axis=-1))
        q_scale = jnp.exp(jnp.minimum(scale_mul, MAX_LOG_SCALE))[None, None, :, None]
        q = _normalized(q + q_bias.astype(dtype)[None, None]) * q_scale
        k = _normalized(k)
        v = v + v_bias.astype(dtype)[None, None]
        q, k = rotate(q, rotation_2LD).astype(dtype), rotate(k, rotation_2LD).astype(dtype)

        if cache is not None and scale is not None:
            seen = self.visibility.pyramid.offsets[scale]
            keys = jnp.concatenate([self.visibility.keys(cache["k"], scale, seen), k], axis=1)
            values = jnp.concatenate([self.visibility.keys(cache["v"], scale, seen), v], axis=1)
            output = attend(q, keys, values)
        elif x_BLC.shape[1] == self.visibility.source_tokens:
            groups = self.visibility.source_groups()
            output = jnp.concatenate([attend(q[:, a], k[:, b], v[:, b]) for a, b in groups], axis=1)
        else:
            output = prefix_attention(q, k, v, self.visibility)
        output = output.reshape(*x_BLC.shape[:2], width)
        proj_init = kernel_init((2 * config.depth) ** -0.5)
        output = nn.Dense(width, dtype=dtype, kernel_init=proj_init, name="proj")(output)
        return output, {"k": k, "v": v}


class CrossAttention(nn.Module):
    """Attention to the text; scale 1 / sqrt(D), no positions."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x_BLC: jax.Array,
        memory_BTC: jax.Array,
        mask_BT: jax.Array,
        cache: dict[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """[B, L, C] and text [B, T, C] -> ([B, L, C], the text's keys and values [B, T, H, D] for the cache)."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        heads, head_size, width = config.heads, config.head_size, config.width
        q = nn.Dense(width, dtype=dtype, kernel_init=kernel_init(), name="q")(x_BLC)
        q = q.reshape(*x_BLC.shape[:2], heads, head_size) * jnp.asarray(head_size**-0.5, dtype)
        kv_kernel = self.param("kv_kernel", kernel_init(), (width, 2, heads, head_size))
        v_bias = self.param("v_bias", nn.initializers.zeros, (heads, head_size))
        if cache is None:
            kv = memory_BTC.astype(dtype) @ kv_kernel.reshape(width, -1).astype(dtype)
            k, v = (part.reshape(*memory_BTC.shape[:2], heads, head_size) for part in jnp.split(kv, 2, axis=-1))
            cache = {"text_k": k, "text_v": v + v_bias.astype(dtype)[None, None]}
        output = attend(q, cache["text_k"], cache["text_v"], mask_BT).reshape(*x_BLC.shape[:2], width)
        proj_init = kernel_init((2 * config.depth) ** -0.5)
        return nn.Dense(width, dtype=dtype, kernel_init=proj_init, name="proj")(output), cache
