"""The training state, which a step updates."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from varedit_jax.config import RunConfig
from varedit_jax.parameters import init_text, init_transformer
from varedit_jax.types import Metrics


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to resume, except its data iterator: one tree, saved and restored as a whole."""

    step: jax.Array  # int32 scalar: updates done so far
    params: Any  # tree of parameters
    opt_state: Any  # optax state of `params`
    ema: Any = None  # exponential moving average of `params` in float32, where the run keeps one


StepFn = Callable[[TrainState, Any, jax.Array], tuple[TrainState, Metrics]]  # (state, batch, key) -> (state, metrics)


def make_init(config: RunConfig, optimizer: optax.GradientTransformation) -> Callable[[], TrainState]:
    """Returns `() -> TrainState`, which makes the state of step 0 with random parameters from the config's seed."""

    def init() -> TrainState:
        transformer_key, text_key = jax.random.split(jax.random.key(config.seed))
        params = {"transformer": init_transformer(config.model, transformer_key)}
        if config.train_text:
            params["text"] = init_text(config.model, text_key)
        # Copies, because the state is donated to each step, and no array can be donated twice.
        ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else None
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params), ema=ema)

    return init
