"""The whole transformer: who may touch whom, by gradient; the text; what it refuses.

The golden data show that its numbers are the published ones, test_sampler.py that the cached passes give the same.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varedit_jax.config import preset
from varedit_jax.parameters import abstract_params, init_transformer
from varedit_jax.scales import Pyramid
from varedit_jax.transformer.model import Transformer, center_features

# Oblong, and below its full schedule, so that positions follow the released layout.
PYRAMID = Pyramid(((1, 1), (2, 3), (4, 5)), ((1, 1), (2, 3), (4, 5), (8, 10)))
TARGETS = tuple(PYRAMID.slices())
LENGTHS = np.array([5, 3], np.int32)
TEXT_ROWS = 7
BITS, WIDTH = 4, 32


def transformer(**changes: Any) -> Transformer:
    return Transformer(dataclasses.replace(preset("tiny").transformer, **changes), PYRAMID)


@pytest.fixture(scope="module")
def params(lively):
    return lively(abstract_params(preset("tiny"), "transformer", PYRAMID))


def inputs(conditioning: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source, target inputs and text of two samples."""
    draw = np.random.default_rng(0)
    shapes = ((PYRAMID.source_tokens(conditioning), BITS), (PYRAMID.target_tokens - 1, BITS), (TEXT_ROWS, WIDTH))
    source, targets, text = (draw.normal(size=(2, *shape)).astype(np.float32) for shape in shapes)
    return source, targets, text


def everything(model: Transformer, source: Any, targets: Any, text: Any) -> tuple[Any, Any]:
    """Target logits, and all that is left of the source: its outputs, and its keys and values in every block."""
    memory = model.embed_text(text, LENGTHS)
    tokens = jnp.concatenate([model._first_token(memory), model.word_embed(targets)], axis=1)
    tokens += model._embed_levels(range(PYRAMID.scales))
    x = jnp.concatenate([model._embed_source(source), tokens], axis=1)
    x, caches = model._blocks(x, memory, None, slice(None))
    S = source.shape[1]
    kept = [x[..., :S, :] for cache in (caches.block_0, caches.blocks) for x in (cache.k, cache.v)]
    return model.logits(x[:, S:], memory.cond_BC), [x[:, :S], *kept]


class Influence(NamedTuple):
    conditioning: str
    pull: Any  # (cotangent of logits, cotangents of the source's) -> gradients of source, targets and text
    logits: np.ndarray
    of_source: list[np.ndarray]


@pytest.fixture(scope="module", params=["sar", "finest", "full"])
def influence(request, params, quick_jit) -> Influence:
    model = transformer(conditioning=request.param)
    arguments = inputs(request.param)

    def forward(*arguments):
        return model.apply({"params": params}, *arguments, method=everything)

    @quick_jit
    def run(arguments, cotangent):
        outputs, pull = jax.vjp(forward, *arguments)
        return outputs, pull(cotangent)

    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(forward, *arguments))
    logits, of_source = jax.device_get(run(arguments, zeros)[0])

    def pull(of_logits=None, of_source=None):
        cotangent = (zeros[0] if of_logits is None else of_logits, zeros[1] if of_source is None else of_source)
        return jax.device_get(run(arguments, cotangent)[1])

    return Influence(request.param, pull, logits, of_source)


def touched(gradient: np.ndarray) -> np.ndarray:
    """Largest gradient of every token [B, tokens]."""
    return np.abs(gradient).max(axis=-1)


def random_like(x: np.ndarray) -> np.ndarray:
    return np.random.default_rng(1).normal(size=x.shape).astype(np.float32)


def of_scale(logits: np.ndarray, scale: int) -> np.ndarray:
    cotangent = np.zeros_like(logits)
    cotangent[:, TARGETS[scale]] = random_like(logits)[:, TARGETS[scale]]
    return cotangent


@pytest.mark.parametrize("scale", range(3))
def test_scales_are_causal(influence, scale):
    """The logits of scale k depend on every input of scales <= k, and with gradient exactly 0 on those beyond.

    The inputs of scale k are among what it sees: they carry the coarser scales. Scale 0 has none: the text feeds it.
    """
    _, targets, _ = influence.pull(of_scale(influence.logits, scale))
    stop = TARGETS[scale].stop - 1  # inputs begin with scale 1
    assert (touched(targets)[:, stop:] == 0).all()
    assert (touched(targets)[:, :stop] > 0).all()


@pytest.mark.parametrize("scale", range(3))
def test_every_scale_depends_on_source_and_text(influence, scale):
    """On all of the source; for "full" on its scales up to k alone."""
    source, _, text = influence.pull(of_scale(influence.logits, scale))
    stop = TARGETS[scale].stop if influence.conditioning == "full" else source.shape[1]
    assert (touched(source)[:, :stop] > 0).all()
    assert (touched(source)[:, stop:] == 0).all()
    for sample, length in enumerate(LENGTHS):
        assert (touched(text)[sample, :length] > 0).all()
        assert (touched(text)[sample, length:] == 0).all()


def test_source_never_depends_on_the_target(influence):
    """Neither its outputs nor its keys and values, in any block: that is why they can be made once."""
    source, targets, text = influence.pull(None, [random_like(x) for x in influence.of_source])
    assert (targets == 0).all()
    assert (touched(source) > 0).all()
    assert (touched(text)[0, :5] > 0).all()


def test_samples_do_not_touch_each_other(influence):
    cotangent = random_like(influence.logits)
    cotangent[1] = 0
    for gradient in influence.pull(cotangent):
        assert (gradient[1] == 0).all()
        assert (gradient[0] != 0).any()


@pytest.fixture(scope="module")
def forward(params, quick_jit):
    """Teacher-forced logits of the "sar" transformer: `(source, targets, text, lengths, unconditional)`."""
    model = transformer()
    return quick_jit(lambda *arguments: model.apply({"params": params}, *arguments))


def test_call_gives_the_same_logits(influence, forward):
    if influence.conditioning == "sar":
        found = forward(*inputs("sar"), LENGTHS, np.zeros(2, bool))
        np.testing.assert_allclose(found, influence.logits, rtol=0, atol=2e-6)
        assert found.shape == (2, 27, BITS, 2)
        assert np.std(found) > 0.1


def test_padding_rows_of_text_never_matter(forward):
    source, targets, text = inputs("sar")
    wanted = forward(source, targets, text, LENGTHS, np.zeros(2, bool))
    for junk in (0.0, 1e4):
        other = text.copy()
        for sample, length in enumerate(LENGTHS):
            other[sample, length:] = junk
        np.testing.assert_array_equal(forward(source, targets, other, LENGTHS, np.zeros(2, bool)), wanted)


def test_unconditional_text(forward, params):
    """The learned rows stand in for the features at the same length, sample by sample."""
    source, targets, text = inputs("sar")
    plain = forward(source, targets, text, LENGTHS, np.zeros(2, bool))
    found = forward(source, targets, text, LENGTHS, np.array([False, True]))
    np.testing.assert_array_equal(found[0], plain[0])
    assert np.abs(found[1] - plain[1]).max() > 1e-2
    other = forward(source, targets, text + 1, LENGTHS, np.array([False, True]))
    np.testing.assert_array_equal(other[1], found[1])
    learned = np.stack([text[0], params["text_unconditional"][:TEXT_ROWS]])
    np.testing.assert_array_equal(forward(source, targets, learned, LENGTHS, np.zeros(2, bool)), found)
    longer = forward(source, targets, text, LENGTHS + 1, np.array([False, True]))
    assert np.abs(longer[1] - found[1]).max() > 1e-4


def test_first_token_and_levels(params):
    """Scale 0 is one token: cond + pos_start. Level k of the table goes to scale k, the last to the source."""
    model = transformer()

    def pieces(model, text):
        memory = model.embed_text(text, LENGTHS)
        return (
            memory.cond_BC,
            model._first_token(memory),
            model._embed_levels(range(3)),
            model._embed_levels(range(2, 3)),
        )

    cond, first, levels, of_source = model.apply({"params": params}, inputs("sar")[2], method=pieces)
    np.testing.assert_allclose(first[:, 0], cond + params["pos_start"][None], rtol=0, atol=1e-6)
    for scale, tokens in enumerate(TARGETS):
        for token in range(tokens.start, tokens.stop):
            np.testing.assert_array_equal(levels[0, token], params["level_embed"][scale])
    assert of_source.shape[1] == 20
    np.testing.assert_array_equal(of_source[0], np.tile(params["level_embed"][2], (20, 1)))


def test_text_pooling(params):
    """Attention with one learned query a head over the real rows; the query is scaled by 1 / sqrt(head size)."""
    text = inputs("sar")[2]
    model = transformer(text_width=32)
    heads = model.config.text_pool_heads
    pool = params["text_pool"]
    size = WIDTH // heads
    cond = model.apply({"params": params}, text, LENGTHS, method=model.embed_text).cond_BC
    for sample, length in enumerate(LENGTHS):
        rows = text[sample, :length]
        rows = rows / np.sqrt(np.mean(rows**2, axis=-1, keepdims=True) + 1e-6) * params["text_norm"]["scale"]
        k, v = np.einsum("te,enhd->nthd", rows, pool["kv_kernel"])
        v = v + pool["v_bias"]
        weights = np.exp(np.einsum("hd,thd->ht", pool["query"], k) / np.sqrt(size))
        pooled = np.einsum("ht,thd->hd", weights / weights.sum(-1, keepdims=True), v).reshape(-1)
        wanted = pooled @ pool["proj"]["kernel"] + pool["proj"]["bias"]
        np.testing.assert_allclose(cond[sample], wanted, rtol=0, atol=5e-6)


def test_bfloat16_compute_is_near_float32(params, forward, quick_jit):
    model = transformer(dtype="bfloat16")
    arguments = (*inputs("sar"), LENGTHS, np.zeros(2, bool))
    found = quick_jit(lambda *arguments: model.apply({"params": params}, *arguments))(*arguments)
    exact = np.asarray(forward(*arguments))
    assert found.dtype == jnp.float32
    difference = np.asarray(found) - exact
    assert 0 < np.sqrt(np.mean(difference**2)) < 0.03 * np.std(exact)  # 8 bits of mantissa, three blocks


@pytest.mark.parametrize("more_source, more_inputs", [(1, 0), (0, 1), (-20, 0)])
def test_numbers_of_tokens_that_do_not_fit(params, more_source, more_inputs):
    source, targets, text = (np.zeros((1, n, w), np.float32) for n, w in ((20, BITS), (26, BITS), (3, WIDTH)))
    source = np.zeros((1, 20 + more_source, BITS), np.float32)
    targets = np.zeros((1, 26 + more_inputs, BITS), np.float32)
    sentence = f"{20 + more_source} source and {26 + more_inputs} input tokens.*'sar' needs 20 and 26"
    with pytest.raises(ValueError, match=sentence):
        transformer().apply({"params": params}, source, targets, text, LENGTHS[:1])


def test_parameters_serve_every_conditioning_layout_and_pyramid():
    config = preset("tiny")
    wanted = abstract_params(config, "transformer")
    for conditioning, layout in itertools.product(("finest", "full"), ("released", "paper")):
        changed = dataclasses.replace(config.transformer, conditioning=conditioning, rope_layout=layout)
        found = abstract_params(dataclasses.replace(config, transformer=changed), "transformer", PYRAMID)
        assert found == wanted


def test_input_scale_is_the_gain_of_new_token_embeddings(quick_jit):
    """Same key, so the kernel is a multiple, and other parameters are the same."""
    config = preset("tiny")
    loud = dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, initial_input_scale=3.0))

    def some(config):
        params = init_transformer(config, jax.random.key(0))
        return params["word_embed"]["kernel"], params["level_embed"]

    quiet, found = (quick_jit(lambda c=c: some(c))() for c in (config, loud))
    np.testing.assert_allclose(found[0], 3 * np.asarray(quiet[0]), rtol=1e-6)
    np.testing.assert_array_equal(found[1], quiet[1])


def test_absolute_positions_add_a_map_of_the_position_of_a_token(params):
    """Level and position, the same for a target token and for a source token there; nothing else is new."""
    config = preset("tiny")
    placed = dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, absolute_positions=True))
    shapes, with_positions = (abstract_params(c, "transformer", PYRAMID) for c in (config, placed))
    assert with_positions.pop("position_embed")["kernel"].shape == (16, WIDTH)
    assert with_positions == shapes
    kernel = np.random.default_rng(0).normal(size=(16, WIDTH)).astype(np.float32)
    variables = {"params": {**params, "position_embed": {"kernel": kernel}}}
    model = transformer(absolute_positions=True)
    positions, of_source = model.apply(
        variables, method=lambda m: (m._embed_levels(range(3)), m._embed_levels(range(2, 3)))
    )
    levels = np.asarray(params["level_embed"])
    for scale, tokens in enumerate(TARGETS):
        wanted = levels[scale][None] + center_features(PYRAMID.grids[scale]) @ kernel
        np.testing.assert_allclose(positions[0, tokens], wanted, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(of_source[0], positions[0, TARGETS[2]])


def test_features_of_centers():
    """Of one token, of the position and not the grid, and different for any two tokens of a published grid."""
    np.testing.assert_allclose(center_features((1, 1)), [[0] * 8 + [1] * 8])
    fine, coarse = center_features((6, 9)).reshape(6, 9, 16), center_features((2, 3)).reshape(2, 3, 16)
    np.testing.assert_allclose(fine[1::3, 1::3], coarse, atol=1e-6)
    features = center_features((64, 64))
    assert len(np.unique(features.round(4), axis=0)) == 64 * 64
