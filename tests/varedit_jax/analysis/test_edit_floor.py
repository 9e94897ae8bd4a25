"""The floor of an edit's stages: operations as the traced stages and training have them; bytes by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varedit_jax import hardware
from varedit_jax.analysis import edit_floor
from varedit_jax.config import EditingConfig, SamplingConfig, preset
from varedit_jax.parameters import stored_params
from varedit_jax.sampling import pipeline
from varedit_jax.scales import editor_pyramid, image_size
from varedit_jax.training.flops import count_jaxpr, example_flops
from varedit_jax.weights.directory import PARTS

TEXT = 16


def traced(model, batch, guidance):
    """The stages of an edit with their abstract arguments, and its parameters."""
    pyramid = editor_pyramid(model)
    params = {part: stored_params(model, part, "bfloat16") for part in PARTS}
    images = np.zeros((batch, *image_size(model, pyramid), 3), np.uint8)
    texts = np.zeros((batch, TEXT), np.int32), np.ones((batch,), np.int32)
    found = []

    def run(stage, *arguments):
        found.append((stage, arguments))
        return pipeline.program(stage).results(*arguments)

    sampling = [SamplingConfig(guidance=guidance)] * batch
    pipeline.edit(run, params, images, *texts, range(batch), sampling, model, EditingConfig(), pyramid)
    return found, params


@pytest.fixture(scope="module")
def tiny():
    return traced(preset("tiny"), 2, (4.0, 4.0, 1.0))


def test_operations_are_those_of_the_traced_stages(tiny):
    """The encoders' and the decoder's to the last one; the transformer's without RoPE's matmul and resizing."""
    found, params = tiny
    for stage, arguments in found:
        counted = count_jaxpr(jax.make_jaxpr(pipeline._function(stage)[0])(*arguments))
        floor = edit_floor.floor(stage, params).operations
        if stage.name in ("source", "text", "begin"):
            assert counted == floor
        else:
            assert floor <= counted < 1.08 * floor, stage.title
    assert [stage.guided for stage, _ in found if stage.name == "scale"] == [True, True, False]


def test_all_stages_together_are_an_example_of_training():
    """Of each half; the modulation is computed in every stage."""
    model = preset("tiny")
    found, params = traced(model, 2, 4.0)
    chosen = [stage for stage, _ in found if stage.name in ("prefill", "scale")]
    operations = sum(edit_floor.floor(stage, params).operations for stage in chosen)
    width, scales = model.transformer.width, editor_pyramid(model).scales
    again = 2 * width**2 * (6 + 8 * scales - 8)
    assert operations == 2 * 2 * (example_flops(model, editor_pyramid(model), TEXT).transformer + again)


def test_operations_of_the_published_sizes():
    """8B at 512 px with guidance: 110.7 TFLOP in the transformer."""
    model = preset("8b")
    transformer = example_flops(model, editor_pyramid(model), 32).transformer
    assert 2 * transformer / 1e12 == pytest.approx(110.7, rel=0.01)


def test_bytes(tiny):
    """Weights once in the type they are kept in, without those of the text in scales; caches; features and pixels."""
    found, params = tiny
    floors = {stage.title: edit_floor.floor(stage, params) for stage, _ in found}
    model, sizes = preset("tiny").transformer, params["transformer"]
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    whole = size(sizes)
    of_text = [name for name in sizes if name.startswith("text_")]
    cross = [sizes[name]["cross_attention"] for name in ("block_0", "blocks")]
    unused = size([sizes[name] for name in of_text]) + size([[part["kv_kernel"], part["v_bias"]] for part in cross])
    features = 4 * 2 * 4 * 4 * 4
    row = 2 * 4 * model.width  # of keys and of values, float32
    # Scale 1 with guidance: four tokens see 16 of the source (SAR: 4 in block 0) and one of scale 0.
    read = (16 + 1) * (model.depth - 1) + (4 + 1)
    cached = 4 * row * (read + 4 * model.depth + TEXT * model.depth)
    assert floors["scale 1"].weight_bytes == whole - unused
    assert floors["scale 1"].bytes == whole - unused + cached + features
    tokenizer = size(params["tokenizer"]["decoder"])
    assert floors["decode"].bytes == tokenizer + features + 2 * 3 * 16 * 16
    table = params["text"]["embedding"]["embedding"]
    assert table.dtype == jnp.bfloat16 and floors["text"].weight_bytes == size(params["text"]) - 2 * table.size
    assert floors["begin"] == edit_floor.NOTHING


def test_seconds():
    """The longer of arithmetic and bytes, over the devices."""
    chip = hardware.chip("TPU v6e")
    assert edit_floor.Floor(918 * 10**12, 0, 0).seconds(chip) == pytest.approx(1)
    assert edit_floor.Floor(10**9, 1640 * 10**9, 0).seconds(chip, 4) == pytest.approx(0.25)
    both = dataclasses.replace(chip, devices=2)
    assert edit_floor.Floor(918 * 10**12, 0, 0).seconds(both, 2) == pytest.approx(1)
    assert edit_floor.Floor(1, 2, 3) + edit_floor.Floor(10, 20, 30) == edit_floor.Floor(11, 22, 33)
