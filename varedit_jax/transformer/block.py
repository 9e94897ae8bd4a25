"""One transformer block: self-attention, cross-attention, feed-forward (model.md, section 6)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from varedit_jax.config import TransformerConfig
from varedit_jax.parallel.constrain import constrain, gather_tokens, scatter_tokens, tokens_between_blocks
from varedit_jax.parallel.mesh import BATCH
from varedit_jax.transformer.attention import Cache, CrossAttention, SelfAttention, kernel_init
from varedit_jax.transformer.kernels import apart
from varedit_jax.transformer.products import Dense
from varedit_jax.transformer.visibility import Visibility


def plain_norm() -> nn.LayerNorm:
    """Layer norm over the last axis without affine parameters, eps 1e-6, in float32."""
    # Not the fast variance, E[x^2] - E[x]^2: it cancels where the mean is large.
    return nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, use_bias=False, use_scale=False, use_fast_variance=False)


class MLP(nn.Module):
    """Linear(C, 4C), tanh-GELU, Linear(4C, C)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BLC: jax.Array) -> jax.Array:
        """[B, L, C] -> [B, L, C]."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        h_BLF = Dense(config, 4 * config.width, kernel_init(), name="fc1")(apart(gather_tokens(x_BLC.astype(dtype))))
        h_BLF = checkpoint_name(constrain(h_BLF, BATCH, None, "tensor"), "fc1")
        h_BLF = nn.gelu(h_BLF, approximate=True)
        out_init = kernel_init((2 * config.depth) ** -0.5)
        h_BLC = apart(Dense(config, config.width, out_init, name="fc2")(h_BLF))
        return checkpoint_name(scatter_tokens(h_BLC), "fc2")


def _initial_ada(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Branches open (gamma 1), modulation off (scale and shift 0)."""
    del key
    return jnp.zeros(shape, dtype).at[:2].set(1)


LayerKeys = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # k, v, text_k, text_v of one block, [B, H, tokens, D]


class Block(nn.Module):
    """x += gamma1 SA(..); x += CA(..); x += gamma2 MLP(..) (model.md, section 6), the residual stream in float32."""

    config: TransformerConfig
    visibility: Visibility
    scale: int | None = None  # which scale the tokens are, when a cache is given
    deterministic: bool = True  # no stochastic depth

    @nn.compact
    def __call__(
        self,
        x_BLC: jax.Array,
        drop_rate: jax.Array,
        layer: jax.Array | None,
        cache: Cache | None,
        ada_B6C: jax.Array,
        memory_BTC: jax.Array,
        mask_BT: jax.Array,
        rotation_2LD: jax.Array,
    ) -> tuple[jax.Array, LayerKeys]:
        """One block over the whole sequence, over the source to prefill a cache, or over one scale with a cache.

        Args:
          x_BLC: float32 tokens.
          drop_rate: scalar, probability of leaving out a branch (stochastic depth) of a sample; training only.
          layer: place of the block in its stack, an int32 scalar; None without a cache.
          cache: of what came before in all blocks of the stack; None if there is none.
          ada_B6C: SiLU(cond) through the linear map all blocks share: gamma1, gamma2, scale1, scale2, shift1, shift2.
          memory_BTC, mask_BT: text to attend to, and which of its rows are real.
          rotation_2LD: RoPE of these tokens.

        Returns:
          (x_BLC, the keys and values of these tokens and of the text).
        """
        config = self.config
        ada_gss = self.param("ada_gss", _initial_ada, (6, config.width))
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (
            row[:, None, :] for row in jnp.moveaxis(ada_gss[None] + ada_B6C, 1, 0)
        )

        def drop_path(branch_BLC: jax.Array) -> jax.Array:
            if self.deterministic or config.drop_path == 0:
                return branch_BLC
            keep = jax.random.bernoulli(self.make_rng("drop_path"), 1 - drop_rate, (branch_BLC.shape[0], 1, 1))
            return jnp.where(keep, branch_BLC / (1 - drop_rate), 0)

        attention = SelfAttention(config, self.visibility, name="self_attention")
        h_BLC, k, v = attention(plain_norm()(x_BLC) * (1 + scale1) + shift1, rotation_2LD, cache, layer, self.scale)
        x_BLC += drop_path(h_BLC.astype(jnp.float32) * gamma1)

        cross_norm = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name="cross_norm")
        cross = CrossAttention(config, name="cross_attention")
        h_BLC, text_k, text_v = cross(cross_norm(x_BLC), memory_BTC, mask_BT, cache, layer)
        x_BLC += h_BLC.astype(jnp.float32)

        h_BLC = MLP(config, name="mlp")(plain_norm()(x_BLC) * (1 + scale2) + shift2)
        x_BLC += drop_path(h_BLC.astype(jnp.float32) * gamma2)
        return tokens_between_blocks(x_BLC), (k, v, text_k, text_v)
