"""Operations by formula equal those of the real programs, except for what the convention leaves out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varedit_jax.config import DataConfig, LossConfig, RunConfig, TransformerConfig, preset, text_preset
from varedit_jax.parameters import abstract_params
from varedit_jax.resize import area_resize
from varedit_jax.scales import editor_pyramid, image_size
from varedit_jax.text.t5 import T5Encoder
from varedit_jax.tokenizer.tokens import encode_images, make_tokens
from varedit_jax.training.flops import count_jaxpr, encoder_flops, example_flops, run_flops, text_flops
from varedit_jax.training.state import TrainState
from varedit_jax.training.step import make_step
from varedit_jax.transformer.model import Transformer

TINY = preset("tiny")
BATCH, TEXT = 2, 5
KEY = jax.eval_shape(lambda: jax.random.key(0))
SGD = optax.sgd(0.1)


def model_of(**transformer):
    return dataclasses.replace(
        TINY, transformer=dataclasses.replace(TINY.transformer, attention="plain", **transformer)
    )


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def count(function, *arguments):
    return count_jaxpr(jax.make_jaxpr(function)(*arguments))


def rope(model, tokens):
    """Of the constant product in RoPE, forward: queries and keys of every block."""
    config = model.transformer
    return config.depth * tokens * 2 * 2 * config.head_size * config.width


def resizes(model, pyramid):
    """Of the source's keys and values in block 0, forward."""
    if model.transformer.conditioning != "sar":
        return 0
    grid = floats(*pyramid.last, model.transformer.width)
    return 2 * sum(count(lambda x, scale=scale: area_resize(x, scale), grid) for scale in pyramid.grids)


@pytest.mark.parametrize("conditioning", ["sar", "finest", "full"])
def test_forward_pass_of_the_transformer(conditioning):
    """To the last operation."""
    model = model_of(conditioning=conditioning)
    pyramid = editor_pyramid(model)
    source, target = pyramid.source_tokens(conditioning), pyramid.target_tokens
    bits, width = model.transformer.token_bits, model.text.width
    counted = count(
        lambda params, *arguments: Transformer(model.transformer, pyramid).apply({"params": params}, *arguments),
        abstract_params(model, "transformer"),
        floats(BATCH, source, bits),
        floats(BATCH, target - 1, bits),
        floats(BATCH, TEXT, width),
        jax.ShapeDtypeStruct((BATCH,), jnp.int32),
    )
    flops = example_flops(model, pyramid, TEXT)
    assert flops.tokens == source + target
    assert counted == BATCH * (flops.transformer + rope(model, flops.tokens) + resizes(model, pyramid))


def test_encoders():
    """To the last operation; the published tokenizer and text encoder as well as the tiny ones."""
    for model in (TINY, dataclasses.replace(preset("125m"), pixel_budget="0.06M")):
        size = image_size(model, editor_pyramid(model))
        encode = lambda params, images, model=model: encode_images(params, images, model)  # noqa: E731
        images = jax.ShapeDtypeStruct((BATCH, *size, 3), jnp.uint8)
        counted = count(encode, abstract_params(model, "tokenizer"), images)
        assert counted == BATCH * encoder_flops(model.tokenizer, size)
        encode_text = lambda params, *text, model=model: T5Encoder(model.text).apply({"params": params}, *text)  # noqa: E731
        ids = jax.ShapeDtypeStruct((BATCH, TEXT), jnp.int32), jax.ShapeDtypeStruct((BATCH,), jnp.int32)
        assert count(encode_text, abstract_params(model, "text"), *ids) == BATCH * text_flops(model.text, TEXT)


def step_count(run, pyramid):
    """Operations of one training step of `run`, counted."""
    trained = {
        part: abstract_params(run.model, part) for part in ("transformer", "text") if part != "text" or run.train_text
    }
    frozen = {part: abstract_params(run.model, part) for part in ("tokenizer", "text") if part not in trained}
    size = image_size(run.model, pyramid)
    batch = {
        "text_ids": jax.ShapeDtypeStruct((BATCH, TEXT), jnp.int32),
        "text_length": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
        "source": jax.ShapeDtypeStruct((BATCH, *size, 3), jnp.uint8),
        "target": jax.ShapeDtypeStruct((BATCH, *size, 3), jnp.uint8),
    }
    state = TrainState(step=np.int32(0), params=trained, opt_state=jax.eval_shape(SGD.init, trained))
    return count(make_step(run, pyramid, SGD), state, frozen, batch, KEY)


def run_of(model, **fields):
    quiet = LossConfig(noise_max=0.0)
    return RunConfig(name="test", model=model, loss=quiet, data=DataConfig(text_tokens=TEXT), **fields)


def test_a_training_step_is_three_forward_passes():
    """Exactly, but for a list: what needs no gradient of its inputs, and what the convention leaves out."""
    model = model_of()
    pyramid = editor_pyramid(model)
    run = run_of(model)
    flops = run_flops(run, pyramid)
    width, bits, text_width = model.transformer.width, model.transformer.token_bits, model.text.width
    target = pyramid.target_tokens
    # Inputs that are data: tokens of bits.
    less = (flops.tokens - 1) * 2 * bits * width
    # The rows of text are trained where they replace a text, so their gradient is taken.
    head = target * 2 * width * 2 * bits + 2 * width * 2 * width  # the backward pass recomputes its logits
    weights = 2 * target  # of the loss: a product with a constant, and its gradient
    more = head + 2 * weights + 2 * rope(model, flops.tokens) + 2 * resizes(model, pyramid)
    features = floats(BATCH, *pyramid.cells(model.patchify).last, model.tokenizer.bits)
    tokens = count(lambda *sides: jax.tree.leaves(make_tokens(*sides, model, pyramid)), features, features)
    counted = step_count(run, pyramid)
    assert text_width == width  # or the two lines above would hide it
    assert counted == BATCH * (flops.training_with_encoders - less + more) + tokens


def test_recomputation_counts_again():
    """Full rematerialization is one more forward pass of the blocks, and one more of the scores of attention.

    To the last operation, and no model FLOP. Blocks are recomputed, and their scores once more, so that
    those of one product are kept at a time.
    """
    counted = {}
    for remat in ("none", "named", "full"):
        model = model_of(remat=remat)
        pyramid = editor_pyramid(model)
        counted[remat] = step_count(run_of(model), pyramid)
        flops = run_flops(run_of(model), pyramid)
        assert flops == run_flops(run_of(model_of()), pyramid)
    assert counted["none"] < counted["named"] <= counted["full"]
    blocks = flops.linear + flops.self_attention + flops.cross_attention
    width, depth = model.transformer.width, model.transformer.depth
    scores = flops.self_attention // 2 + depth * 2 * width * flops.tokens * TEXT
    again = blocks + scores + rope(model, flops.tokens) + resizes(model, pyramid)
    assert counted["full"] - counted["none"] == BATCH * again


def test_figures_of_8b():
    """As worked out by hand for 512 px: 3545 tokens of 14.4 GFLOP in linear layers and 1.23 in attention."""
    model = preset("8b")
    flops = example_flops(model, editor_pyramid(model), 512)
    assert flops.tokens == 3545
    assert flops.linear / flops.tokens == pytest.approx(14.4e9, rel=2e-3)
    assert flops.self_attention / flops.tokens == pytest.approx(1.23e9, rel=2e-3)
    # With these two alone an example is 166 TFLOP; its 512 text tokens and the rest make it 172.
    assert 3 * (flops.linear + flops.self_attention) == pytest.approx(166.1e12, rel=1e-3)
    assert flops.training == pytest.approx(172.5e12, rel=1e-3)
    assert flops.training_with_encoders - flops.training == flops.text + flops.tokenizer


def test_what_is_trained_counts_three_times():
    model, pyramid = model_of(), editor_pyramid(TINY)
    frozen = run_flops(run_of(model), pyramid)
    trained = run_flops(run_of(model, train_text=True), pyramid)
    assert trained.training == frozen.training + 3 * frozen.text
    assert trained.training_with_encoders == frozen.training_with_encoders + 2 * frozen.text
    ahead = run_flops(
        dataclasses.replace(run_of(model), data=DataConfig(text_tokens=TEXT, features="precomputed")), pyramid
    )
    assert ahead.tokenizer == 0 and ahead.training == frozen.training
    stage = run_flops(run_of(model), pyramid.first(2), pyramid)
    assert stage.tokens == 4 + 5 and stage.tokenizer == frozen.tokenizer  # images are those of the whole pyramid


def test_counting():
    """Scans, branches, sharded bodies, dead code, gradients of convolutions; what cannot be counted is refused."""
    x = floats(4, 4)
    product = 2 * 4**3
    assert count(lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, length=7)[0], x) == 7 * product
    assert count(lambda x: (x @ x @ x, x @ x)[1], x) == product
    assert count(lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x), x) == product
    assert count(jax.value_and_grad(jax.checkpoint(lambda x: jnp.sum(jnp.sin(x @ x)))), x) == 4 * product
    with pytest.raises(ValueError, match="a loop of unknown length has matmuls in it"):
        count(lambda x: jax.lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ x, x), x)
    mesh = jax.make_mesh((1,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=jax.P("a"), out_specs=jax.P("a"))
    assert count(split, x) == product
    images, kernel = floats(1, 8, 8, 3), floats(3, 3, 3, 5)
    strided = lambda x, k: jnp.sum(  # noqa: E731
        jax.lax.conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )
    forward = 2 * 4 * 4 * 5 * 9 * 3
    assert count(strided, images, kernel) == forward
    assert count(jax.grad(strided, argnums=1), images, kernel) == forward
    assert count(jax.grad(strided, argnums=0), images, kernel) == forward


def test_sharded_body_counts_every_shard():
    mesh = jax.sharding.AbstractMesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=jax.P("a"), out_specs=jax.P("a"))
    assert count(split, floats(16, 3)) == 8 * 2 * 2 * 2 * 3


def test_sizes_are_the_published_ones():
    """Half the operations of a token are the parameters it meets: the text encoder's known sizes."""
    assert text_flops(text_preset("xl"), 1) / 2 == pytest.approx(1.15e9, rel=0.02)
    assert TransformerConfig().width * 14 * TransformerConfig().width * 32 == pytest.approx(1.88e9, rel=0.01)
