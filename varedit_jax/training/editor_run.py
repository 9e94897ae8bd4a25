"""What a training run of an editor starts from: frozen weights, initial state, evaluation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from varedit_jax.config import RunConfig
from varedit_jax.conversion.folder import load_folder
from varedit_jax.errors import UserError
from varedit_jax.parameters import abstract_params, init_text, init_transformer
from varedit_jax.scales import Pyramid
from varedit_jax.training.state import TrainState
from varedit_jax.training.step import Batch, Metrics, Params, make_loss, make_step

__all__ = ["load_frozen", "make_evaluate", "make_init", "make_step", "start"]


def load_frozen(config: RunConfig) -> Params:
    """Weights the run uses but does not change: the tokenizer, and the text encoder unless it is trained.

    Raises UserError if the card names no folder for one, or the folder's weights do not fit.
    """
    folders = {"tokenizer": config.tokenizer_weights}
    if not config.train_text:
        folders["text"] = config.text_weights
    frozen = {}
    for part, folder in folders.items():
        if not folder:
            raise UserError(f"the card names no {part}_weights; give --config.{part}_weights=FOLDER")
        frozen[part] = load_folder(folder, part, abstract_params(config.model, part))
    return frozen


def make_init(config: RunConfig, optimizer: optax.GradientTransformation) -> Callable[[], TrainState]:
    """Makes the state of step 0 with random parameters, from the config's seed: `() -> TrainState`."""

    def init() -> TrainState:
        transformer_key, text_key = jax.random.split(jax.random.key(config.seed))
        params = {"transformer": init_transformer(config.model, transformer_key)}
        if config.train_text:
            params["text"] = init_text(config.model, text_key)
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))

    return init


def start(config: RunConfig, init: Callable[[], TrainState]) -> TrainState:
    """The state of step 0: random, or with what is trained (the transformer, the text encoder) from `init_from`."""
    state = jax.jit(init)()
    if config.init_from:
        parts = list(state.params)
        loaded = {part: load_folder(config.init_from, part, abstract_params(config.model, part)) for part in parts}
        state = state.replace(params=jax.device_put(loaded))
    return state


def make_evaluate(config: RunConfig, pyramid: Pyramid) -> Callable[[Params, Params, Batch], Metrics]:
    """Metrics of a held-out batch, without noise or drop: `(params, frozen, batch) -> metrics`."""
    loss_fn: Callable[..., Any] = make_loss(config, pyramid, training=False)

    def evaluate(params: Params, frozen: Params, batch: Batch) -> Metrics:
        return loss_fn(params, frozen, batch, jax.random.key(0))[1]

    return evaluate
