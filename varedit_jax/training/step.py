"""Training step of the editor: `(state, frozen, batch, key) -> (state, metrics)` (model.md, sections 3 to 7)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from varedit_jax.config import RunConfig
from varedit_jax.parallel.constrain import batch_only, constrain, has_mesh
from varedit_jax.parallel.mesh import BATCH
from varedit_jax.parallel.rules import gather
from varedit_jax.resize import area_resize
from varedit_jax.scales import Pyramid
from varedit_jax.text.t5 import T5Encoder
from varedit_jax.tokenizer.tokens import encode_images, make_tokens
from varedit_jax.training.loss import bitwise_loss
from varedit_jax.training.self_correction import draw_flips, strength_groups
from varedit_jax.training.state import TrainState
from varedit_jax.transformer.model import Transformer
from varedit_jax.types import Batch, Metrics, Params

# Fields of a batch that the step takes.
BATCH_FIELDS = frozenset(
    {"source", "target", "source_features", "target_features", "text_ids", "text_length", "text_features"}
)

Step = Callable[[TrainState, Params, Batch, jax.Array], tuple[TrainState, Metrics]]


def _features(batch: Batch, frozen: Params, config: RunConfig, cells: Pyramid) -> tuple[jax.Array, jax.Array]:
    """Returns source and target features at the last grid of `cells`: precomputed, else from the frozen encoder."""
    if "source_features" in batch:
        source, target = batch["source_features"], batch["target_features"]
    else:
        # Interleaved, not concatenated, so that the images of a device stay on it.
        both = jnp.stack([batch["source"], batch["target"]], axis=1)
        both = _spread(both.reshape(-1, *both.shape[2:]))
        with jax.named_scope("encode"), jax.default_matmul_precision(config.tokenizer_precision):
            features = batch_only(encode_images(frozen["tokenizer"], both, config.model))
        source, target = jnp.moveaxis(features.reshape(-1, 2, *features.shape[1:]), 1, 0)
    return area_resize(source, cells.last), area_resize(target, cells.last)


def _spread(images: jax.Array) -> jax.Array:
    """Shards images over all devices, `tensor` included, if their number divides."""
    if not has_mesh() or images.shape[0] % jax.sharding.get_abstract_mesh().size:
        return batch_only(images)
    return constrain(images, (*BATCH, "tensor"))


def make_text_features(config: RunConfig) -> Callable[[Params, Params, Batch], jax.Array]:
    """Returns `(params, frozen, batch) -> features_BTE`: precomputed ones in float32, else the encoder's."""
    dtype = jnp.dtype("float32" if config.train_text else config.text_dtype)
    encoder = T5Encoder(config.model.text, dtype, functools.partial(gather, "text"))

    def text_features(params: Params, frozen: Params, batch: Batch) -> jax.Array:
        if "text_features" in batch:
            return batch["text_features"].astype(jnp.float32)
        own = params["text"] if config.train_text else frozen["text"]
        with jax.named_scope("text"):
            return encoder.apply({"params": own}, batch["text_ids"], batch["text_length"])

    return text_features


def make_loss(
    config: RunConfig, pyramid: Pyramid, training: bool, by_example: bool = False
) -> Callable[[Params, Params, Batch, jax.Array], tuple[jax.Array, Metrics]]:
    """Returns the loss of a batch: `(params, frozen, batch, key) -> (loss, metrics)`.

    Args:
      config: the run; with `train_text` the text encoder is in `params`, else in `frozen`.
      pyramid: the pyramid of this batch's aspect, or its first scales; features are area-resized to the last of them.
      training: True for text drop, self-correction, smoothed labels and stochastic depth; False for evaluation.
      by_example: True for loss and accuracy of each example [B] among the metrics, too (`loss.BY_EXAMPLE`).

    The batch holds `text_ids` int32 [B, T], `text_length` int32 [B], and either images `source`, `target` uint8
    [B, y, x, 3] or features `source_features`, `target_features` float32 [B, h, w, Z]; and, with a frozen text encoder
    and precomputed features, `text_features` bfloat16 [B, T, E].
    """
    model = config.model
    transformer = Transformer(model.transformer, pyramid, functools.partial(gather, "transformer"))
    text_features = make_text_features(config)
    cells = pyramid.cells(model.patchify)
    loss_config = config.loss if training else dataclasses.replace(config.loss, label_smoothing=0.0)

    @functools.partial(jax.checkpoint, prevent_cse=True)  # recomputes the logits: float32, two per bit
    @jax.named_scope("loss")
    def head_loss(
        params: Params, hidden_BLC: jax.Array, cond_BC: jax.Array, residuals_BLN: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        logits_BLN2 = transformer.apply({"params": params}, hidden_BLC, cond_BC, method=Transformer.logits)
        return bitwise_loss(logits_BLN2, residuals_BLN, pyramid, loss_config, by_example)

    def loss_fn(params: Params, frozen: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        source, target = _features(batch, frozen, config, cells)
        flip_key, drop_key, depth_key = jax.random.split(key, 3)
        flips: tuple[jax.Array, ...] = ()
        unconditional_B = None
        if training:
            noise = config.loss
            groups = strength_groups(noise.noise_strength, len(target))
            flips = draw_flips(
                flip_key, len(target), target.shape[-1], cells, noise.noise_scales, noise.noise_max, groups
            )
            unconditional_B = jax.random.bernoulli(drop_key, config.loss.text_drop, (len(target),))
        # Tokens are small before the first block, which shards them over `tensor`.
        tokens = jax.tree.map(batch_only, make_tokens(source, target, model, pyramid, flips))
        features_BTE = text_features(params, frozen, batch)
        hidden_BLC, cond_BC = transformer.apply(
            {"params": params["transformer"]},
            tokens.source_BSN,
            tokens.inputs_BLN,
            features_BTE,
            batch["text_length"],
            unconditional_B,
            deterministic=not training,
            rngs={"drop_path": depth_key},
            method=Transformer.hidden,
        )
        loss, metrics = head_loss(params["transformer"], hidden_BLC, cond_BC, tokens.residuals_BLN)
        # Bits of a NaN target would look like any others.
        loss = jnp.where(jnp.all(jnp.isfinite(target)), loss, jnp.nan)
        return loss, {"loss": loss, **metrics}

    return loss_fn


def make_step(config: RunConfig, pyramid: Pyramid, optimizer: optax.GradientTransformation) -> Step:
    """Returns one update, with gradients averaged over `optimizer.accumulation` microbatches.

    If the loss or a gradient is not finite, everything but the step count stays unchanged, and the metric `skipped` is
    1 instead of 0. Other metrics: those of the loss, and `gradient_norm` before clipping.
    """
    gradient_fn = jax.grad(make_loss(config, pyramid, training=True), has_aux=True)
    parts = config.optimizer.accumulation

    def step(state: TrainState, frozen: Params, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        if parts == 1:
            gradients, metrics = gradient_fn(state.params, frozen, batch, key)
        else:
            gradients, metrics = _accumulated(gradient_fn, state.params, frozen, batch, key, parts)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(gradients)
            finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = state.ema
            if ema is not None:
                ema = optax.incremental_update(params, ema, 1 - config.optimizer.ema_decay)
            new = TrainState(step=state.step, params=params, opt_state=opt_state, ema=ema)
            # A selection, not a multiplication: 0 * NaN is NaN.
            new = jax.tree.map(lambda changed, old: jnp.where(finite, changed, old), new, state)
        metrics = metrics | {"gradient_norm": norm, "skipped": 1 - finite.astype(jnp.float32)}
        return new.replace(step=state.step + 1), metrics

    return step


def _accumulated(
    gradient_fn: Callable[..., Any], params: Params, frozen: Params, batch: Batch, key: jax.Array, parts: int
) -> tuple[Params, Metrics]:
    """Returns gradients and metrics averaged over `parts` microbatches."""

    def compute(microbatch: Batch, index: jax.Array) -> Any:
        return gradient_fn(params, frozen, microbatch, jax.random.fold_in(key, index))

    return jax.tree.map(lambda x: x / parts, sum_over_microbatches(compute, batch, parts))


def sum_over_microbatches(compute: Callable[[Batch, jax.Array], Any], batch: Batch, parts: int) -> Any:
    """Returns the sum of `compute(microbatch, index)` over `parts` slices of the batch, one after the other.

    A slice is every `parts`-th example, so that each device works on its own examples in every slice.
    """
    slices = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)
    slices = jax.tree.map(lambda x: constrain(x, None, BATCH), slices)

    def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, compute(*part)), None

    first = jax.tree.map(lambda x: x[0], slices)
    shapes = jax.eval_shape(compute, first, jax.ShapeDtypeStruct((), jnp.int32))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, (slices, jnp.arange(parts)))
    return total
