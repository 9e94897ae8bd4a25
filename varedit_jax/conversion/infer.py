"""Configurations read off the shapes of published tensors: nothing has to be told that a file says itself."""

import pathlib
import re
from collections.abc import Mapping

from varedit_jax.config import (
    TOKENIZER_14BIT,
    TOKENIZER_32BIT,
    EditorConfig,
    RopeLayout,
    TextConfig,
    TokenizerConfig,
    TransformerConfig,
)
from varedit_jax.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]  # published name -> shape

FAMILIES: dict[str, RopeLayout] = {"varedit": "released", "infinity": "paper"}


def family_of(path: str) -> str:
    """Whose weights a file is named after, itself or its folder: varedit or infinity; "" if neither says."""
    for name in reversed(pathlib.Path(path).parts[-2:]):
        found = [family for family in FAMILIES if family in name.lower()]
        if len(found) == 1:
            return found[0]
    return ""


def _shape(shapes: Shapes, name: str, part: str) -> tuple[int, ...]:
    if name not in shapes:
        some = ", ".join(list(shapes)[:3])
        raise UserError(f"there is no tensor {name}, which every published {part} has, but {some}, ...; wrong file?")
    return shapes[name]


def _count(shapes: Shapes, pattern: str) -> int:
    """How many numbers a place in a name takes."""
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})


def transformer_config(shapes: Shapes, rope_layout: RopeLayout) -> TransformerConfig:
    """Configuration of a published transformer. Raises UserError if it is none."""
    bits = _shape(shapes, "word_embed.weight", "transformer")[1]
    scale_mul = next((name for name in shapes if name.endswith("sa.scale_mul_1H11")), "")
    rows, text_width = _shape(shapes, "cfg_uncond", "transformer")
    return TransformerConfig(
        depth=sum(name.endswith("sa.scale_mul_1H11") for name in shapes),
        width=_shape(shapes, "pos_start", "transformer")[2],
        heads=_shape(shapes, scale_mul or "block_chunks.0.module.0.sa.scale_mul_1H11", "transformer")[1],
        token_bits=bits,
        text_width=text_width,
        unconditional_rows=rows,
        levels=_shape(shapes, "lvl_embed.weight", "transformer")[0],
        rope_layout=rope_layout,
    )


def tokenizer_config(shapes: Shapes) -> TokenizerConfig:
    """Configuration of a published tokenizer (32 norm groups, as all of them). Raises UserError if it is none."""
    bare = {re.sub(r"\.(conv|norm)\.(weight|bias)$", r".\2", name): shape for name, shape in shapes.items()}
    base = _shape(bare, "encoder.conv_in.weight", "tokenizer")[0]
    levels = range(_count(bare, r"encoder\.down\.(\d+)\."))
    widths = [_shape(bare, f"encoder.down.{level}.block.0.conv1.weight", "tokenizer")[0] for level in levels]
    return TokenizerConfig(
        bits=_shape(bare, "encoder.conv_out.weight", "tokenizer")[0],
        channel_multipliers=tuple(width // base for width in widths),
        base_channels=base,
        encoder_blocks=_count(bare, r"encoder\.down\.0\.block\.(\d+)\."),
        decoder_blocks=_count(bare, r"decoder\.up\.0\.block\.(\d+)\."),
    )


def text_config(shapes: Shapes) -> TextConfig:
    """Configuration of a Flan-T5 encoder. Raises UserError if it is none, or of T5's first version (without a gate)."""
    embedding = "shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight"
    vocabulary, width = _shape(shapes, embedding, "T5 encoder")
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    buckets, heads = _shape(shapes, bias, "T5 encoder")
    return TextConfig(
        width=width,
        layers=_count(shapes, r"encoder\.block\.(\d+)\."),
        heads=heads,
        head_size=_shape(shapes, "encoder.block.0.layer.0.SelfAttention.q.weight", "T5 encoder")[0] // heads,
        mlp_width=_shape(shapes, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", "Flan-T5 encoder")[0],
        vocabulary_size=vocabulary,
        relative_buckets=buckets,
    )


def editor_config(found: Mapping[str, Shapes], pixel_budget: str, rope_layout: RopeLayout) -> EditorConfig:
    """Configuration of an editor with these parts; what is not among them is taken as published with the others.

    Raises UserError if the parts do not go together.
    """
    transformer = transformer_config(found["transformer"], rope_layout) if "transformer" in found else None
    if "tokenizer" in found:
        tokenizer = tokenizer_config(found["tokenizer"])
    else:
        tokenizer = TOKENIZER_14BIT if transformer and transformer.token_bits == 56 else TOKENIZER_32BIT
        if transformer and transformer.token_bits not in (32, 56):  # Infinity's other tokenizers are like that of 32
            tokenizer = TokenizerConfig(bits=transformer.token_bits)
    patchify = transformer.token_bits == 4 * tokenizer.bits if transformer else tokenizer.stride == 8
    if "text" in found:
        text = text_config(found["text"])
    else:
        text = TextConfig(width=transformer.text_width) if transformer else TextConfig()
    if transformer is None:
        bits = tokenizer.bits * (4 if patchify else 1)
        transformer = TransformerConfig(token_bits=bits, text_width=text.width, rope_layout=rope_layout)
    try:
        return EditorConfig(
            tokenizer=tokenizer, text=text, transformer=transformer, patchify=patchify, pixel_budget=pixel_budget
        )
    except ValueError as error:
        raise UserError(f"these parts do not make an editor: {error}") from error
