"""AdamW as in the recipe (model.md, section 7)."""

import re
from collections.abc import Callable
from typing import Any

import jax
import optax

from varedit_jax.config import OptimizerConfig

# Parameters that weight decay leaves alone, by path. What is learned once for all inputs (a start token, a level's
# embedding) or scales or shifts a channel has no excess norm to lose; the kernels are what decays.
NO_DECAY = (
    r"(.*[/_])?bias",  # of a projection, a norm, or one half of a fused projection (q_bias, v_bias)
    r"(.*/)?scale",  # norms
    r"(.*/)?scale_mul",  # log of the attention's temperature, a head
    r"(.*/)?ada_gss",  # a block's own gains, scales and shifts
    r"(.*/)?text_unconditional",
    r"(.*/)?pos_start",
    r"(.*/)?level_embed",
    r"(.*/)?text_pool/query",
    r"text/embedding/embedding",
    r"text/relative_bias/table",
)


def decays(path: str) -> bool:
    """Whether weight decay applies to the parameter at `path`, as in transformer/block_0/mlp/fc1/kernel."""
    return not any(re.fullmatch(pattern, path) for pattern in NO_DECAY)


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The learning rate as a function of the step (updates done before, from 0).

    Linear from 0 at step 0 to `config.learning_rate` at step `warmup_steps`; from there constant, or along a half
    cosine over the last `decay_steps` (0: all that are left) that reaches `final_fraction` of it at `total_steps`.
    Raises ValueError if warm-up and decay do not fit into the steps.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    parts, bounds = [optax.constant_schedule(peak)], []
    if config.schedule == "cosine":
        if warmup + max(config.decay_steps, 1) > total_steps:
            raise ValueError(
                f"optimizer.warmup_steps is {warmup} and optimizer.decay_steps {config.decay_steps}, which do not fit "
                f"into {total_steps} steps"
            )
        decay = config.decay_steps or total_steps - warmup
        parts.append(optax.cosine_decay_schedule(peak, decay, alpha=config.final_fraction))
        bounds.append(total_steps - decay)
    if warmup:
        parts.insert(0, optax.linear_schedule(0.0, peak, warmup))
        bounds.insert(0, warmup)
    return optax.join_schedules(parts, bounds)


def make_optimizer(
    config: OptimizerConfig, total_steps: int, decays: Callable[[str], bool] = decays
) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW with decoupled weight decay on the parameters that `decays` names.

    The first and second moments are float32 trees like the parameters. The state has the same structure whatever the
    configuration, so that a run can be gone on with under another.
    """

    def mask(params: Any) -> Any:
        def decide(path: tuple[Any, ...], _: jax.Array) -> bool:
            return decays(jax.tree_util.keystr(path, simple=True, separator="/"))

        return jax.tree_util.tree_map_with_path(decide, params)

    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.adamw(
            learning_rate(config, total_steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=mask,
        ),
    )

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # Optax counts on int32 step counts becoming floats by themselves.
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(grads, state, params)

    return optax.GradientTransformation(optimizer.init, update)
