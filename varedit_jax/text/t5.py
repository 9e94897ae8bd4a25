"""The encoder of Flan-T5 (model.md, section 4; Raffel et al., arXiv 1910.10683; gated GELU as in T5 1.1)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from varedit_jax.config import TextConfig
from varedit_jax.parallel.constrain import Gather, batch_only, gathered
from varedit_jax.quantized import Int8, dot


def relative_buckets(distances: np.ndarray, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each signed distance (key position - query position), both directions.

    Half of the `buckets` are for keys after the query. In each half, the first half of the buckets hold one distance
    each, the others grow logarithmically up to `max_distance`; larger distances share the last. Integers in, int32
    of the same shape out. Runs on the host: distances are static, and the bounds between buckets must not depend on
    how an accelerator rounds a logarithm.
    """
    half = buckets // 2
    exact = half // 2
    magnitudes = np.abs(distances)
    # float32, in the order of operations of the published code: it decides the bucket of distances on a bound.
    growth = np.log(np.maximum(magnitudes, 1).astype(np.float32) / np.float32(exact))
    growth = growth / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + growth.astype(np.int32), half - 1)
    return (np.where(magnitudes < exact, magnitudes, far) + half * (distances > 0)).astype(np.int32)


class RelativeBias(nn.Module):
    """Bias of the attention logits by relative position: one learned number per bucket and head."""

    config: TextConfig

    @nn.compact
    def __call__(self, length: int) -> jax.Array:
        """Bias float32 [H, T, T] (head, query, key) of a sequence of `length` T."""
        config = self.config
        table = self.param(
            "table",
            nn.initializers.normal(config.width**-0.5),
            (config.relative_buckets, config.heads),
            jnp.float32,
        )
        distances = np.arange(1 - length, length)
        buckets = relative_buckets(distances, config.relative_buckets, config.relative_max_distance)
        by_distance = table.astype(jnp.float32)[buckets]  # [2T - 1, H]: far smaller than a lookup for every pair
        positions = jnp.arange(length)
        bias_TTH = by_distance[positions[None, :] - positions[:, None] + length - 1]
        return bias_TTH.transpose(2, 0, 1)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * scale in float32, over the last axis."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., E] of any float type to float32 [..., E]."""
        # Not nn.RMSNorm: it multiplies float32 by the scale in the type of the parameters, which strict type promotion
        # refuses for a tree in bfloat16.
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        return x * scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))


class Product(nn.Module):
    """The product of the last `axes` of an array with the first of a kernel; there is no bias."""

    features: tuple[int, ...]
    dtype: DTypeLike  # of the product
    std: float  # of the kernel at `init`
    axes: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., summed over] to [..., *features] of type `dtype`."""
        # Not nn.DenseGeneral: it converts its kernel to an array, which `Int8` is not.
        summed = x.shape[-self.axes :]
        kernel = self.param("kernel", nn.initializers.normal(self.std), (*summed, *self.features))
        x = x.astype(self.dtype)
        if isinstance(kernel, Int8):
            return dot(x, kernel, self.axes)
        dimensions = tuple(range(x.ndim - self.axes, x.ndim)), tuple(range(self.axes))
        return jax.lax.dot_general(x, kernel.astype(self.dtype), (dimensions, ((), ())))


class Attention(nn.Module):
    """Self-attention with a given bias. The logits are not divided by sqrt(D): T5's initialization makes up for it."""

    config: TextConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BTE: jax.Array, bias_HTT: jax.Array, length_B: jax.Array) -> jax.Array:
        """[B, T, E] to [B, T, E] of type `dtype`; keys from `length_B` on are not seen. Logits are float32."""
        config = self.config

        def project(name: str, std: float) -> jax.Array:
            return Product((config.heads, config.head_size), self.dtype, std, name=name)(x_BTE)

        query_BTHD = project("query", (config.width * config.head_size) ** -0.5)
        key_BTHD = project("key", config.width**-0.5)
        value_BTHD = project("value", config.width**-0.5)
        # q k^T per head, without 1 / sqrt(D) (model.md, section 4).
        logits_BHTT = jnp.einsum("BTHD,BMHD->BHTM", query_BTHD, key_BTHD, preferred_element_type=jnp.float32)
        seen_BT = jnp.arange(x_BTE.shape[1])[None, :] < length_B[:, None]
        # A finite number, not -inf: a row of length 0 must not become NaN.
        logits_BHTT = jnp.where(seen_BT[:, None, None, :], logits_BHTT + bias_HTT[None], -1e30)
        weights_BHTT = jax.nn.softmax(logits_BHTT, axis=-1).astype(self.dtype)
        attended_BTHD = jnp.einsum("BHTM,BMHD->BTHD", weights_BHTT, value_BTHD)  # softmax(q k^T + bias) v
        std = (config.heads * config.head_size) ** -0.5
        return Product((config.width,), self.dtype, std, axes=2, name="out")(attended_BTHD)


class MLP(nn.Module):
    """Gated feed-forward layer: down(gelu(gate(x)) * up(x)), GELU by the tanh approximation."""

    config: TextConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BTE: jax.Array) -> jax.Array:
        """[B, T, E] to [B, T, E] of type `dtype`."""

        def dense(name: str, features: int, inputs: int) -> Product:
            return Product((features,), self.dtype, inputs**-0.5, name=name)

        width, mlp_width = self.config.width, self.config.mlp_width
        gate_BTF = nn.gelu(dense("gate", mlp_width, width)(x_BTE), approximate=True)
        up_BTF = dense("up", mlp_width, width)(x_BTE)
        return dense("down", width, mlp_width)(gate_BTF * up_BTF)


class Layer(nn.Module):
    """One layer of the encoder, of the form that `nn.scan` takes. The residual stream is float32."""

    config: TextConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BTE: jax.Array, bias_HTT: jax.Array, length_B: jax.Array) -> tuple[jax.Array, None]:
        """[B, T, E] float32 to the same, and no output beside it."""
        normed_BTE = RMSNorm(name="attention_norm")(x_BTE)
        attended_BTE = Attention(self.config, self.dtype, name="attention")(normed_BTE, bias_HTT, length_B)
        x_BTE = x_BTE + attended_BTE.astype(jnp.float32)
        normed_BTE = RMSNorm(name="mlp_norm")(x_BTE)
        return x_BTE + MLP(self.config, self.dtype, name="mlp")(normed_BTE).astype(jnp.float32), None


class T5Encoder(nn.Module):
    """Flan-T5's encoder: token ids to the features that condition the transformer.

    Parameters, with a leading axis of layers where they belong to one:

        embedding/embedding [V, E]                     layers/mlp_norm/scale [layers, E]
        relative_bias/table [buckets, H]               layers/mlp/{gate,up}/kernel [layers, E, F]
        layers/attention_norm/scale [layers, E]        layers/mlp/down/kernel [layers, F, E]
        layers/attention/{query,key,value}/kernel [layers, E, H, D]
        layers/attention/out/kernel [layers, H, D, E]  final_norm/scale [E]

    They are float32 at `init`, by T5's own rules for training from scratch; a tree cast to bfloat16, or
    with the kernels of its layers in int8, works too. There is no dropout: the encoder is either frozen, or small and
    trained with an editor.
    """

    config: TextConfig
    dtype: DTypeLike = jnp.float32  # of the matmuls; norms, softmax and the residual stream are float32
    gather: Gather | None = None  # makes the parameters of the embedding, or of a layer, whole on a mesh

    @nn.compact
    def __call__(self, ids_BT: jax.Array, length_B: jax.Array) -> jax.Array:
        """Token ids int32 [B, T] and their lengths int32 [B] to features float32 [B, T, E].

        Positions from the length of a row on are neither attended to nor returned: their features are zero.
        """
        config = self.config
        length = ids_BT.shape[1]
        gather = None if self.is_initializing() else self.gather
        embed = gathered(nn.Embed, "embedding", gather, self.dtype, self.dtype)(
            config.vocabulary_size, config.width, embedding_init=nn.initializers.normal(1.0), name="embedding"
        )
        x_BTE = batch_only(embed(ids_BT).astype(jnp.float32))
        bias_HTT = RelativeBias(config, name="relative_bias")(length)
        layers = nn.scan(
            gathered(Layer, "layers", gather, self.dtype, self.dtype),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=config.layers,
        )
        x_BTE, _ = layers(config, self.dtype, name="layers")(x_BTE, bias_HTT, length_B)
        features_BTE = RMSNorm(name="final_norm")(x_BTE)
        valid_BT = jnp.arange(length)[None, :] < length_B[:, None]
        return jnp.where(valid_BT[:, :, None], features_BTE, 0.0)
