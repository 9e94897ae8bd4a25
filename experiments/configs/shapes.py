"""`shapes`: an editor trained from scratch on procedural images, on a two-core machine.

    python -m experiments.train --config=experiments/configs/shapes.py:demo --workdir=runs/shapes

Variants: `demo`, which `make demo` trains in minutes; `full`, the shipped editor; `compare`, a smaller one for
experiments.compare_conditioning; `tiny`, for tests. For experiments.train_tokenizer: `tokenizer`, its second stage
`coarse`, and `tokenizer_tiny`. results/shapes.md has the figures.
"""

import dataclasses

from varedit_jax.config import (
    Cadence,
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

VARIANTS = ("demo", "full", "compare", "tiny", "tokenizer", "coarse", "tokenizer_tiny")
SHIPPED = "varedit_jax/data/shapes"  # the tokenizer and editor that come with the package; storage.paths finds them

MODEL = EditorConfig(
    tokenizer=TokenizerConfig(
        bits=32, channel_multipliers=(1, 2, 4), base_channels=16, encoder_blocks=1, decoder_blocks=2, norm_groups=4
    ),
    text=TextConfig(width=48, layers=2, heads=4, head_size=16, mlp_width=128),
    transformer=TransformerConfig(
        depth=4,
        width=128,
        heads=4,
        token_bits=32,
        text_width=48,
        unconditional_rows=32,
        drop_path=0.0,
        initial_attention_scale=16.0,
        initial_input_scale=32**0.5,  # entries of codes are 1 / sqrt(32)
        absolute_positions=True,
        rope_layout="paper",
    ),
    pixel_budget="",
    grids=((1, 1), (2, 2), (4, 4), (8, 8)),
    position_scale=4,  # as far apart as at 256 px in the published models: attention separates neighbors sooner
)

DATA = DataConfig(train_examples=24000, eval_examples=1000, features="precomputed", batch_size=16, text_tokens=24)


def _tokenizer() -> TokenizerRunConfig:
    return TokenizerRunConfig(
        name="shapes_tokenizer",
        model=MODEL,
        optimizer=OptimizerConfig(
            learning_rate=2e-3, schedule="cosine", warmup_steps=50, beta2=0.99, clip_norm=1.0, final_fraction=0.003
        ),
        data=dataclasses.replace(DATA, features="online"),
        steps=1700,
    )


def _coarse() -> TokenizerRunConfig:
    """Returns the second stage of the tokenizer, in which the coarse bits learn to describe the image."""
    first = _tokenizer()
    optimizer = dataclasses.replace(first.optimizer, learning_rate=8e-4)
    return dataclasses.replace(
        first,
        name="shapes_coarse",
        optimizer=optimizer,
        steps=750,
        partial_share=0.5,
        noise_max=0.1,
        commitment_weight=2.0,  # with less, features outgrow their codes when partial sums are decoded
        init_from=SHIPPED,
        seed=1,
        data=dataclasses.replace(first.data, seed=1),
    )


def _editor(name: str, coarse: int, middle: int, fine: int, train_examples: int) -> RunConfig:
    """Returns a run of `coarse` steps on two scales (a token per object), `middle` on three and `fine` on all four."""
    return RunConfig(
        name=name,
        model=MODEL,
        optimizer=OptimizerConfig(
            algorithm="muon",
            learning_rate=4e-3,
            schedule="cosine",
            warmup_steps=100,
            decay_steps=fine + middle // 2,
            weight_decay=0.01,
            clip_norm=1.0,
        ),
        # The last scale is the hardest, so all tokens have equal weights; and there are few scales: more flips of the
        # previous one would hide what the last has to learn.
        loss=LossConfig(scale_power=0.0, noise_max=0.1, label_temperature=0.03),
        data=dataclasses.replace(DATA, train_examples=train_examples),
        sampling=SamplingConfig(guidance=(1.5, 1.5, 1.5, 1.0), greedy=True),
        steps=coarse + middle + fine,
        stages=((coarse, 2), (middle, 3)),
        train_text=True,
        tokenizer_weights=SHIPPED,
        eval_batches=20,
        cadence=Cadence(log_every=50, sample_every=5000, eval_every=1000, evaluate_first=True, save_every=2000),
    )


def get_config(variant: str = "demo") -> RunConfig | TokenizerRunConfig:
    """Returns the run; see the module's docstring for the variants."""
    if variant == "demo":
        run = _editor("shapes_demo", coarse=1300, middle=420, fine=320, train_examples=16000)
        cadence = dataclasses.replace(run.cadence, sample_every=1000, eval_every=800)
        return dataclasses.replace(run, cadence=cadence, eval_batches=5)
    if variant == "full":
        return _editor("shapes", coarse=3000, middle=800, fine=1000, train_examples=32000)
    if variant == "compare":
        run = _editor("shapes_compare", coarse=600, middle=150, fine=200, train_examples=16000)
        transformer = dataclasses.replace(MODEL.transformer, depth=3, width=64, heads=2)
        model = dataclasses.replace(MODEL, transformer=transformer)
        cadence = dataclasses.replace(run.cadence, sample_every=0, eval_every=run.steps)
        return dataclasses.replace(run, model=model, cadence=cadence)
    short = OptimizerConfig(learning_rate=1e-3)
    tiny_data = dataclasses.replace(DATA, train_examples=128, eval_examples=64, batch_size=8)
    if variant == "tiny":
        run = _editor("shapes_tiny", coarse=2, middle=2, fine=2, train_examples=0)
        return dataclasses.replace(
            run,
            stages=((3, 2),),
            optimizer=short,
            data=tiny_data,
            eval_batches=1,
            cadence=Cadence(log_every=1, sample_every=0, eval_every=0, save_every=3),
        )
    if variant == "tokenizer":
        return _tokenizer()
    if variant == "coarse":
        return _coarse()
    first = _tokenizer()
    data = dataclasses.replace(tiny_data, features="online")
    cadence = dataclasses.replace(first.cadence, sample_every=0)
    return dataclasses.replace(
        first, name="shapes_tokenizer_tiny", optimizer=short, data=data, cadence=cadence, steps=4
    )
