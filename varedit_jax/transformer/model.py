"""The transformer of VAREdit: sequence, blocks, head; teacher-forced or scale by scale (model.md, sections 4 to 6)."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from varedit_jax.config import TransformerConfig
from varedit_jax.parallel.constrain import Gather, batch_only, constrain, gathered, pad_tokens, tokens_between_blocks
from varedit_jax.scales import Grid, Pyramid
from varedit_jax.transformer import rope
from varedit_jax.transformer.attention import Cache, attend, kernel_init
from varedit_jax.transformer.block import Block, plain_norm
from varedit_jax.transformer.kernels import cached, choose, splash
from varedit_jax.transformer.visibility import Visibility


@flax.struct.dataclass
class Caches:
    """Keys and values of all blocks."""

    block_0: Cache  # a stack of one
    blocks: Cache | None  # of the scanned stack; None where the depth is 1

    def first_samples(self, count: int) -> "Caches":
        """The cache of the first `count` samples of the batch."""
        return Caches(self.block_0.first_samples(count), self.blocks and self.blocks.first_samples(count))

    def with_room(self, tokens: int) -> "Caches":
        """The caches padded with zeros up to `tokens`."""
        return Caches(self.block_0.with_room(tokens), self.blocks and self.blocks.with_room(tokens))

    def write(self, new: "Caches", start: int) -> "Caches":
        """The caches with the keys and values of the tokens of `new` from `start` on."""
        blocks = self.blocks and new.blocks and self.blocks.write(new.blocks.k, new.blocks.v, start)
        return Caches(self.block_0.write(new.block_0.k, new.block_0.v, start), blocks)


@flax.struct.dataclass
class TextMemory:
    """The text as the blocks use it."""

    cond_BC: jax.Array  # pooled condition, float32
    memory_BTC: jax.Array  # rows for cross-attention
    mask_BT: jax.Array  # bool, True where a row is real


class TextPool(nn.Module):
    """Attention pooling of the text: one learned query per head (model.md, section 4)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, text_BTE: jax.Array, mask_BT: jax.Array) -> jax.Array:
        """[B, T, E] -> [B, C]."""
        width, heads = self.config.width, self.config.text_pool_heads
        head_size = width // heads
        query = self.param("query", nn.initializers.normal(head_size**-0.5), (heads, head_size))
        kv_kernel = self.param("kv_kernel", kernel_init(), (self.config.text_width, 2, heads, head_size))
        v_bias = self.param("v_bias", nn.initializers.zeros, (heads, head_size))
        kv = text_BTE @ kv_kernel.reshape(text_BTE.shape[-1], -1)
        k, v = (part.reshape(*text_BTE.shape[:2], heads, head_size) for part in jnp.split(kv, 2, axis=-1))
        q = jnp.broadcast_to(query * head_size**-0.5, (text_BTE.shape[0], 1, heads, head_size))
        q_BHLD, k_BHTD, v_BHTD = (jnp.swapaxes(x, 1, 2) for x in (q, k, v + v_bias[None, None]))
        pooled = attend(q_BHLD, k_BHTD, v_BHTD, mask_BT).reshape(text_BTE.shape[0], width)
        return nn.Dense(width, kernel_init=kernel_init(), name="proj")(pooled)


def center_features(grid: Grid) -> np.ndarray:
    """Sines and cosines of the position in the image of each token's center, float32 [tokens, 16].

    Rows and columns run from -1 to 1, with 1/4, 1/2, 1 and 2 periods per unit. The same position has the same features
    on every grid.
    """
    rows, columns = ((np.arange(count) + 0.5) / count * 2 - 1 for count in grid)
    centers_L2 = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
    angles_LF = (centers_L2[:, :, None] * (np.pi / 2 * np.array([1, 2, 4, 8]))).reshape(len(centers_L2), -1)
    return np.concatenate([np.sin(angles_LF), np.cos(angles_LF)], axis=-1).astype(np.float32)


class Transformer(nn.Module):
    """Predicts the bits of every target scale from the source, the text and the coarser scales.

    One set of parameters serves every pyramid; `pyramid` is static.
    """

    config: TransformerConfig
    pyramid: Pyramid
    gather: Gather | None = None  # makes the parameters of a block whole on a mesh

    def setup(self) -> None:
        """Everything but the blocks, which `_blocks` makes."""
        config = self.config
        width = config.width
        deviation = nn.initializers.normal(width**-0.5)
        self.text_norm = nn.RMSNorm(epsilon=1e-6)
        self.text_unconditional = self.param(
            "text_unconditional",
            nn.initializers.normal(config.text_width**-0.5),
            (config.unconditional_rows, config.text_width),
        )
        self.text_pool = TextPool(config)
        self.text_proj_in = nn.Dense(width, kernel_init=kernel_init())
        self.text_proj_out = nn.Dense(width, kernel_init=kernel_init())
        self.pos_start = self.param("pos_start", deviation, (width,))
        self.level_embed = self.param("level_embed", deviation, (config.levels, width))
        if config.absolute_positions:
            self.position_embed = nn.Dense(width, use_bias=False, kernel_init=kernel_init(0.7))
        self.word_embed = nn.Dense(width, kernel_init=kernel_init(config.initial_input_scale))
        self.shared_ada = nn.Dense(6 * width, kernel_init=nn.initializers.zeros)
        self.head_norm = plain_norm()
        self.head_ada = nn.Dense(2 * width, kernel_init=nn.initializers.zeros)
        self.head = nn.Dense(2 * config.token_bits, kernel_init=kernel_init(0.02))

    def embed_text(
        self, features_BTE: jax.Array, length_B: jax.Array, unconditional_B: jax.Array | None = None
    ) -> TextMemory:
        """Text features to the memory that the blocks use.

        Args:
          features_BTE: float32 features of the text encoder, T at most `unconditional_rows`.
          length_B: int, real rows of each sample.
          unconditional_B: bool, True where the learned unconditional rows replace the text, at the same length.
        """
        rows = features_BTE.shape[1]
        if unconditional_B is not None:
            unconditional_BTE = self.text_unconditional[None, :rows]
            features_BTE = jnp.where(unconditional_B[:, None, None], unconditional_BTE, features_BTE)
        mask_BT = jnp.arange(rows)[None] < length_B[:, None]
        text_BTE = self.text_norm(features_BTE)
        cond_BC = self.text_pool(text_BTE, mask_BT)
        memory_BTC = batch_only(self.text_proj_out(nn.gelu(self.text_proj_in(text_BTE), approximate=True)))
        return TextMemory(cond_BC, memory_BTC, mask_BT)

    def __call__(
        self,
        source_BSN: jax.Array,
        inputs_BLN: jax.Array,
        features_BTE: jax.Array,
        length_B: jax.Array,
        unconditional_B: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Teacher-forced logits of all scales: float32 [B, L, N, 2], of values 0 and 1 of every bit.

        Arguments and errors as of `hidden`.
        """
        return self.logits(*self.hidden(source_BSN, inputs_BLN, features_BTE, length_B, unconditional_B, deterministic))

    def hidden(
        self,
        source_BSN: jax.Array,
        inputs_BLN: jax.Array,
        features_BTE: jax.Array,
        length_B: jax.Array,
        unconditional_B: jax.Array | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, jax.Array]:
        """The target tokens after the last block and the pooled text, for `logits`.

        Args:
          source_BSN: float32 source tokens: of the last grid, or of all scales for "full" conditioning.
          inputs_BLN: float32 inputs of scales 1..K-1, L - 1 tokens; scale 0 is fed by the text.
          features_BTE, length_B, unconditional_B: see `embed_text`.
          deterministic: no stochastic depth; otherwise the rng `drop_path` is used.

        Returns:
          (float32 [B, L, C], float32 [B, C]).

        Raises:
          ValueError: if the number of source or input tokens does not fit the pyramid.
        """
        source = self.pyramid.source_tokens(self.config.conditioning)
        expected = (source, self.pyramid.target_tokens - 1)
        if (source_BSN.shape[1], inputs_BLN.shape[1]) != expected:
            raise ValueError(
                f"{source_BSN.shape[1]} source and {inputs_BLN.shape[1]} input tokens; the pyramid "
                f"{self.pyramid.grids} with conditioning {self.config.conditioning!r} "
                f"needs {expected[0]} and {expected[1]}"
            )
        text = self.embed_text(features_BTE, length_B, unconditional_B)
        targets_BLC = jnp.concatenate([self._first_token(text), self.word_embed(inputs_BLN)], axis=1)
        targets_BLC += self._embed_levels(range(self.pyramid.scales))
        x_BLC = jnp.concatenate([self._embed_source(source_BSN), targets_BLC], axis=1)
        x_BLC, _ = self._blocks(x_BLC, text, None, slice(None), deterministic=deterministic)
        return x_BLC[:, source:], text.cond_BC

    def prefill(
        self,
        source_BSN: jax.Array,
        features_BTE: jax.Array,
        length_B: jax.Array,
        unconditional_B: jax.Array | None = None,
    ) -> tuple[TextMemory, Caches]:
        """Runs the source through all blocks once: the text memory, and caches with room for all but the last scale."""
        config = self.config
        text = self.embed_text(features_BTE, length_B, unconditional_B)
        _, caches = self._blocks(self._embed_source(source_BSN), text, None, slice(0, source_BSN.shape[1]))
        tokens = source_BSN.shape[1] + self.pyramid.offsets[-2]
        if choose(config.attention, config.head_size, config.dtype) == "splash":
            tokens = cached.cache_tokens(tokens)
        return text, caches.with_room(tokens)

    def decode_scale(
        self, scale: int, inputs_BLN: jax.Array | None, text: TextMemory, caches: Caches
    ) -> tuple[jax.Array, Caches]:
        """Logits of one scale from its inputs (None for scale 0) and the caches: (float32 [B, L_k, N, 2], caches)."""
        x_BLC = self._first_token(text) if inputs_BLN is None else self.word_embed(inputs_BLN)
        x_BLC += self._embed_levels(range(scale, scale + 1))
        source = self.pyramid.source_tokens(self.config.conditioning)
        start, stop = (source + offset for offset in self.pyramid.offsets[scale : scale + 2])
        x_BLC, new = self._blocks(x_BLC, text, caches, slice(start, stop), scale=scale)
        if scale < self.pyramid.scales - 1:  # nobody reads the last scale's keys and values
            caches = caches.write(new, start)
        return self.logits(x_BLC, text.cond_BC), caches

    def _embed_source(self, source_BSN: jax.Array) -> jax.Array:
        scales = self.pyramid.scales
        levels = range(scales) if self.config.conditioning == "full" else range(scales - 1, scales)
        return self.word_embed(source_BSN) + self._embed_levels(levels)

    def _first_token(self, text: TextMemory) -> jax.Array:
        return (text.cond_BC + self.pos_start[None])[:, None]

    def _embed_levels(self, scales: range) -> jax.Array:
        """Embedding of the level of every token of `scales`, and of its position if so configured: [1, tokens, C]."""
        # Not `level_embed[levels]` with an index per token: the SPMD partitioner of jaxlib 0.10.2 gets its gradient, a
        # scatter-add, wrong on a mesh of data 2 x fsdp 2 x tensor 2, where that of level 0 comes out doubled (on CPUs;
        # test_compile_step.py fails with the lookup). On one axis alone it is right.
        width = self.config.width
        rows = [jnp.broadcast_to(self.level_embed[scale], (self.pyramid.lengths[scale], width)) for scale in scales]
        # Replicated: split by tokens, the compiler would gather each scale's rows to concatenate them.
        levels_LC = constrain(jnp.concatenate(rows))
        if not self.config.absolute_positions:
            return levels_LC[None]
        centers_LF = np.concatenate([center_features(self.pyramid.grids[scale]) for scale in scales])
        return (levels_LC + self.position_embed(centers_LF))[None]

    def logits(self, x_BLC: jax.Array, cond_BC: jax.Array) -> jax.Array:
        """The head, in float32: tokens after the last block [B, L, C] and pooled text [B, C] to [B, L, N, 2]."""
        ada_BC = self.head_ada(nn.silu(cond_BC))[:, None]
        scale, shift = jnp.split(ada_BC, 2, axis=-1)
        logits = self.head(self.head_norm(x_BLC) * (1 + scale) + shift)
        return logits.reshape(*logits.shape[:2], self.config.token_bits, 2)

    @nn.compact
    def _blocks(
        self,
        x_BLC: jax.Array,
        text: TextMemory,
        caches: Caches | None,
        tokens: slice,
        scale: int | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, Caches]:
        """All blocks over the tokens `tokens` of the sequence: (x, keys and values of these tokens in each block)."""
        config, pyramid = self.config, self.pyramid
        positions = rope.positions(pyramid, config.conditioning, config.rope_layout)
        rotation_2LD = rope.rotation(positions, config.head_size)[:, tokens]
        ada_B6C = self.shared_ada(nn.silu(text.cond_BC)).reshape(-1, 6, config.width)
        drop_rates = jnp.linspace(0, config.drop_path, config.depth)
        # Without a cache the backward pass needs the blocks' activations, unless it recomputes them.
        remat = config.remat if caches is None else "none"
        shared = (ada_B6C, text.memory_BTC, text.mask_BT, rotation_2LD)

        aligned = Visibility(pyramid, config.conditioning, scale_aligned=config.conditioning == "sar")
        first = self._block("block_0", remat)(config, aligned, scale, deterministic, name="block_0")
        count = x_BLC.shape[1]
        # Once, for all kernels of all blocks.
        splash_tokens = caches is None and choose(config.attention, config.head_size, config.dtype) == "splash"
        padded = splash.padded_tokens(count, config.width) if splash_tokens else count
        x_BLC = tokens_between_blocks(pad_tokens(x_BLC, padded))
        x_BLC, new_0 = first(x_BLC, drop_rates[0], caches and jnp.int32(0), caches and caches.block_0, *shared)
        first_cache, cache = Cache(*(x[None] for x in new_0)), None
        if config.depth > 1:
            plain = Visibility(pyramid, config.conditioning, scale_aligned=False)
            scanned = nn.scan(
                self._block("blocks", remat),
                variable_axes={"params": 0},
                split_rngs={"params": True, "drop_path": True},
                in_axes=(0, 0, nn.broadcast, *[nn.broadcast] * len(shared)),
                length=config.depth - 1,
            )
            rest = scanned(config, plain, scale, deterministic, name="blocks")
            layers = caches and jnp.arange(config.depth - 1, dtype=jnp.int32)
            x_BLC, new = rest(x_BLC, drop_rates[1:], layers, caches and caches.blocks, *shared)
            cache = Cache(*new)
        return x_BLC[:, :count], Caches(first_cache, cache)

    def _block(self, name: str, remat: str) -> type[Block]:
        """The class of the blocks `name`: parameters gathered on a mesh, activations rematerialized as `remat` says."""
        config = self.config
        # Gathered inside of what is rematerialized: the backward pass gathers again instead of keeping them.
        block = gathered(
            Block, name, None if self.is_initializing() else self.gather, config.dtype, config.gradient_dtype
        )
        if remat == "none":
            return block
        policy = jax.checkpoint_policies.save_only_these_names(*config.remat_saved) if remat == "named" else None
        # Outside of a scan the compiler would eliminate the recomputation as a common subexpression.
        return nn.remat(block, prevent_cse=name == "block_0", policy=policy)
