"""Training step of the tokenizer: reconstruction through the quantizer (model.md, sections 2 and 3)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from varedit_jax.config import EditorConfig, TokenizerRunConfig
from varedit_jax.parameters import abstract_params
from varedit_jax.scales import editor_pyramid
from varedit_jax.tokenizer import quantizer
from varedit_jax.tokenizer.autoencoder import Autoencoder
from varedit_jax.tokenizer.pixels import to_model_range
from varedit_jax.tokenizer.tokens import decode_bits, encode_images
from varedit_jax.training.self_correction import draw_flips
from varedit_jax.training.state import TrainState
from varedit_jax.types import Metrics
from varedit_jax.weights.native import load_part


def make_loss(
    config: TokenizerRunConfig, perceptual: Callable[[jax.Array, jax.Array], jax.Array] | None = None
) -> Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Metrics]]:
    """Returns the loss of images: `(params, images float32 [B, y, x, 3] in [-1, 1], key) -> (loss, metrics)`.

    L1 + perceptual distance (if given: a function of two image batches) + commitment + entropy terms, weighted by
    the config. With `noise_max`, bits are flipped as in the transformer's self-correction, so that the decoder learns
    to cope with a transformer's errors. With `partial_share`, that share of the images is decoded from its first scales
    alone, half of them or more, so that the coarse bits describe the image. Metrics: the terms, and `bit_balance`, the
    share of ones of each scale.
    """
    model = Autoencoder(config.model.tokenizer)
    cells = editor_pyramid(config.model).cells(config.model.patchify)

    def loss_fn(params: Any, images: jax.Array, key: jax.Array) -> tuple[jax.Array, Metrics]:
        features = model.apply({"params": params}, images, method=model.encode)
        if not config.train_encoder:
            features = jax.lax.stop_gradient(features)
        flip_key, partial_key = jax.random.split(key)
        flips = draw_flips(flip_key, len(features), features.shape[-1], cells, cells.scales, config.noise_max)
        residuals = quantizer.quantize(features, cells, flips)
        shown = _first_scales(residuals, partial_key, config.partial_share)
        quantized = quantizer.straight_through(features, shown)
        output = model.apply({"params": params}, quantized, False, method=model.decode)
        l1 = jnp.mean(jnp.abs(output - images))
        commitment = quantizer.commitment(features, residuals.quantized)
        token_entropy, batch_entropy = quantizer.bit_entropy(features, residuals, cells, config.entropy_temperature)
        loss = (
            config.l1_weight * l1
            + config.commitment_weight * commitment
            + config.entropy_weight * (token_entropy - batch_entropy)
        )
        metrics = {
            "l1": l1,
            "commitment": commitment,
            "token_entropy": token_entropy,
            "batch_entropy": batch_entropy,
            "bit_balance": jnp.stack([jnp.mean(bits, dtype=jnp.float32) for bits in residuals.bits]),
        }
        if perceptual is not None:
            metrics["perceptual"] = perceptual(output, images)
            loss += config.perceptual_weight * metrics["perceptual"]
        return loss, metrics

    return loss_fn


def _first_scales(residuals: quantizer.Residuals, key: jax.Array, share: float) -> jax.Array:
    """Returns the sum of all codes; for about a `share` of the images that of the first half of the scales or more."""
    scales = len(residuals.accumulated)
    if not share or scales == 1:
        return residuals.quantized
    partial_key, count_key = jax.random.split(key)
    images = len(residuals.quantized)
    partial_B = jax.random.bernoulli(partial_key, share, (images,))
    last_B = jnp.where(partial_B, jax.random.randint(count_key, (images,), (scales - 1) // 2, scales - 1), scales - 1)
    return jnp.stack(residuals.accumulated)[last_B, jnp.arange(images)]


def make_step(
    config: TokenizerRunConfig,
    optimizer: optax.GradientTransformation,
    perceptual: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Callable[[TrainState, dict[str, jax.Array], jax.Array], tuple[TrainState, Metrics]]:
    """Returns one update: `(state, batch, key) -> (state, metrics)`.

    The batch holds `source` and `target`, uint8 [B, y, x, 3]; both are images to reconstruct.
    """
    loss_fn = make_loss(config, perceptual)

    def step(state: TrainState, batch: dict[str, jax.Array], key: jax.Array) -> tuple[TrainState, Metrics]:
        images = jnp.concatenate([batch["source"], batch["target"]])
        gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, metrics), gradients = gradient_fn(state.params, to_model_range(images), key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        if not config.train_encoder:  # weight decay applies without a gradient, too
            updates = {**updates, "encoder": jax.tree.map(jnp.zeros_like, updates["encoder"])}
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradients), **metrics}
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return step


def make_init(config: TokenizerRunConfig, optimizer: optax.GradientTransformation) -> Callable[[], TrainState]:
    """Returns `() -> TrainState`, which makes the state of step 0 from the config's seed."""
    model = Autoencoder(config.model.tokenizer)

    def init() -> TrainState:
        side = config.model.tokenizer.stride
        params = model.init(jax.random.key(config.seed), jnp.zeros((1, side, side, 3)))["params"]
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))

    return init


def start(config: TokenizerRunConfig, init: Callable[[], TrainState]) -> TrainState:
    """Returns the state of step 0: random, or with the weights of `init_from`."""
    state = jax.jit(init)()
    if config.init_from:
        loaded = load_part(config.init_from, "tokenizer", abstract_params(config.model, "tokenizer"))
        state = state.replace(params=jax.device_put(loaded))
    return state


def make_reconstruct(config: EditorConfig) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns encoder, quantizer and decoder in a row: `(params, uint8 [B, y, x, 3]) -> uint8 [B, y, x, 3]`.

    It is the best that a transformer can achieve with this tokenizer.
    """
    pyramid = editor_pyramid(config)

    def reconstruct(params: Any, images: jax.Array) -> jax.Array:
        residuals = quantizer.quantize(encode_images(params, images, config), pyramid.cells(config.patchify))
        return decode_bits(params, residuals.bits, config, pyramid)

    return reconstruct
