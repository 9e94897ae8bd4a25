"""What a training step changes."""

from typing import Any

import flax.struct
import jax


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to go on, besides its data iterator: one tree, saved and restored as a whole."""

    step: jax.Array  # int32 scalar: updates done so far
    params: Any  # tree of parameters
    opt_state: Any  # optax state of `params`
    ema: Any = None  # running average of `params` in float32, where the run keeps one
