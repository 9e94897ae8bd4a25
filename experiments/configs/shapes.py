"""`shapes`: an editor trained from scratch on procedural pictures, on a two-core machine.

    python -m experiments.train --config=experiments/configs/shapes.py --workdir=runs/shapes

Variants (`shapes.py:NAME`): `demo` is what `make demo` trains in minutes, `full` made the shipped editor, `tiny` is
for tests, `tokenizer` and `tokenizer_tiny` are for experiments.train_tokenizer.
"""

import dataclasses

from varedit_jax.config import (
    DataConfig,
    EditorConfig,
    LossConfig,
    OptimizerConfig,
    RunConfig,
    SamplingConfig,
    TextConfig,
    TokenizerConfig,
    TokenizerRunConfig,
    TransformerConfig,
)

SHIPPED = "varedit_jax/data/shapes"

MODEL = EditorConfig(
    tokenizer=TokenizerConfig(
        bits=32,
        channel_multipliers=(1, 4, 4),
        base_channels=16,
        encoder_blocks=1,
        decoder_blocks=2,
        norm_groups=4,
    ),
    text=TextConfig(width=64, layers=2, heads=4, head_size=16, mlp_width=128),
    transformer=TransformerConfig(
        depth=4, width=128, heads=4, token_bits=32, text_width=64, unconditional_rows=32, drop_path=0.0, scan_unroll=3
    ),
    pixel_budget="",
    grids=((1, 1), (2, 2), (4, 4), (8, 8)),
)


def _tokenizer() -> TokenizerRunConfig:
    return TokenizerRunConfig(
        name="shapes_tokenizer",
        model=MODEL,
        optimizer=OptimizerConfig(
            learning_rate=4e-3, schedule="cosine", warmup_steps=50, beta2=0.97, clip_norm=1.0, final_fraction=0.003
        ),
        data=DataConfig(batch_size=16, train_examples=24000, eval_examples=1000, text_tokens=32),
        steps=1800,
    )


def _editor(steps: int) -> RunConfig:
    return RunConfig(
        name="shapes",
        model=MODEL,
        optimizer=OptimizerConfig(
            learning_rate=2e-3, schedule="cosine", warmup_steps=100, weight_decay=0.01, clip_norm=1.0
        ),
        loss=LossConfig(noise_scales=3, noise_max=0.1),
        data=DataConfig(
            train_examples=24000, eval_examples=1000, features="precomputed", batch_size=32, text_tokens=32
        ),
        sampling=SamplingConfig(guidance=1.0, greedy=True),
        steps=steps,
        train_text=True,
        tokenizer_weights=SHIPPED,
        sample_every=200,
        eval_every=100,
        save_every=200,
    )


def get_config(variant: str = "demo") -> RunConfig | TokenizerRunConfig:
    """The card; see the module's docstring for the variants."""
    if variant == "tokenizer":
        return _tokenizer()
    if variant in ("demo", "full"):
        return _editor(1100 if variant == "demo" else 4000)
    raise ValueError(f"shapes has no variant {variant!r}; it has demo, full, tokenizer")


def _replaced(config: RunConfig, **changes: object) -> RunConfig:
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]
