"""The transformer of VAREdit: sequence, blocks, head; teacher-forced or scale by scale (model.md, sections 4 to 6)."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from varedit_jax.config import TransformerConfig
from varedit_jax.parallel.constrain import batch_only, constrain, has_mesh, pad_tokens, tokens_between_blocks
from varedit_jax.parallel.rules import gather
from varedit_jax.scales import Grid, Pyramid
from varedit_jax.transformer import rope
from varedit_jax.transformer.attention import Visibility, attend, kernel_init
from varedit_jax.transformer.block import Block, layer_norm

Caches = dict[str, Any]


@flax.struct.dataclass
class TextMemory:
    """The text as the blocks use it."""

    cond_BC: jax.Array  # pooled condition, float32
    memory_BTC: jax.Array  # rows for cross-attention
    mask_BT: jax.Array  # bool, True where a row is real


class TextPool(nn.Module):
    """Attention pooling of the text: one learned query a head (model.md, section 4)."""

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
        pooled = attend(q, k, v + v_bias[None, None], mask_BT).reshape(text_BTE.shape[0], width)
        return nn.Dense(width, kernel_init=kernel_init(), name="proj")(pooled)


def center_features(grid: Grid) -> np.ndarray:
    """Sines and cosines of where the center of each token of a grid lies in the image, float32 [tokens, 16].

    Rows and columns run from -1 to 1, with 1/4, 1/2, 1 and 2 periods a unit. The same place has the same features on
    every grid.
    """
    rows, columns = ((np.arange(count) + 0.5) / count * 2 - 1 for count in grid)
    places_L2 = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
    angles_LF = (places_L2[:, :, None] * (np.pi / 2 * np.array([1, 2, 4, 8]))).reshape(len(places_L2), -1)
    return np.concatenate([np.sin(angles_LF), np.cos(angles_LF)], axis=-1).astype(np.float32)


class Transformer(nn.Module):
    """Predicts the bits of every target scale from the source, the text and the coarser scales.

    One set of parameters serves every pyramid; `pyramid` is static.
    """

    config: TransformerConfig
    pyramid: Pyramid

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
        self.head_ada = nn.Dense(2 * width, kernel_init=nn.initializers.zeros)
        self.head = nn.Dense(2 * config.token_bits, kernel_init=kernel_init(0.02))

    def embed_text(
        self, features_BTE: jax.Array, length_B: jax.Array, unconditional_B: jax.Array | None = None
    ) -> TextMemory:
        """Text features to what the blocks use.

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
        """The target tokens after the last block, and the pooled text: what `logits` takes.

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
        targets_BLC += self._places(range(self.pyramid.scales))
        x_BLC = jnp.concatenate([self._embed_source(source_BSN), targets_BLC], axis=1)
        x_BLC, _ = self._blocks(x_BLC, text, None, slice(None), deterministic=deterministic)
        return x_BLC[:, source:], text.cond_BC

    def start(
        self,
        source_BSN: jax.Array,
        features_BTE: jax.Array,
        length_B: jax.Array,
        unconditional_B: jax.Array | None = None,
    ) -> tuple[TextMemory, Caches]:
        """Runs the source through all blocks once: the text memory, and caches with room for all but the last scale."""
        text = self.embed_text(features_BTE, length_B, unconditional_B)
        source = source_BSN.shape[1]
        _, caches = self._blocks(self._embed_source(source_BSN), text, None, slice(0, source))
        room = self.pyramid.offsets[-2]

        def make_room(path: tuple[jax.tree_util.DictKey, ...], x: jax.Array) -> jax.Array:
            if path[-1].key not in ("k", "v"):
                return x
            padding = [(0, 0)] * x.ndim
            padding[-3] = (0, room)
            return jnp.pad(x, padding)

        return text, jax.tree_util.tree_map_with_path(make_room, caches)

    def decode_scale(
        self, scale: int, inputs_BLN: jax.Array | None, text: TextMemory, caches: Caches
    ) -> tuple[jax.Array, Caches]:
        """Logits of one scale from its inputs (None for scale 0) and the caches: (float32 [B, L_k, N, 2], caches)."""
        x_BLC = self._first_token(text) if inputs_BLN is None else self.word_embed(inputs_BLN)
        x_BLC += self._places(range(scale, scale + 1))
        source = self.pyramid.source_tokens(self.config.conditioning)
        start, stop = (source + offset for offset in self.pyramid.offsets[scale : scale + 2])
        x_BLC, new = self._blocks(x_BLC, text, caches, slice(start, stop), scale=scale)
        if scale < self.pyramid.scales - 1:  # nobody reads the last scale's keys and values
            caches = {block: _write(caches[block], new[block], start) for block in caches}
        return self.logits(x_BLC, text.cond_BC), caches

    def _embed_source(self, source_BSN: jax.Array) -> jax.Array:
        scales = self.pyramid.scales
        levels = range(scales) if self.config.conditioning == "full" else range(scales - 1, scales)
        return self.word_embed(source_BSN) + self._places(levels)

    def _first_token(self, text: TextMemory) -> jax.Array:
        return (text.cond_BC + self.pos_start[None])[:, None]

    def _places(self, scales: range) -> jax.Array:
        """Embedding of the level of every token of `scales`, and of its place if configured so: [1, tokens, C]."""
        # Not looked up by an index of tokens: the gradient of that is a scatter, which XLA's partitioner made a wrong
        # one of on a mesh that splits examples and tokens.
        width = self.config.width
        rows = [jnp.broadcast_to(self.level_embed[scale], (self.pyramid.lengths[scale], width)) for scale in scales]
        # Whole everywhere: in pieces by tokens, the compiler would gather each scale's to put them together.
        levels_LC = constrain(jnp.concatenate(rows))
        if not self.config.absolute_positions:
            return levels_LC[None]
        centers_LF = np.concatenate([center_features(self.pyramid.grids[scale]) for scale in scales])
        return (levels_LC + self.position_embed(centers_LF))[None]

    def logits(self, x_BLC: jax.Array, cond_BC: jax.Array) -> jax.Array:
        """The head, in float32: tokens after the last block [B, L, C] and pooled text [B, C] to [B, L, N, 2]."""
        ada_BC = self.head_ada(nn.silu(cond_BC))[:, None]
        scale, shift = jnp.split(ada_BC, 2, axis=-1)
        logits = self.head(layer_norm(x_BLC) * (1 + scale) + shift)
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
        """All blocks over the tokens `tokens` of the sequence: (x, keys and values of these tokens a block)."""
        config, pyramid = self.config, self.pyramid
        positions = rope.positions(pyramid, config.conditioning, config.rope_layout)
        rotation_2LD = rope.rotation(positions, config.head_size)[:, tokens]
        ada_B6C = self.shared_ada(nn.silu(text.cond_BC)).reshape(-1, 6, config.width)
        drop_rates = jnp.linspace(0, config.drop_path, config.depth)
        # Without a cache the backward pass needs the blocks' activations, unless they are made again.
        remat = config.remat if caches is None else "none"
        caches = caches or {"block_0": None, "blocks": None}
        shared = (ada_B6C, text.memory_BTC, text.mask_BT, rotation_2LD)

        aligned = Visibility(pyramid, config.conditioning, scale_aligned=config.conditioning == "sar")
        first = self._block("block_0", remat)(config, aligned, scale, deterministic, name="block_0")
        count = x_BLC.shape[1]
        x_BLC = tokens_between_blocks(pad_tokens(x_BLC))
        x_BLC, first_cache = first(x_BLC, drop_rates[0], caches["block_0"], *shared)
        new = {"block_0": first_cache}
        if config.depth > 1:
            plain = Visibility(pyramid, config.conditioning, scale_aligned=False)
            scanned = nn.scan(
                self._block("blocks", remat),
                variable_axes={"params": 0},
                split_rngs={"params": True, "drop_path": True},
                in_axes=(0, 0, *[nn.broadcast] * len(shared)),
                length=config.depth - 1,
            )
            rest = scanned(config, plain, scale, deterministic, name="blocks")
            x_BLC, new["blocks"] = rest(x_BLC, drop_rates[1:], caches["blocks"], *shared)
        return x_BLC[:, :count], new

    def _block(self, name: str, remat: str) -> type[Block]:
        """The class of the blocks `name`: their parameters come gathered from a mesh, their activations go as told."""
        block: Any = Block
        if has_mesh() and not self.is_initializing():
            # Inside of what is rematerialized: the backward pass gathers them again instead of keeping them.
            block = nn.map_variables(block, "params", gather(f"transformer/{name}/", self.config.dtype))
        if remat == "none":
            return block
        policy = jax.checkpoint_policies.save_only_these_names(*self.config.remat_saved) if remat == "named" else None
        # Outside of a scan the compiler would see that both passes compute the same, and keep it after all.
        return nn.remat(block, prevent_cse=name == "block_0", policy=policy)


def _write(cache: dict[str, jax.Array], new: dict[str, jax.Array], start: int) -> dict[str, jax.Array]:
    """Puts new keys and values into the static buffers at token `start`."""
    return cache | {
        name: jax.lax.dynamic_update_slice_in_dim(cache[name], new[name], start, axis=-3) for name in ("k", "v")
    }
