"""Operations of a run's complete step, counted in the program as it is traced, and what of them is done twice."""

import dataclasses
from typing import Literal

import jax

from varedit_jax.config import RunConfig
from varedit_jax.scales import editor_pyramid
from varedit_jax.training.compile_step import abstract_batch, abstract_frozen, abstract_key, abstract_state
from varedit_jax.training.flops import count_jaxpr, run_flops
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.step import make_step


def count_step(config: RunConfig, remat: Literal["none", "named", "full"]) -> int:
    """Operations an example, with `remat`'s recomputation and plain attention: kernels cannot be counted."""
    transformer = dataclasses.replace(config.model.transformer, remat=remat, attention="plain")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, transformer=transformer),
        optimizer=dataclasses.replace(config.optimizer, accumulation=1),
        data=dataclasses.replace(config.data, batch_size=1),
    )
    pyramid, optimizer = editor_pyramid(config.model), make_optimizer(config.optimizer, config.steps)
    one = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    arguments = (
        abstract_state(config, optimizer, one),
        abstract_frozen(config, one),
        abstract_batch(config, pyramid, one),
        abstract_key(one),
    )
    return count_jaxpr(jax.make_jaxpr(make_step(config, pyramid, optimizer))(*arguments))


def again_of_forward(config: RunConfig) -> float:
    """What the backward pass computes again, as a share of the transformer's forward pass."""
    remat = config.model.transformer.remat
    if remat == "none":
        return 0.0
    more = count_step(config, remat) - count_step(config, "none")
    return more / run_flops(config, editor_pyramid(config.model)).transformer
