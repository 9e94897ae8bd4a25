"""The tokenizer's training step: its terms, what it trains, reconstruction."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varedit_jax.config import OptimizerConfig, TokenizerConfig, TokenizerRunConfig, preset
from varedit_jax.errors import UserError
from varedit_jax.parameters import abstract_params
from varedit_jax.scales import editor_pyramid
from varedit_jax.tokenizer import quantizer
from varedit_jax.tokenizer.autoencoder import Autoencoder
from varedit_jax.tokenizer.pixels import to_model_range, to_uint8
from varedit_jax.training import tokenizer_step
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.self_correction import draw_flips
from varedit_jax.training.state import TrainState
from varedit_jax.weights.directory import save_weights

MODEL = dataclasses.replace(
    preset("tiny"),
    tokenizer=TokenizerConfig(
        bits=4, channel_multipliers=(1, 1), base_channels=8, norm_groups=2, encoder_blocks=1, decoder_blocks=1
    ),
    grids=((1, 1), (3, 2), (4, 4)),
)
CELLS = editor_pyramid(MODEL)
RUN = TokenizerRunConfig(
    name="test", model=MODEL, l1_weight=2.0, perceptual_weight=3.0, commitment_weight=0.5, entropy_weight=0.25
)
SGD = optax.sgd(0.02)
KEY = jax.random.key(0)


def squares(output: jax.Array, target: jax.Array) -> jax.Array:
    """Replaces a perceptual distance."""
    return jnp.mean(jnp.square(output - target))


@pytest.fixture(scope="module")
def params(lively):
    return lively(abstract_params(MODEL, "tokenizer"))


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {name: draw.integers(0, 256, (2, 8, 8, 3), np.uint8) for name in ("source", "target")}


@pytest.fixture(scope="module")
def step(quick_jit):
    """The step that trains both halves, by plain gradient descent."""
    return quick_jit(tokenizer_step.make_step(RUN, SGD, squares))


@pytest.fixture(scope="module")
def forward(quick_jit):
    """Features, residuals, unclipped and clipped output of images, put together by hand."""

    def run(params, images):
        model = Autoencoder(MODEL.tokenizer)
        features = model.apply({"params": params}, to_model_range(images), method=model.encode)
        residuals = quantizer.quantize(features, CELLS)
        outputs = [model.apply({"params": params}, residuals.quantized, clip, method=model.decode) for clip in (0, 1)]
        return features, residuals, *outputs

    return quick_jit(run)


def test_terms_and_their_weights(step, forward, params, batch):
    """Both images of a pair are reconstructed; the loss is the weighted sum of the terms."""
    images = np.concatenate([batch["source"], batch["target"]])
    features, residuals, output, _ = (jax.device_get(x) for x in forward(params, images))
    scaled = images.astype(np.float32) / 127.5 - 1
    state, metrics = step(TrainState(step=np.int32(4), params=params, opt_state=SGD.init(params)), batch, KEY)
    assert int(state.step) == 5
    expected = {
        "l1": np.abs(output - scaled).mean(),
        "perceptual": ((output - scaled) ** 2).mean(),
        "commitment": ((features - residuals.quantized) ** 2).mean(),
        "bit_balance": [bits.mean() for bits in residuals.bits],
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    m = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
    entropy = m["token_entropy"] - m["batch_entropy"]
    assert abs(entropy) > 1e-3
    total = 2 * m["l1"] + 3 * m["perceptual"] + 0.5 * m["commitment"] + 0.25 * entropy
    assert m["loss"] == pytest.approx(total, rel=1e-5)
    for half in ("encoder", "decoder"):
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params[half], params[half])
        assert moved["conv_in"]["kernel"] > 0 and moved["conv_out"]["kernel"] > 0


def test_loss_falls(step, params, batch):
    state, losses = TrainState(step=np.int32(0), params=params, opt_state=SGD.init(params)), []
    for _ in range(20):
        state, metrics = step(state, batch, KEY)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0], losses


def test_decoder_alone(params, batch, quick_jit):
    """With `train_encoder=False` the encoder stays as it is to the last bit, whatever the weight decay."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5), 10)
    config = dataclasses.replace(RUN, train_encoder=False)
    state = TrainState(step=np.int32(0), params=params, opt_state=optimizer.init(params))
    state, metrics = quick_jit(tokenizer_step.make_step(config, optimizer))(state, batch, KEY)
    jax.tree.map(np.testing.assert_array_equal, state.params["encoder"], params["encoder"])
    assert np.abs(state.params["decoder"]["conv_in"]["kernel"] - params["decoder"]["conv_in"]["kernel"]).max() > 0.01
    assert "perceptual" not in metrics


def test_noise(params, batch, quick_jit):
    """With `noise_max` the decoder gets flipped bits, by the self-correction's draws from the key."""
    model = Autoencoder(MODEL.tokenizer)
    loss_fn = quick_jit(tokenizer_step.make_loss(dataclasses.replace(RUN, noise_max=0.3)))

    def by_hand(params, scaled, key):
        features = model.apply({"params": params}, scaled, method=model.encode)
        flips = draw_flips(jax.random.split(key)[0], 2, 4, CELLS, noise_scales=3, noise_max=0.3)
        quantized = quantizer.quantize(features, CELLS, flips).quantized
        output = model.apply({"params": params}, quantized, False, method=model.decode)
        return jnp.mean(jnp.abs(output - scaled)), sum(jnp.sum(flip) for flip in flips)

    by_hand = quick_jit(by_hand)
    found = []
    for seed in range(2):
        key = jax.random.key(seed)
        expected, flipped = by_hand(params, to_model_range(batch["source"]), key)
        assert flipped > 0
        found.append(float(loss_fn(params, to_model_range(batch["source"]), key)[1]["l1"]))
        assert found[-1] == pytest.approx(float(expected), rel=1e-5)
    assert found[0] != pytest.approx(found[1], rel=1e-3)


def test_partial_share(params, batch, quick_jit):
    """Of three scales, half or more without the last are the first two; with a share of 1/2 images get them or all."""
    model = Autoencoder(MODEL.tokenizer)
    loss_fn = quick_jit(tokenizer_step.make_loss(dataclasses.replace(RUN, partial_share=0.5)))

    def by_hand(params, scaled):
        residuals = quantizer.quantize(model.apply({"params": params}, scaled, method=model.encode), CELLS)
        outputs = [model.apply({"params": params}, x, False, method=model.decode) for x in residuals.accumulated]
        return jnp.stack([jnp.mean(jnp.abs(output - scaled), axis=(1, 2, 3)) for output in outputs])

    scaled = to_model_range(batch["source"])
    errors_K2 = quick_jit(by_hand)(params, scaled)
    pairs = {(a, b): (errors_K2[a, 0] + errors_K2[b, 1]) / 2 for a in range(3) for b in range(3)}
    found = set()
    for seed in range(12):
        l1 = loss_fn(params, scaled, jax.random.key(seed))[1]["l1"]
        found |= {pair for pair, value in pairs.items() if abs(float(value) - float(l1)) < 1e-5}
    assert found == {(1, 1), (1, 2), (2, 1), (2, 2)}


def test_start(params, tmp_path):
    """From `init` or from a directory, with a fresh optimizer state."""
    optimizer = make_optimizer(RUN.optimizer, 10)
    abstract = jax.eval_shape(tokenizer_step.make_init(RUN, optimizer))
    assert abstract.params == abstract_params(MODEL, "tokenizer")

    def ones():
        return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), abstract)

    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, np.ones_like(leaf)), tokenizer_step.start(RUN, ones))
    save_weights(tmp_path / "shipped", MODEL, {"tokenizer": params})
    config = dataclasses.replace(RUN, init_from=str(tmp_path / "shipped"))
    jax.tree.map(np.testing.assert_array_equal, tokenizer_step.start(config, ones).params, params)
    with pytest.raises(UserError, match="nowhere holds no tokenizer weights"):
        tokenizer_step.start(dataclasses.replace(RUN, init_from=str(tmp_path / "nowhere")), ones)


def test_reconstruct(forward, params, batch, quick_jit):
    """Through the bits and back: what decoding the quantized feature gives, but for one level of rounding."""
    found = quick_jit(tokenizer_step.make_reconstruct(MODEL))(params, batch["source"])
    assert found.shape == batch["source"].shape and found.dtype == jnp.uint8
    expected = to_uint8(np.asarray(forward(params, np.concatenate([batch["source"], batch["target"]]))[3][:2]))
    assert np.ptp(expected) > 50
    assert np.abs(np.asarray(found, int) - expected).max() <= 1
