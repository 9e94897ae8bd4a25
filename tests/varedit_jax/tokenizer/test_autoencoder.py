"""The autoencoder's shapes, borders and range; the golden data shows that its numbers are the published ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varedit_jax.config import TokenizerConfig, preset
from varedit_jax.parameters import abstract_params
from varedit_jax.tokenizer.autoencoder import Autoencoder, Level

BARE = TokenizerConfig(bits=2, channel_multipliers=(1, 1), base_channels=2, norm_groups=1)


@pytest.mark.parametrize("bits, multipliers, stride", [(4, (1, 1, 2), 4), (3, (1, 2), 2), (5, (1,), 1)])
def test_shapes(bits, multipliers, stride):
    config = TokenizerConfig(
        bits=bits,
        channel_multipliers=multipliers,
        base_channels=4,
        norm_groups=2,
        encoder_blocks=1,
        decoder_blocks=1,
    )
    assert config.stride == stride
    model = Autoencoder(config)
    images = jax.ShapeDtypeStruct((2, 8, 12, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    encode, decode = (
        lambda p, x, method=method: model.apply(p, x, method=method) for method in (model.encode, model.decode)
    )
    features = jax.eval_shape(encode, params, images)
    assert features.shape == (2, 8 // stride, 12 // stride, bits)
    assert jax.eval_shape(decode, params, features) == images


def test_downsampling_looks_down_and_to_the_right():
    """One row of zeros at the bottom and one column at the right: the window of a cell starts at its own corner."""
    kernel = jnp.zeros((3, 3, 2, 2)).at[2, 2, 0, 0].set(1.0)  # takes what is two rows below and two columns right
    params = {"downsample": {"kernel": kernel, "bias": jnp.zeros(2)}}
    plane = jnp.arange(16.0).reshape(1, 4, 4, 1) * jnp.ones((1, 1, 1, 2))
    found = Level(BARE, 2, 0, "down").apply({"params": params}, plane)
    np.testing.assert_array_equal(found[0, :, :, 0], [[10, 0], [0, 0]])


def test_upsampling_repeats_before_it_convolves():
    kernel = jnp.zeros((3, 3, 2, 2)).at[1, 1, 0, 0].set(1.0)
    params = {"upsample": {"kernel": kernel, "bias": jnp.zeros(2)}}
    plane = jnp.arange(4.0).reshape(1, 2, 2, 1) * jnp.ones((1, 1, 1, 2))
    found = Level(BARE, 2, 0, "up").apply({"params": params}, plane)
    np.testing.assert_array_equal(found[0, :, :, 0], np.repeat(np.repeat([[0, 1], [2, 3]], 2, 0), 2, 1))


@pytest.fixture(scope="module")
def tiny(lively):
    config = preset("tiny")
    return Autoencoder(config.tokenizer), lively(abstract_params(config, "tokenizer"))


def test_decoder_clips_unless_asked_not_to(tiny, quick_jit):
    model, params = tiny
    features = 3 * np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)

    def both(params, x):
        return [model.apply({"params": params}, x, clip, method=model.decode) for clip in (True, False)]

    clipped, loose = quick_jit(both)(params, features)
    assert np.abs(loose).max() > 1
    np.testing.assert_array_equal(clipped, np.clip(loose, -1, 1))


def test_images_do_not_see_each_other(tiny, quick_jit):
    """Group norm is over one image: what shares its batch does not matter."""
    model, params = tiny
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    encode = quick_jit(lambda p, x: model.apply({"params": p}, x, method=model.encode))
    other = np.concatenate([images[:1], 0.1 * images[1:]])
    np.testing.assert_array_equal(encode(params, images)[0], encode(params, other)[0])


@pytest.mark.parametrize("shape, size", [((1, 18, 16, 3), "18 x 16"), ((1, 16, 17, 3), "16 x 17")])
def test_sides_that_are_no_multiple_of_the_stride_are_refused(tiny, shape, size):
    model, params = tiny
    with pytest.raises(ValueError, match=f"image of {size} px: sides must be multiples of 4"):
        model.apply({"params": params}, jnp.zeros(shape), method=model.encode)
