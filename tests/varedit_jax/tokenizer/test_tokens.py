"""Images to the transformer's condition, inputs and labels, and bits back to images."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from varedit_jax.config import EditorConfig, preset
from varedit_jax.parameters import abstract_params
from varedit_jax.resize import area_resize
from varedit_jax.scales import editor_pyramid
from varedit_jax.tokenizer import quantizer, tokens
from varedit_jax.tokenizer.autoencoder import Autoencoder

GRIDS = ((1, 1), (2, 3), (4, 5))


def editor(patchify: bool = False, conditioning: str = "sar", quantized_source: bool = False) -> EditorConfig:
    tiny = preset("tiny")
    transformer = dataclasses.replace(tiny.transformer, conditioning=conditioning, token_bits=16 if patchify else 4)
    return dataclasses.replace(
        tiny, transformer=transformer, patchify=patchify, grids=GRIDS, quantized_source=quantized_source
    )


def features(config: EditorConfig, seed: int = 0) -> jnp.ndarray:
    grid = editor_pyramid(config).cells(config.patchify).last
    draw = np.random.default_rng(seed)
    return jnp.asarray(draw.normal(size=(2, *grid, config.tokenizer.bits)), jnp.float32)


@pytest.mark.parametrize("patchify", [False, True])
@pytest.mark.parametrize("conditioning", ["sar", "finest"])
def test_condition_is_the_raw_feature_at_the_last_grid(patchify, conditioning):
    config = editor(patchify, conditioning)
    source = features(config)
    found = tokens.source_tokens(source, config, editor_pyramid(config))
    assert found.shape == (2, 20, config.transformer.token_bits)
    np.testing.assert_array_equal(quantizer.to_cells(found, (4, 5), patchify), source)


@pytest.mark.parametrize("patchify", [False, True])
def test_full_conditioning_has_the_source_of_all_scales(patchify, quick_jit):
    config = editor(patchify, "full")
    pyramid = editor_pyramid(config)
    source = features(config)
    cells = pyramid.cells(patchify)

    def make(source):
        resized = [area_resize(source, grid) for grid in cells.grids]
        return tokens.source_tokens(source, config, pyramid), resized

    found, resized = quick_jit(make)(source)
    assert found.shape == (2, pyramid.source_tokens("full"), config.transformer.token_bits)
    for part, grid, wanted in zip(pyramid.slices(), GRIDS, resized, strict=True):
        np.testing.assert_allclose(quantizer.to_cells(found[:, part], grid, patchify), wanted, rtol=0, atol=1e-6)


def test_quantized_source_is_what_the_residual_loop_makes_of_it():
    config = editor(quantized_source=True)
    pyramid = editor_pyramid(config)
    source = features(config)
    found = tokens.source_tokens(source, config, pyramid)
    wanted = quantizer.quantize(source, pyramid).quantized
    np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)
    assert np.abs(wanted - source).max() > 0.1


@pytest.mark.parametrize("patchify", [False, True])
def test_inputs_and_labels(patchify, quick_jit):
    config = editor(patchify)
    pyramid = editor_pyramid(config)
    cells = pyramid.cells(patchify)
    source, target = features(config), features(config, seed=1)

    def make(source, target):
        made = tokens.make_tokens(source, target, config, pyramid)
        return made, tokens.source_tokens(source, config, pyramid), quantizer.quantize(target, cells)

    made, condition, residuals = quick_jit(make)(source, target)
    np.testing.assert_array_equal(made.source_BSN, condition)
    assert made.labels_BLN.shape == (2, 27, config.transformer.token_bits)
    assert made.inputs_BLN.shape == (2, 26, config.transformer.token_bits)
    for scale, part in enumerate(pyramid.slices()):
        labels = quantizer.to_cells(made.labels_BLN[:, part], GRIDS[scale], patchify)
        np.testing.assert_array_equal(labels, residuals.bits[scale])
        if scale:
            inputs = made.inputs_BLN[:, part.start - 1 : part.stop - 1]
            np.testing.assert_array_equal(
                quantizer.to_cells(inputs, GRIDS[scale], patchify), residuals.inputs[scale - 1]
            )


def test_flips_change_the_inputs_of_the_target_alone():
    config = editor()
    pyramid = editor_pyramid(config)
    source, target = features(config), features(config, seed=1)
    flips = (jnp.ones((2, 1, 1, 4), bool),)
    plain = tokens.make_tokens(source, target, config, pyramid)
    flipped = tokens.make_tokens(source, target, config, pyramid, flips)
    np.testing.assert_array_equal(flipped.source_BSN, plain.source_BSN)
    np.testing.assert_array_equal(flipped.labels_BLN[:, :1], plain.labels_BLN[:, :1])
    np.testing.assert_allclose(flipped.inputs_BLN[:, :6], -plain.inputs_BLN[:, :6], rtol=0, atol=1e-6)


def test_one_scale_has_labels_and_no_inputs():
    config = dataclasses.replace(editor(), grids=((4, 5),))
    made = tokens.make_tokens(features(config), features(config), config, editor_pyramid(config))
    assert made.inputs_BLN.shape == (2, 0, 4)
    assert made.labels_BLN.shape == (2, 20, 4)


@pytest.fixture(scope="module")
def autoencoder(lively, quick_jit):
    """The tiny tokenizer with random parameters: (parameters, encode, decode), the latter with unclipped output."""
    config = preset("tiny")
    params = lively(abstract_params(config, "tokenizer"))
    model = Autoencoder(config.tokenizer)
    encode = quick_jit(lambda p, x: model.apply({"params": p}, x, method=model.encode))
    decode = quick_jit(lambda p, x: model.apply({"params": p}, x, False, method=model.decode))
    return params, encode, decode


PIXELS = np.random.default_rng(0).integers(0, 256, (2, 16, 20, 3), np.uint8)


def test_encoder_takes_pixels_in_the_models_range(autoencoder, quick_jit):
    params, encode, _ = autoencoder
    config = preset("tiny")
    found = quick_jit(lambda p, x: tokens.encode_images(p, x, config))(params, PIXELS)
    assert found.shape == (2, 4, 5, 4)
    assert found.dtype == jnp.float32
    # Two programs round the pixels differently: 1e-5 is what features of published weights are held to.
    np.testing.assert_allclose(found, encode(params, PIXELS.astype(np.float32) / 255 * 2 - 1), rtol=0, atol=1e-5)


def test_bits_of_the_first_scales_decode_to_the_image_so_far(autoencoder, quick_jit):
    params, _, decode = autoencoder
    config = editor()
    pyramid = editor_pyramid(config)
    bits = quantizer.quantize(features(config), pyramid).bits
    for stop in (1, 3):
        found = quick_jit(lambda p, b: tokens.decode_bits(p, b, config, pyramid))(params, bits[:stop])
        floats = decode(params, quantizer.dequantize(bits[:stop], pyramid))
        wanted = np.floor((np.clip(floats, -1, 1) + 1) / 2 * 255)
        assert found.shape == (2, 16, 20, 3)
        assert found.dtype == jnp.uint8
        # One level: the two programs may round a value that is almost a whole number differently.
        assert np.abs(np.asarray(found, np.float32) - wanted).max() <= 1
        assert np.mean(np.asarray(found, np.float32) == wanted) > 0.99
        assert len(np.unique(wanted)) > 50
