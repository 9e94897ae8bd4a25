"""Configurations of models.

Legend of dimension letters, used in the names of arrays everywhere (`tokens_BLC`, `q_BLHD`):

    B  batch                      C  transformer width            K  number of scales
    L  tokens of a sequence       H  attention heads              T  text tokens
    S  source (prefix) tokens     D  attention head size          E  text width
    M  key/value positions        F  feed-forward width           V  vocabulary size
    N  bits per token             Z  tokenizer channels (bits per tokenizer cell)
    h, w  token grid              y, x  pixels or tokenizer cells
"""

import dataclasses
from typing import Literal, get_args

from varedit_jax.config.annotations import Checked, check_least

Conditioning = Literal["sar", "finest", "full"]
RopeLayout = Literal["released", "paper"]
ComputeType = Literal["float32", "bfloat16"]
PixelBudget = Literal["0.06M", "0.25M", "0.60M", "1M"]
# Activations of a block that `remat_saved` can keep, in the order they are computed.
RematName = Literal["qkv", "attention", "proj", "cross_q", "cross_kv", "cross_attention", "cross_proj", "fc1", "fc2"]

PIXEL_BUDGETS: tuple[PixelBudget, ...] = get_args(PixelBudget)
REMAT_NAMES: tuple[RematName, ...] = get_args(RematName)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Checked):
    """Convolutional autoencoder with a binary spherical residual quantizer (model.md, section 2)."""

    bits: int = 32  # channels of the raw feature = bits per tokenizer cell
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4, 4)  # of base_channels, one per level
    base_channels: int = 128  # channels of the finest level
    encoder_blocks: int = 2  # residual blocks per level in the encoder
    decoder_blocks: int = 3  # residual blocks per level in the decoder
    norm_groups: int = 32  # groups of GroupNorm

    def __post_init__(self) -> None:
        super().__post_init__()
        for multiplier in self.channel_multipliers:
            channels = multiplier * self.base_channels
            if channels % self.norm_groups:
                raise ValueError(f"a level of {channels} channels does not divide into norm_groups={self.norm_groups}")

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level, the finest first."""
        return tuple(multiplier * self.base_channels for multiplier in self.channel_multipliers)

    @property
    def stride(self) -> int:
        """Pixels that a tokenizer cell covers along each side."""
        return 2 ** (len(self.channel_multipliers) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(Checked):
    """Flan-T5 encoder (model.md, section 4)."""

    width: int = 2048  # E
    layers: int = 24
    heads: int = 32
    head_size: int = 64
    mlp_width: int = 5120
    vocabulary_size: int = 32128  # V
    relative_buckets: int = 32  # buckets of the relative position bias
    relative_max_distance: int = 128  # tokens; farther pairs share the last bucket
    max_tokens: int = 512  # longer prompts are truncated


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(Checked):
    """Scale-wise causal transformer (model.md, sections 5 and 6)."""

    depth: int = 32
    width: int = 2048  # C
    heads: int = 16  # H
    token_bits: int = 32  # N
    text_width: int = 2048  # E
    unconditional_rows: int = 512  # rows of the learned unconditional text
    levels: int = 15  # rows of the level embedding
    conditioning: Conditioning = "sar"  # part of the source that blocks attend to
    rope_layout: RopeLayout = "released"  # positions of tokens (model.md, "Positions")
    initial_attention_scale: float = 4.0  # factor of the normalized queries in a new model
    initial_input_scale: float = 1.0  # gain of the token embedding in a new model; bits**0.5 gives tokens of size 1
    absolute_positions: bool = False  # learned positions besides RoPE; not in the published models
    drop_path: float = 0.1  # stochastic depth rate of the last block; rises linearly from 0
    dtype: ComputeType = "float32"  # compute type of the blocks; parameters are float32
    # Matmuls of the blocks with their kernels: of operands in `dtype`, or rounded to eight bits (products.py).
    products: Literal["plain", "int8", "fp8"] = "plain"
    products_backward: bool = False  # the matmuls of the tokens' gradients, too; those of the kernels' stay plain
    # Type in which devices sum the gradients of the blocks' kernels: `dtype`, or float32 at twice the bytes.
    gradient_sums: Literal["dtype", "float32"] = "dtype"
    attention: Literal["auto", "plain", "blocked", "splash", "cudnn"] = "auto"  # kernel; auto: by platform
    remat: Literal["none", "named", "full"] = "none"  # activations that the backward pass recomputes
    # Saved with remat="named". The rest is recomputed: fc1, cross-attention except for its keys and values, and the
    # scores of plain attention, together 28 % of the forward pass of 8B at 512 px (32 % with plain attention).
    remat_saved: tuple[RematName, ...] = ("qkv", "attention", "proj", "cross_q", "cross_kv", "cross_proj", "fc2")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "model.transformer.depth", "model.transformer.heads")
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(
                f"width {self.width} over {self.heads} heads gives a head size of "
                f"{self.width / self.heads:g}; it must be a multiple of 4 for 2-D RoPE"
            )
        if self.width % self.text_pool_heads:
            raise ValueError(
                f"width {self.width} does not divide over {self.text_pool_heads} text pooling heads "
                f"(text_width {self.text_width})"
            )

        if self.products_backward and self.products == "plain":
            raise ValueError(
                "products_backward is True with products='plain'; it is for the eight-bit 'int8' and 'fp8'"
            )

    @property
    def head_size(self) -> int:
        """D, channels per head."""
        return self.width // self.heads

    @property
    def gradient_dtype(self) -> ComputeType:
        """Type in which devices sum the gradients of the blocks' kernels."""
        return self.dtype if self.gradient_sums == "dtype" else "float32"

    @property
    def text_pool_heads(self) -> int:
        """Heads of the attention that pools the text (model.md, section 4)."""
        return max(self.text_width // (64 if self.width > 4096 else 128), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditorConfig(Checked):
    """A complete editor: tokenizer, text encoder, transformer and their pyramid."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    text: TextConfig = TextConfig()
    transformer: TransformerConfig = TransformerConfig()
    patchify: bool = False  # tokens are 2x2 patches of tokenizer cells
    pixel_budget: Literal[PixelBudget, ""] = "0.25M"  # row of the published scale schedules; "" with `grids`
    grids: tuple[tuple[int, int], ...] = ()  # custom pyramid of token grids, coarse to fine
    position_scale: int = 1  # distance of RoPE positions on the last of custom `grids`
    quantized_source: bool = False  # condition on the quantized source, as in the paper

    def __post_init__(self) -> None:
        super().__post_init__()
        bits = self.tokenizer.bits * (4 if self.patchify else 1)
        if self.transformer.token_bits != bits:
            raise ValueError(
                f"transformer.token_bits is {self.transformer.token_bits}, but the tokenizer gives {bits} "
                f"({self.tokenizer.bits} bits{', patchified 2x2' if self.patchify else ''})"
            )
        if self.transformer.text_width != self.text.width:
            raise ValueError(
                f"transformer.text_width is {self.transformer.text_width}, but text.width is {self.text.width}"
            )
        if bool(self.grids) == bool(self.pixel_budget):
            raise ValueError(
                f"give either pixel_budget or grids, not both or neither: "
                f"pixel_budget={self.pixel_budget!r}, grids={self.grids!r}"
            )
        if self.position_scale < 1 or (self.position_scale > 1 and not self.grids):
            raise ValueError(
                f"position_scale is {self.position_scale} with grids={self.grids!r}: it must be at least 1, and "
                f"is for own grids; published schedules have their position grid"
            )
        if len(self.grids) > self.transformer.levels:
            raise ValueError(f"{len(self.grids)} scales, but only {self.transformer.levels} level embeddings")

    @property
    def token_stride(self) -> int:
        """Pixels that a transformer token covers along each side."""
        return self.tokenizer.stride * (2 if self.patchify else 1)
