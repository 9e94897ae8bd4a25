"""Configurations of models and runs, their presets, and their form as JSON."""

from varedit_jax.config.model import (
    PIXEL_BUDGETS,
    REMAT_NAMES,
    ComputeType,
    Conditioning,
    EditorConfig,
    PixelBudget,
    RematName,
    RopeLayout,
    TextConfig,
    TokenizerConfig,
    TransformerConfig,
)
from varedit_jax.config.presets import PRESETS, TOKENIZER_14BIT, TOKENIZER_32BIT, preset, text_preset
from varedit_jax.config.run import (
    Cadence,
    DataConfig,
    EditingConfig,
    GuardConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    SamplingConfig,
    TokenizerRunConfig,
    per_scale,
)
from varedit_jax.config.serialize import from_dict, to_dict, with_current_names

__all__ = [
    "PIXEL_BUDGETS", "PRESETS", "REMAT_NAMES", "TOKENIZER_14BIT", "TOKENIZER_32BIT", "Cadence", "ComputeType",
    "Conditioning", "DataConfig", "EditingConfig", "EditorConfig", "GuardConfig", "LossConfig", "MeshConfig",
    "OptimizerConfig", "PixelBudget", "RematName", "RopeLayout", "RunConfig", "SamplingConfig", "TextConfig",
    "TokenizerConfig", "TokenizerRunConfig", "TransformerConfig", "from_dict", "per_scale", "preset", "text_preset",
    "to_dict", "with_current_names",
]  # fmt: skip
