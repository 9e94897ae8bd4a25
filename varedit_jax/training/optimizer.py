"""AdamW as in the recipe (model.md, section 7); Muon as an alternative."""

import re
from collections.abc import Callable
from typing import Any

import jax
import optax
from optax import contrib

from varedit_jax.config import OptimizerConfig
from varedit_jax.errors import UserError

# Parameters without weight decay, by path: those that are learned once for all inputs (a start token, a level's
# embedding), and those that scale or shift a channel. Kernels decay.
NO_DECAY = (
    r"(.*[/_])?bias",  # of a projection, a norm, or one half of a fused projection (q_bias, v_bias)
    r"(.*/)?scale",  # norms
    r"(.*/)?scale_mul",  # log of the attention's temperature, per head
    r"(.*/)?ada_gss",  # a block's own gains, scales and shifts
    r"(.*/)?text_unconditional",
    r"(.*/)?pos_start",
    r"(.*/)?level_embed",
    r"(.*/)?text_pool/query",
    r"text/embedding/embedding",
    r"text/relative_bias/table",
)

# The matrices that Muon makes orthogonal, by path, with the axes that are summed over and the axes of the result; other
# axes (stacked blocks, fused projections, heads) enumerate matrices. A matrix per head costs a fraction of one for all.
MATRICES = {
    r"transformer/block.*/qkv_kernel": ((-4,), (-1,)),
    r"transformer/block.*/kv_kernel": ((-4,), (-1,)),
    r"transformer/block.*/(q|proj|fc1|fc2)/kernel": ((-2,), (-1,)),
    r"transformer/(shared_ada|head_ada|text_proj_in|text_proj_out)/kernel": ((-2,), (-1,)),
    r"text/layers/attention/(query|key|value)/kernel": ((-3,), (-1,)),
    r"text/layers/attention/out/kernel": ((-3, -2), (-1,)),
    r"text/layers/mlp/(gate|up|down)/kernel": ((-2,), (-1,)),
}
_MUON_ITERATIONS = 3  # of Newton-Schulz; five learn no faster on `shapes` and cost more
_MUON_RMS = 0.1  # of an update divided by the rate; AdamW's is 0.2 to 0.4 (arXiv:2502.16982, section 2.2)


def decays(path: str) -> bool:
    """Returns True if weight decay applies to the parameter at `path`, such as transformer/block_0/mlp/fc1/kernel."""
    return not any(re.fullmatch(pattern, path) for pattern in NO_DECAY)


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step (updates done before, from 0).

    Linear from 0 at step 0 to `config.learning_rate` at step `warmup_steps`; from there constant, or along a half
    cosine over the last `decay_steps` (0: all remaining ones) that reaches `final_fraction` of it at `total_steps`.
    Raises UserError if warm-up and decay do not fit into the steps.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    parts, bounds = [optax.constant_schedule(peak)], []
    if config.schedule == "cosine":
        if warmup + max(config.decay_steps, 1) > total_steps:
            raise UserError(
                f"optimizer.warmup_steps is {warmup} and optimizer.decay_steps {config.decay_steps}, which do not fit "
                f"into {total_steps} steps; lower them, or raise steps"
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
    """Returns clipping by the global norm, then AdamW with decoupled weight decay where `decays` is True of the path.

    With `config.algorithm` "muon", Muon (momentum 0.95) updates the matrices of `MATRICES` instead, at the same rates
    and with the same decay. Moments are trees like the parameters, in float32; AdamW's first one in
    `config.moment_dtype`. The structure of the state depends on `algorithm` alone, so that a run can resume with other
    settings.
    """

    def mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: decays(_name(path)), params)

    rate = learning_rate(config, total_steps)
    betas = config.beta1, config.beta2
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    if config.algorithm == "adamw":
        steps = [
            optax.adamw(
                rate,
                *betas,
                eps=config.epsilon,
                weight_decay=config.weight_decay,
                mask=mask,
                mu_dtype=config.moment_dtype,
            )
        ]
    else:
        steps = [
            contrib.muon(
                1.0,
                ns_steps=_MUON_ITERATIONS,
                consistent_rms=_MUON_RMS,
                adam_b1=betas[0],
                adam_b2=betas[1],
                eps=config.epsilon,
                muon_weight_dimension_numbers=_dimension_numbers,
            ),
            optax.add_decayed_weights(-config.weight_decay, mask),  # updates are negated already
            optax.scale_by_schedule(rate),
        ]
    optimizer = optax.chain(clip, *steps)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # Optax relies on the promotion of int32 step counts to float.
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(grads, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _dimension_numbers(params: Any) -> Any:
    """Returns a tree like `params` with the reduced axes and the output axes of each of `MATRICES`, else None."""

    def find(path: tuple[Any, ...], _: jax.Array) -> contrib.MuonDimensionNumbers | None:
        axes = [axes for pattern, axes in MATRICES.items() if re.fullmatch(pattern, _name(path))]
        return contrib.MuonDimensionNumbers(*axes[0]) if axes else None

    return jax.tree_util.tree_map_with_path(find, params)
