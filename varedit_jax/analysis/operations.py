"""Operations of a run's complete step, counted in the traced program, and the share that is recomputed."""

import dataclasses
from typing import Literal

import jax

from varedit_jax.config import RunConfig
from varedit_jax.scales import editor_pyramid
from varedit_jax.training.compile_step import abstract_arguments
from varedit_jax.training.flops import count_jaxpr, run_flops
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.step import make_step


def count_step(config: RunConfig, remat: Literal["none", "named", "full"]) -> int:
    """Operations per example, with the recomputation of `remat` and plain attention: kernels cannot be counted."""
    transformer = dataclasses.replace(config.model.transformer, remat=remat, attention="plain")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, transformer=transformer),
        optimizer=dataclasses.replace(config.optimizer, accumulation=1),
        data=dataclasses.replace(config.data, batch_size=1),
    )
    pyramid, optimizer = editor_pyramid(config.model), make_optimizer(config.optimizer, config.steps)
    one = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    arguments = abstract_arguments(config, pyramid, optimizer, one)
    return count_jaxpr(jax.make_jaxpr(make_step(config, pyramid, optimizer))(*arguments))


def recomputed_share(config: RunConfig) -> float:
    """Operations that the backward pass recomputes, as a share of the transformer's forward pass."""
    remat = config.model.transformer.remat
    if remat == "none":
        return 0.0
    more = count_step(config, remat) - count_step(config, "none")
    return more / run_flops(config, editor_pyramid(config.model)).transformer
