"""What the published runs have in common; the cards `varedit_*` say the rest.

AdamW with betas 0.9 / 0.97 at a constant rate, gradients clipped at 5, bfloat16 compute over float32 weights,
self-correction up to 0.3 on 13 scales, the loss reweighted by scale, text dropped with probability 0.1. The precision
of the frozen encoders is as measured in results/precision.md.
"""

import dataclasses

from experiments.configs import shapes
from varedit_jax.config import DataConfig, EditorConfig, LossConfig, OptimizerConfig, RunConfig, preset


def card(
    name: str, size: str, pixel_budget: str, *, steps: int, batch_size: int, learning_rate: float, tiny: bool = False
) -> RunConfig:
    """A published run at preset `size`; with `tiny` the same settings over the smallest model and pictures."""
    model = preset(size)
    transformer = dataclasses.replace(model.transformer, dtype="bfloat16", remat="full")
    model = dataclasses.replace(model, pixel_budget=pixel_budget, transformer=transformer)
    data = DataConfig(batch_size=batch_size)
    if tiny:
        model = _tiny(model)
        data = DataConfig(batch_size=8, text_tokens=32, train_examples=256, eval_examples=32)
    return RunConfig(
        name=f"{name}_tiny" if tiny else name,
        model=model,
        optimizer=OptimizerConfig(learning_rate=learning_rate, beta1=0.9, beta2=0.97, clip_norm=5.0),
        loss=LossConfig(scale_power=0.5, noise_scales=13, noise_max=0.3, text_drop=0.1),
        data=data,
        steps=20 if tiny else steps,
        train_text=tiny,
        text_dtype="bfloat16",
        tokenizer_precision="high",
        tokenizer_weights=shapes.SHIPPED if tiny else "",
    )


def _tiny(model: EditorConfig) -> EditorConfig:
    """The blocks' settings of `model` at the smallest size, on the shipped tokenizer of `shapes`."""
    small = shapes.MODEL
    transformer = dataclasses.replace(
        model.transformer,
        depth=2,
        width=64,
        heads=2,
        token_bits=small.transformer.token_bits,
        text_width=small.transformer.text_width,
    )
    return dataclasses.replace(small, transformer=transformer)
