"""Configurations: refusals and their sentences, presets, and JSON."""

import dataclasses
import json
import pathlib

import pytest

from varedit_jax import config as config_lib
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
    preset,
)

RUNS = pathlib.Path(__file__).parents[2] / "data" / "runs"

# A wrong combination, and what its sentence has to name: both values.
MISTAKES = {
    "groups": (lambda: TokenizerConfig(base_channels=48, norm_groups=32), "48 channels.*norm_groups=32"),
    "heads": (lambda: TransformerConfig(width=96, heads=5), "width 96 over 5 heads.*19.2.*multiple of 4"),
    "head size": (lambda: TransformerConfig(width=96, heads=16), "width 96 over 16 heads.* 6;"),
    "pool heads": (lambda: TransformerConfig(width=64, heads=2, text_width=384), "width 64 .* 3 text.*text_width 384"),
    "conditioning": (lambda: TransformerConfig(conditioning="sra"), "conditioning is 'sra'.*sar, finest, full"),
    "rope": (lambda: TransformerConfig(rope_layout="new"), "rope_layout is 'new'.*released, paper"),
    "dtype": (lambda: TransformerConfig(dtype="float16"), "dtype is 'float16'.*float32, bfloat16"),
    "remat": (lambda: TransformerConfig(remat="some"), "remat is .some..*none, named, full"),
    "bits": (
        lambda: EditorConfig(transformer=TransformerConfig(token_bits=16)),
        r"token_bits is 16.*gives 32 \(32 bits\)",
    ),
    "patched bits": (lambda: EditorConfig(patchify=True), r"token_bits is 32.*gives 128 \(32 bits, patchified 2x2\)"),
    "text width": (lambda: EditorConfig(text=TextConfig(width=1024)), "text_width is 2048.*text.width is 1024"),
    "both pyramids": (lambda: EditorConfig(grids=((1, 1),)), r"pixel_budget='0.25M', grids=\(\(1, 1\),\)"),
    "no pyramid": (lambda: EditorConfig(pixel_budget=""), r"pixel_budget='', grids=\(\)"),
    "budget": (lambda: EditorConfig(pixel_budget="2M"), "pixel_budget is '2M'.*0.06M, 0.25M, 0.60M, 1M, ''$"),
    "levels": (
        lambda: EditorConfig(pixel_budget="", grids=tuple((n, n) for n in range(1, 17))),
        "16 scales, but only 15",
    ),
    "schedule": (lambda: OptimizerConfig(schedule="linear"), "schedule is 'linear'.*constant, cosine"),
    "accumulation": (lambda: OptimizerConfig(accumulation=0), "accumulation is 0; it must be at least 1"),
    "decay": (lambda: OptimizerConfig(decay_steps=5), "decay_steps is 5 with schedule 'constant'"),
    "stage": (lambda: RunConfig(name="r", model=preset("2b"), stages=((5, 1),)), r"stages=\(\(5, 1\),\).*2 scales"),
    "stages": (
        lambda: RunConfig(name="r", model=preset("2b"), stages=((5, 2), (3, 3)), steps=8),
        r"stages=\(\(5, 2\), \(3, 3\)\) leave none of the 8 steps",
    ),
    "no steps": (lambda: RunConfig(name="r", model=preset("2b"), steps=0), "steps is 0; it must be at least 1"),
    "no steps of a tokenizer": (
        lambda: TokenizerRunConfig(name="r", model=preset("2b"), steps=0),
        "steps is 0; it must be at least 1",
    ),
    "buckets": (
        lambda: DataConfig(text_tokens=64, text_buckets=(16, 64)),
        r"data.text_buckets is \(16, 64\), and data.text_tokens 64; buckets are increasing numbers",
    ),
    "cadence": (lambda: Cadence(log_every=-1), "cadence.log_every is -1; it must be at least 0"),
    "checkpoints": (lambda: Cadence(keep_checkpoints=0), "cadence.keep_checkpoints is 0; it must be at least 1"),
    "type": (lambda: Cadence(save_every=2.5), "Cadence.save_every is 2.5; it must be a whole number"),
    "truth value": (lambda: RunConfig(name="r", model=preset("2b"), seed=True), "seed is True; it must be a whole"),
    "products_backward": (
        lambda: TransformerConfig(products_backward=True),
        "products_backward is True with products='plain'",
    ),
    "remat_saved": (
        lambda: TransformerConfig(remat_saved=("qkv", "scores")),
        r"remat_saved is \('qkv', 'scores'\); it must be a tuple with one of qkv, attention, .*fc2 in each place",
    ),
    "nested": (lambda: RunConfig(name="r", model=preset("2b").text), r"model is TextConfig.*must be a EditorConfig"),
    "reduction": (lambda: LossConfig(reduction="max"), "reduction is 'max'.*mean, sum"),
    "features": (lambda: DataConfig(features="cached"), "features is 'cached'.*online, precomputed"),
    "microbatches": (
        lambda: RunConfig(name="r", model=preset("2b"), optimizer=OptimizerConfig(accumulation=5)),
        "batch_size 32 .*accumulation=5",
    ),
    "text tokens": (lambda: RunConfig(name="r", model=preset("tiny")), "text_tokens is 512, but there are only 16"),
    "preset": (lambda: preset("3b"), "unknown preset '3b'; known are tiny, 125m,.* 20b"),
    "text preset": (lambda: config_lib.text_preset("huge"), "unknown text encoder 'huge'.*small, base, large, xl, xxl"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_both_values(name):
    make, sentence = MISTAKES[name]
    with pytest.raises(ValueError, match=sentence):
        make()


# depth, width, heads, tokenizer bits, bits per token: model.md, section 1.
PUBLISHED = {
    "125m": (12, 768, 8, 32, 32),
    "350m": (16, 1152, 12, 32, 32),
    "700m": (24, 1536, 16, 32, 32),
    "2b": (32, 2048, 16, 32, 32),
    "2.2b": (32, 2080, 20, 32, 32),
    "4.5b": (40, 2688, 24, 32, 32),
    "8b": (40, 3584, 28, 14, 56),
    "8.5b": (48, 3360, 28, 14, 56),
    "20b": (58, 4608, 36, 14, 56),
}


def test_every_published_size_has_a_preset():
    assert list(config_lib.PRESETS) == ["tiny", *PUBLISHED]


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets(name):
    editor = preset(name)
    transformer, tokenizer = editor.transformer, editor.tokenizer
    found = (transformer.depth, transformer.width, transformer.heads, tokenizer.bits, transformer.token_bits)
    assert found == PUBLISHED[name]
    assert editor.token_stride == 16
    assert editor.patchify == (tokenizer.stride == 8)
    assert tokenizer.channel_multipliers == ((1, 2, 4, 4) if editor.patchify else (1, 2, 4, 4, 4))
    assert editor.text == config_lib.text_preset("xl")
    assert transformer.text_pool_heads == (32 if transformer.width > 4096 else 16)
    assert transformer.head_size * transformer.heads == transformer.width


def test_tiny_has_every_part_of_the_large_ones():
    tiny = preset("tiny")
    assert tiny.transformer.depth > 2  # a first block, and more than one scanned
    assert len(tiny.grids) > 2
    assert len(set(tiny.tokenizer.channel_multipliers)) > 1  # a shortcut
    assert tiny.text.layers > 1


RUN = RunConfig(
    name="run",
    model=preset("8b"),
    optimizer=OptimizerConfig(accumulation=4),
    sampling=SamplingConfig(guidance=(1.0, 3.0)),
)


@pytest.mark.parametrize(
    "value", [*map(preset, config_lib.PRESETS), RUN, TokenizerRunConfig(name="t", model=RUN.model)]
)
def test_there_and_back_through_json(value):
    assert config_lib.from_dict(type(value), json.loads(json.dumps(config_lib.to_dict(value)))) == value


@pytest.mark.parametrize(("name", "cls"), [("shapes_tiny", RunConfig), ("shapes_tokenizer_tiny", TokenizerRunConfig)])
def test_records_from_before_cadence_are_read(name, cls):
    """tests/data/runs has records of earlier versions, with the fields of `cadence` at the top level."""
    values = json.loads((RUNS / f"{name}.json").read_text())
    del values["format_version"]
    run = config_lib.from_dict(cls, values)
    assert "cadence" not in values
    editor = cls is RunConfig
    assert (run.cadence.save_every, run.cadence.keep_checkpoints) == ((3, 3) if editor else (500, 2))
    for field in dataclasses.fields(Cadence):
        assert getattr(run.cadence, field.name) == values.get(
            field.name, field.default
        )  # eval_every of an editor alone
    assert config_lib.from_dict(cls, json.loads(json.dumps(config_lib.to_dict(run)))) == run


def test_unknown_field_is_named():
    values = config_lib.to_dict(RUN)
    values["model"]["transformer"]["depht"] = 3
    with pytest.raises(ValueError, match="TransformerConfig has no field 'depht'; it has depth, width"):
        config_lib.from_dict(RunConfig, values)


def test_wrong_values_are_refused_when_read_back():
    values = config_lib.to_dict(preset("tiny"))
    values["transformer"]["heads"] = 3
    with pytest.raises(ValueError, match="width 32 over 3 heads"):
        config_lib.from_dict(EditorConfig, values)


def test_configs_are_frozen_hashable_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RUN.steps = 3
    with pytest.raises(TypeError):
        OptimizerConfig(1e-3)
    assert len({preset("2b"), preset("2b"), preset("8b")}) == 2


@pytest.mark.parametrize(
    "value, scales, wanted",
    [(4, 3, (4.0, 4.0, 4.0)), ((1.0,), 2, (1.0, 1.0)), ((3.0, 1.0), 4, (3.0, 1.0, 1.0, 1.0)), ((1, 2), 2, (1.0, 2.0))],
)
def test_per_scale(value, scales, wanted):
    assert config_lib.per_scale(value, scales) == wanted


@pytest.mark.parametrize("value", [(), (1.0,) * 4, float("nan"), (1.0, float("inf"))])
def test_per_scale_refuses(value):
    with pytest.raises(ValueError, match="is not a list of 1 to 3 finite numbers, one per scale"):
        config_lib.per_scale(value, 3)
