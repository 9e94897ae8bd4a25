"""Presets: published sizes of editors and text encoders, and `tiny`."""

from varedit_jax.config.model import EditorConfig, TextConfig, TokenizerConfig, TransformerConfig

# Infinity's and VAREdit's transformers (model.md, section 1): depth, width, heads, and True if tokens are 2x2 patches
# of the 14-bit tokenizer of stride 8, instead of cells of the 32-bit tokenizer of stride 16.
_TRANSFORMERS = {
    "125m": (12, 768, 8, False),
    "350m": (16, 1152, 12, False),
    "700m": (24, 1536, 16, False),
    "2b": (32, 2048, 16, False),
    "2.2b": (32, 2080, 20, False),
    "4.5b": (40, 2688, 24, False),
    "8b": (40, 3584, 28, True),
    "8.5b": (48, 3360, 28, True),
    "20b": (58, 4608, 36, True),
}

# Flan-T5 encoders: width, layers, heads, head size, mlp width.
_TEXT_ENCODERS = {
    "small": (512, 8, 6, 64, 1024),
    "base": (768, 12, 12, 64, 2048),
    "large": (1024, 24, 16, 64, 2816),
    "xl": (2048, 24, 32, 64, 5120),
    "xxl": (4096, 24, 64, 64, 10240),
}

TOKENIZER_32BIT = TokenizerConfig(bits=32, channel_multipliers=(1, 2, 4, 4, 4))
TOKENIZER_14BIT = TokenizerConfig(bits=14, channel_multipliers=(1, 2, 4, 4))


def text_preset(name: str) -> TextConfig:
    """Returns the Flan-T5 encoder of a published size: small, base, large, xl or xxl. ValueError for any other."""
    if name not in _TEXT_ENCODERS:
        raise ValueError(f"unknown text encoder {name!r}; known are {', '.join(_TEXT_ENCODERS)}")
    width, layers, heads, head_size, mlp_width = _TEXT_ENCODERS[name]
    return TextConfig(width=width, layers=layers, heads=heads, head_size=head_size, mlp_width=mlp_width)


def _tiny() -> EditorConfig:
    """Returns the smallest editor with every part of the large ones, for tests and dry runs."""
    return EditorConfig(
        tokenizer=TokenizerConfig(
            bits=4, channel_multipliers=(1, 1, 2), base_channels=8, norm_groups=4, encoder_blocks=1, decoder_blocks=1
        ),
        text=TextConfig(width=32, layers=2, heads=2, head_size=16, mlp_width=48),
        transformer=TransformerConfig(
            depth=3, width=32, heads=2, token_bits=4, text_width=32, unconditional_rows=16, drop_path=0.0
        ),
        pixel_budget="",
        grids=((1, 1), (2, 2), (4, 4)),
    )


def preset(name: str) -> EditorConfig:
    """Returns the editor of a published size, or `tiny`. Names of Infinity sizes are their parameter counts.

    Raises ValueError with the known names for any other.
    """
    if name == "tiny":
        return _tiny()
    if name not in _TRANSFORMERS:
        raise ValueError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
    depth, width, heads, patchify = _TRANSFORMERS[name]
    return EditorConfig(
        tokenizer=TOKENIZER_14BIT if patchify else TOKENIZER_32BIT,
        transformer=TransformerConfig(depth=depth, width=width, heads=heads, token_bits=56 if patchify else 32),
        patchify=patchify,
    )


PRESETS = ("tiny", *_TRANSFORMERS)
