"""Attention under a static mask by the splash kernel for TPUs, which skips blocks of scores that no query sees."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, SegmentIds, make_splash_mha

LANES = 128  # block sizes are multiples of it
LARGEST_BLOCK = 512  # tokens; blocks of 1024 save nothing


def block_size(tokens: int) -> int:
    """Tokens per block: the fewest blocks of at most LARGEST_BLOCK that cover `tokens`, at their smallest size."""
    blocks = -(-tokens // LARGEST_BLOCK)
    return -(-tokens // (blocks * LANES)) * LANES


def masked_attention(
    q_BLHD: jax.Array,
    k_BMHD: jax.Array,
    v_BMHD: jax.Array,
    mask_LM: np.ndarray,
    mask_BM: jax.Array | None = None,
    *,
    name: str = "attention",
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention of each query to the keys its row of the mask shows: [B, L, H, D]. No scaling.

    The residuals for the backward pass (output and log-sum-exp) have a name for `jax.checkpoint`; where they are not
    saved the kernel runs again.

    Args:
      q_BLHD, k_BMHD, v_BMHD: queries, already scaled; keys; values.
      mask_LM: bool, numpy; every row shows a key.
      mask_BM: bool, True where a key is real; None if all are.
      name: of the residuals.
      interpret: run the kernel as ordinary operations, on any platform, slowly.
    """
    queries, keys = mask_LM.shape
    q_block, k_block = block_size(queries), block_size(keys)
    sizes = BlockSizes(
        block_q=q_block,
        block_kv=k_block,
        block_q_dkv=q_block,
        block_kv_dkv=k_block,
        block_q_dq=q_block,
        block_kv_dq=k_block,
    )
    more_q, more_k = -queries % q_block, -keys % k_block
    # Padded keys are never seen; padded queries see what the last query does, for a row without keys has no softmax.
    mask_LM = np.pad(np.pad(mask_LM, ((0, more_q), (0, 0)), mode="edge"), ((0, 0), (0, more_k)))
    kernel = make_splash_mha(
        mask_LM[None],  # one mask serves all heads
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=name,
        interpret=interpret,
    )

    def heads_first(x_BLHD: jax.Array, more: int) -> jax.Array:
        return jnp.pad(jnp.swapaxes(x_BLHD, 1, 2), ((0, 0), (0, 0), (0, more), (0, 0)))

    segments = None
    if mask_BM is not None:  # queries see the keys of their own segment, 1
        real_BM = jnp.pad(mask_BM, ((0, 0), (0, more_k))).astype(jnp.int32)
        segments = SegmentIds(jnp.ones((len(q_BLHD), queries + more_q), jnp.int32), real_BM)
    arrays = heads_first(q_BLHD, more_q), heads_first(k_BMHD, more_k), heads_first(v_BMHD, more_k)
    out_BHLD = jax.vmap(kernel)(*arrays, segments)
    return jnp.swapaxes(out_BHLD[:, :, :queries], 1, 2)
