"""Attention under a static mask by the splash kernel for TPUs, which skips tiles of scores that no query sees."""

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from varedit_jax.lazy import LazyModule
from varedit_jax.transformer.kernels import cores

if TYPE_CHECKING:
    from jax.experimental.pallas.ops.tpu import splash_attention
else:
    splash_attention = LazyModule("jax.experimental.pallas.ops.tpu.splash_attention")

LANES = 128  # lengths and block sizes are multiples of it
LARGEST_BLOCK = 1024  # tokens; of larger ones, too few tiles can be skipped
LARGEST_COMPUTED = 512  # keys of a block whose scores are computed at once, if there are as many that divide it
VMEM_BYTES = 14 * 2**20  # that the arrays of a tile may take, of the 16 MiB that the compiler gives a kernel
# Costs are in scores of the forward pass, for a head of 128 channels, at half of the 230 TFLOP/s of one core of v5p.
# A step of a kernel's grid takes 0.35 us, by the Pallas guide.
STEP_SCORES = 79_000
# Matmuls per score of the three kernels, relative to the two of the forward pass.
_DKV, _DQ, _FUSED = 2.0, 1.5, 2.5
# One token's share of the gradient of q, for each block of keys: written (256 bytes at 2.8 TB/s), and, of several
# blocks, summed (libtpu 0.0.42 estimates 2.7 ms for seven of 4 x 28 x 3584 tokens; to read them takes a tenth of that).
_WRITE_SCORES, _SUM_SCORES = 20, 430
# Matmuls with parameters of a token, in scores of all heads: 14 C^2 multiply-adds over 2 C.
_LINEAR_SCORES_PER_WIDTH = 7


def _blocks(tokens: int) -> list[int]:
    """Block sizes that divide `tokens`, a multiple of LANES, largest first."""
    lanes = tokens // LANES
    most = LARGEST_BLOCK // LANES
    return [LANES * part for part in range(min(lanes, most), 0, -1) if lanes % part == 0]


def _computed(block: int) -> int:
    """Keys of a block whose scores are computed at once: not so few that the matmuls are small."""
    size = next(size for size in _blocks(block) if size <= LARGEST_COMPUTED)
    return block if size == LANES else size


class Tiles(NamedTuple):
    """Blocks of queries and keys of one kernel, and the cost in scores of the forward pass."""

    q: int
    kv: int
    cost: float


def _vmem(q: int, kv: int, arrays: int) -> int:
    """Bytes of a tile: `arrays` of bfloat16 per side, double buffered, three of float32 scores, the mask."""
    scores = 3 * 4 * q * _computed(kv)
    return scores + 2 * q * kv + 2 * 2 * arrays * (q + kv) * LANES


def _fitting(queries: int, keys: int, arrays: int) -> Iterator[tuple[int, int]]:
    for q in _blocks(queries):
        for kv in _blocks(keys):
            if _vmem(q, kv, arrays) <= VMEM_BYTES:
                yield q, kv


Seen = Callable[[int, int], int]  # (block of queries, block of keys) -> tiles with a score that some query sees


def seen_tiles(mask_LM: np.ndarray) -> Seen:
    """The tiles of a mask that a kernel has to compute."""
    rows, columns = mask_LM.shape

    def count(q: int, kv: int) -> int:
        return int(mask_LM.reshape(rows // q, q, columns // kv, kv).any(axis=(1, 3)).sum())

    return count


def forward_tiles(shape: tuple[int, int], seen: Seen, matmuls: float = 1.0) -> Tiles:
    """The cheapest blocks of a kernel that visits the seen tiles alone: the forward pass, or that of q's gradient."""
    tiles = [Tiles(q, kv, seen(q, kv) * (matmuls * q * kv + STEP_SCORES)) for q, kv in _fitting(*shape, arrays=2)]
    return min(tiles, key=lambda choice: choice.cost)


def backward_tiles(shape: tuple[int, int], seen: Seen) -> tuple[Tiles, Tiles | None]:
    """The cheapest blocks of the backward pass: of the keys' kernel, and of q's if it has one of its own.

    The fused kernel computes scores once instead of twice, but writes the gradient of q once for each block of keys,
    and visits the tiles that it need not compute.
    """
    rows, columns = shape
    fused, keys = [], []
    for q, kv in _fitting(rows, columns, arrays=4):
        tiles, blocks = seen(q, kv), columns // kv
        visits = rows // q * blocks
        partials = blocks * rows * (_WRITE_SCORES + (_SUM_SCORES if blocks > 1 else 0))
        fused.append(Tiles(q, kv, tiles * _FUSED * q * kv + visits * STEP_SCORES + partials))
        keys.append(Tiles(q, kv, tiles * (_DKV * q * kv + STEP_SCORES)))
    best, own = (min(choices, key=lambda choice: choice.cost) for choices in (fused, keys))
    queries = forward_tiles(shape, seen, _DQ)
    return (best, None) if best.cost <= own.cost + queries.cost else (own, queries)


@functools.cache
def padded_tokens(tokens: int, width: int) -> int:
    """Tokens that a sequence is padded to for the kernel: the cheapest multiple of LANES.

    A longer sequence may have larger blocks, but costs matmuls of `width` channels with parameters. Every query is
    taken to see every key: how many tiles are seen depends little on their sizes.
    """
    lengths = [LANES * lanes for lanes in range(-(-tokens // LANES), -(-tokens // LANES) + LARGEST_BLOCK // LANES)]

    def cost(length: int) -> float:
        def every(q: int, kv: int) -> int:
            return (length // q) * (length // kv)

        shape = (length, length)
        forward, (keys, queries) = forward_tiles(shape, every), backward_tiles(shape, every)
        attention = forward.cost + keys.cost + (queries.cost if queries else 0)
        # Forward and backward matmuls are three; a head has LANES channels.
        return attention * (width // LANES) + 3 * length * _LINEAR_SCORES_PER_WIDTH * width * (width // LANES)

    return min(lengths, key=cost)


def padded_keys(keys: int) -> int:
    """Keys that a kernel gets: the cheapest multiple of LANES or of larger blocks."""
    return min(
        (-(-keys // block) * block for block in range(LANES, LARGEST_BLOCK + 1, LANES)),
        key=lambda length: (length // _blocks(length)[0]) * (_blocks(length)[0] * length + STEP_SCORES),
    )


def block_sizes(mask_LM: np.ndarray) -> "splash_attention.BlockSizes":
    """The blocks of all kernels for a mask whose sides are multiples of LANES."""
    shape, seen = (mask_LM.shape[0], mask_LM.shape[1]), seen_tiles(mask_LM)
    forward, (keys, queries) = forward_tiles(shape, seen), backward_tiles(shape, seen)
    return splash_attention.BlockSizes(
        block_q=forward.q,
        block_kv=forward.kv,
        block_kv_compute=_computed(forward.kv),
        block_q_dkv=keys.q,
        block_kv_dkv=keys.kv,
        block_kv_dkv_compute=_computed(keys.kv),
        block_q_dq=queries.q if queries else None,
        block_kv_dq=queries.kv if queries else None,
        use_fused_bwd_kernel=queries is None,
    )


def masked_attention(
    q_BHLD: jax.Array,
    k_BHMD: jax.Array,
    v_BHMD: jax.Array,
    mask_LM: np.ndarray,
    mask_BM: jax.Array | None = None,
    *,
    name: str = "attention",
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention of each query to the keys its row of the mask shows: [B, H, L, D]. No scaling.

    The residuals for the backward pass (output and log-sum-exp) have a name for `jax.checkpoint`; where they are not
    saved the kernel runs again.

    Args:
      q_BHLD, k_BHMD, v_BHMD: queries, already scaled; keys; values. They may be longer than the mask: nothing sees what
        follows, and what follows sees as the last query does. Lengths of `padded_tokens` and `padded_keys` are not
        padded again.
      mask_LM: bool, numpy; every row shows a key.
      mask_BM: bool, True where a key is real; None if all are.
      name: of the residuals.
      interpret: run the kernel as ordinary operations, on any platform, slowly.
    """
    batch, heads, queries, _ = q_BHLD.shape
    q_BHLD, k_BHMD, v_BHMD = (
        jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % LANES), (0, 0))) for x in (q_BHLD, k_BHMD, v_BHMD)
    )
    rows, keys = q_BHLD.shape[2], k_BHMD.shape[2]
    # A row without keys has no softmax, so padded queries see what the last one does.
    mask_LM = np.pad(mask_LM, ((0, rows - len(mask_LM)), (0, 0)), mode="edge")
    mask_LM = np.pad(mask_LM, ((0, 0), (0, keys - mask_LM.shape[1])))
    # Two cores split a kernel over the batch, and over two groups of heads where the batch is odd.
    groups = cores() if batch % cores() and heads % cores() == 0 else 1
    kernel = splash_attention.make_splash_mha(
        np.broadcast_to(mask_LM, (heads // groups, rows, keys)),
        block_sizes=block_sizes(mask_LM),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=name,
        interpret=interpret,
    )
    segments = None
    if mask_BM is not None:  # queries see the keys of their own segment, 1
        real_BM = jnp.pad(mask_BM, ((0, 0), (0, keys - mask_BM.shape[1]))).astype(jnp.int32)
        segments = splash_attention.SegmentIds(jnp.ones((batch, rows), jnp.int32), real_BM)
    grouped = (x.reshape(batch, groups, heads // groups, *x.shape[2:]) for x in (q_BHLD, k_BHMD, v_BHMD))
    out_BGHLD = jax.vmap(jax.vmap(kernel, in_axes=(0, 0, 0, None)))(*grouped, segments)
    return out_BGHLD.reshape(batch, heads, rows, -1)[:, :, :queries]
