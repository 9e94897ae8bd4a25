"""Configurations inferred from the shapes of published tensors and the names of files."""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from varedit_jax.config import (
    PIXEL_BUDGETS,
    TOKENIZER_14BIT,
    TOKENIZER_32BIT,
    EditingConfig,
    EditorConfig,
    PixelBudget,
    RopeLayout,
    SamplingConfig,
    TextConfig,
    TokenizerConfig,
    TransformerConfig,
)
from varedit_jax.errors import UserError
from varedit_jax.scales import SQUARE, aspect_templates
from varedit_jax.weights import names

Shapes = Mapping[str, tuple[int, ...]]  # published name -> shape

FAMILIES: dict[str, RopeLayout] = {"varedit": "released", "infinity": "paper"}
_PIXEL_BUDGETS: dict[str, PixelBudget] = {"256": "0.06M", "512": "0.25M", "1024": "1M"}  # by the side of a square image


def family_of(path: str) -> str:
    """Family in the name of a file or its directory: varedit or infinity; "" if there is none."""
    for name in reversed(pathlib.PurePath(path).parts[-2:]):
        found = [family for family in FAMILIES if family in name.lower()]
        if len(found) == 1:
            return found[0]
    return ""


def pixel_budget_of(path: str) -> PixelBudget | Literal[""]:
    """Pixel budget by the name of a file or its directory; "" if it says none, or several.

    It may be there itself, as in 0.06M-8K (a trainer's: budget and steps), or as a resolution, as in 8B-512.
    """
    for name in reversed(pathlib.PurePath(path).parts[-2:]):
        name = re.sub(r"(step|epoch|iter|checkpoint|ckpt)s?[-_=.]?\d+", "", name, flags=re.IGNORECASE)
        budgets = re.findall(r"(?<![\d.])(0\.06M|0\.25M|0\.60M|1M)(?![A-Za-z0-9])", name)
        sides = re.findall(r"(?<![A-Za-z0-9.])(256|512|1024)(?=x\d|px|[^A-Za-z0-9]|$)", name)
        found = {*budgets, *(_PIXEL_BUDGETS[side] for side in sides)}
        if len(found) == 1:
            return found.pop()
    return ""


def stated_pixel_budget(texts: Mapping[str, str]) -> PixelBudget | Literal[""]:
    """Pixel budget in the settings that a trainer's checkpoint records; "" if it records none that is known."""
    return next((budget for budget in PIXEL_BUDGETS if budget == texts.get("args.pn")), "")


def budget_and_guesses(
    path: str, texts: Mapping[str, str], family: str, pixel_budget: PixelBudget | Literal[""]
) -> tuple[PixelBudget, list[str]]:
    """Pixel budget of a transformer, and a sentence for everything that neither a flag nor its file states.

    Args:
      path: of its file or directory.
      texts: strings that the file holds beside its tensors.
      family: as given by flag; "" if not.
      pixel_budget: likewise.
    """
    guesses = []
    if not family:
        guesses.append(f"by the name {path} these are weights of {family_of(path)}; --family states it")
    if stated := pixel_budget or stated_pixel_budget(texts):
        return stated, guesses
    if named := pixel_budget_of(path):
        return named, [*guesses, f"by the name {path} its pixel budget is {named}; --pixel_budget states it"]
    guess = f"neither {path} nor its name states a pixel budget; 0.25M is a guess, --pixel_budget states it"
    return "0.25M", [*guesses, guess]


class _SizedAxis(NamedTuple):
    """An axis of the tensors whose full name matches and that have `axes` axes: it gives a size."""

    pattern: str
    axes: int
    axis: int
    times: int = 1  # length of the axis over the size


class _Sizes:
    """Sizes of a model, each by a majority of several tensors.

    So a tensor that is missing or misshapen is reported as such, instead of all others.
    """

    def __init__(self, shapes: Shapes, part: str) -> None:
        self._shapes, self._part = shapes, part

    def size(self, *axes: _SizedAxis, default: int | None = None) -> int:
        """The size by most tensors; in a tie, by the first of the file.

        Raises UserError if there are none, and no default.
        """
        told = [
            shape[sized.axis] // sized.times
            for name, shape in self._shapes.items()
            for sized in axes
            if len(shape) == sized.axes and re.fullmatch(sized.pattern, name)
        ]
        if told:
            return collections.Counter(told).most_common(1)[0][0]
        if default is not None:
            return default
        wanted, some = axes[0].pattern.replace(r"\d+", "0").replace("\\", ""), ", ".join(list(self._shapes)[:3])
        raise UserError(
            f"there is no tensor {wanted}, which every published {self._part} has, but {some}, ...; wrong file?"
        )

    def count(self, pattern: str) -> int:
        """One more than the largest number that the pattern captures in the names."""
        return 1 + max((int(match[1]) for name in self._shapes if (match := re.match(pattern, name))), default=-1)


def transformer_config(shapes: Shapes, rope_layout: RopeLayout) -> TransformerConfig:
    """Configuration of a published transformer. Raises UserError if it is none."""
    sizes = _Sizes(shapes, "transformer")
    block = r"(block_chunks\.\d+\.module|blocks)\.\d+\."
    return TransformerConfig(
        token_bits=sizes.size(
            _SizedAxis(r"word_embed\.weight", 2, 1),
            _SizedAxis(r"head\.weight", 2, 0, 2),
            _SizedAxis(r"head\.bias", 1, 0, 2),
        ),
        depth=names.block_counts(shapes)[0],
        width=sizes.size(_SizedAxis(r"pos_start", 3, 2), _SizedAxis(rf"{block}(sa|ca)\.proj\.(weight|bias)", 1, 0)),
        heads=sizes.size(
            _SizedAxis(r"block_chunks\.\d+\.module\.\d+\.sa\.scale_mul_1H11", 4, 1),
            _SizedAxis(r"blocks\.\d+\.sa\.scale_mul_1H11", 4, 1),
        ),
        text_width=sizes.size(
            _SizedAxis(r"cfg_uncond", 2, 1),
            _SizedAxis(r"text_norm\.weight", 1, 0),
            _SizedAxis(r"text_proj_for_ca\.0\.weight", 2, 1),
        ),
        unconditional_rows=sizes.size(_SizedAxis(r"cfg_uncond", 2, 0), default=TransformerConfig.unconditional_rows),
        levels=sizes.size(_SizedAxis(r"lvl_embed\.weight", 2, 0), default=TransformerConfig.levels),
        rope_layout=rope_layout,
    )


def tokenizer_config(shapes: Shapes) -> TokenizerConfig:
    """Configuration of a published tokenizer (32 norm groups, as all of them). Raises UserError if it is none."""
    sizes = _Sizes(
        {re.sub(r"\.(conv|norm)\.(weight|bias)$", r".\2", name): shape for name, shape in shapes.items()}, "tokenizer"
    )
    base = sizes.size(
        _SizedAxis(r"encoder\.conv_in\.weight", 4, 0),
        _SizedAxis(r"encoder\.conv_in\.bias", 1, 0),
        _SizedAxis(r"encoder\.down\.0\.block\.0\.norm1\.(weight|bias)", 1, 0),
    )
    levels = range(sizes.count(r"encoder\.down\.(\d+)\."))
    inside = r"block\.\d+\.(conv1|norm2|conv2)"
    widths = [sizes.size(_SizedAxis(rf"encoder\.down\.{level}\.{inside}\.(weight|bias)", 1, 0)) for level in levels]
    return TokenizerConfig(
        bits=sizes.size(
            _SizedAxis(r"encoder\.conv_out\.weight", 4, 0),
            _SizedAxis(r"encoder\.conv_out\.bias", 1, 0),
            _SizedAxis(r"decoder\.conv_in\.weight", 4, 1),
        ),
        channel_multipliers=tuple(width // base for width in widths),
        base_channels=base,
        encoder_blocks=sizes.count(r"encoder\.down\.\d+\.block\.(\d+)\."),
        decoder_blocks=sizes.count(r"decoder\.up\.\d+\.block\.(\d+)\."),
    )


def text_config(shapes: Shapes) -> TextConfig:
    """Configuration of a Flan-T5 encoder. Raises UserError if it is none, or of T5's first version (without a gate)."""
    sizes = _Sizes(shapes, "Flan-T5 encoder")
    layer = r"encoder\.block\.\d+\.layer"
    embedding = r"(shared|encoder\.embed_tokens)\.weight"
    heads = sizes.size(_SizedAxis(rf"{layer}\.0\.SelfAttention\.relative_attention_bias\.weight", 2, 1))
    return TextConfig(
        width=sizes.size(_SizedAxis(rf"{layer}\.\d\.layer_norm\.weight", 1, 0), _SizedAxis(embedding, 2, 1)),
        layers=sizes.count(r"encoder\.block\.(\d+)\."),
        heads=heads,
        head_size=sizes.size(_SizedAxis(rf"{layer}\.0\.SelfAttention\.[qkv]\.weight", 2, 0)) // heads,
        mlp_width=sizes.size(_SizedAxis(rf"{layer}\.1\.DenseReluDense\.wi_[01]\.weight", 2, 0)),
        vocabulary_size=sizes.size(_SizedAxis(embedding, 2, 0), default=TextConfig.vocabulary_size),
        relative_buckets=sizes.size(_SizedAxis(rf"{layer}\.0\.SelfAttention\.relative_attention_bias\.weight", 2, 0)),
    )


def hugging_face_config(text: TextConfig) -> dict[str, Any]:
    """The other way round: what the transformers library needs to know of an encoder of T5, its config.json."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_model": text.width,
        "d_kv": text.head_size,
        "d_ff": text.mlp_width,
        "num_layers": text.layers,
        "num_heads": text.heads,
        "vocab_size": text.vocabulary_size,
        "relative_attention_num_buckets": text.relative_buckets,
        "relative_attention_max_distance": text.relative_max_distance,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def as_published(config: EditorConfig, family: str) -> tuple[EditorConfig, SamplingConfig, EditingConfig]:
    """How VAREdit's published code uses an editor: blocks and text encoder in bfloat16, the rest in float32.

    `family` of the transformer: VAREdit was trained on squares alone, Infinity on all aspects.
    """
    transformer = dataclasses.replace(config.transformer, dtype="bfloat16")
    sampling = SamplingConfig(guidance=4.0, temperature=0.5, top_p=0.97)
    aspects = aspect_templates() if family == "infinity" else (SQUARE,)
    editing = EditingConfig(text_dtype="bfloat16", tokenizer_precision="highest", aspects=aspects)
    return dataclasses.replace(config, transformer=transformer), sampling, editing


def editor_config(found: Mapping[str, Shapes], pixel_budget: PixelBudget, rope_layout: RopeLayout) -> EditorConfig:
    """Configuration of an editor with these parts; other parts are as they were published with them.

    Raises UserError for a part that is no published one, and for parts that do not go together.
    """
    try:
        return _editor_config(found, pixel_budget, rope_layout)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"these parts do not make an editor: {error}") from error


def _editor_config(found: Mapping[str, Shapes], pixel_budget: PixelBudget, rope_layout: RopeLayout) -> EditorConfig:
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
    return EditorConfig(
        tokenizer=tokenizer, text=text, transformer=transformer, patchify=patchify, pixel_budget=pixel_budget
    )
