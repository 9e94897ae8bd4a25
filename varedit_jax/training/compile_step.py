"""The training step on a mesh, and its arguments as abstract arrays with shardings."""

from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from varedit_jax.config import RunConfig
from varedit_jax.errors import UserError
from varedit_jax.parallel.compiler_options import compiler_options
from varedit_jax.parallel.mesh import batch_sharding, check_batch, replicated
from varedit_jax.parallel.rules import check_rules, param_shardings, state_shardings, with_shardings
from varedit_jax.parameters import abstract_params, stored_params
from varedit_jax.scales import Pyramid, editor_pyramid, image_size
from varedit_jax.training.state import TrainState, make_init
from varedit_jax.training.step import make_step
from varedit_jax.transformer.kernels import choose, platform
from varedit_jax.types import Params


def check_attention(config: RunConfig) -> None:
    """Raises UserError if the kernel that `transformer.attention` names cannot work on the mesh that is set."""
    model = config.model.transformer
    try:
        kernel = choose(model.attention, model.head_size, model.dtype)
    except ValueError as error:
        raise UserError(str(error)) from error
    if kernel == "cudnn" and platform() not in ("gpu", "cuda"):
        raise UserError(
            f"attention is 'cudnn', which needs a GPU, not {platform()}; choose attention='auto' or 'plain'"
        )


def abstract_state(config: RunConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns the state of a run as jax.ShapeDtypeStruct with shardings; nothing is allocated.

    Raises UserError naming a dimension that does not divide over its axis of the mesh.
    """
    state = jax.eval_shape(make_init(config, optimizer))
    check_rules(state.params)
    return with_shardings(state, state_shardings(state, mesh))


def abstract_frozen(config: RunConfig, mesh: Mesh) -> Params:
    """Returns the frozen weights of a run as abstract arrays with shardings."""
    frozen = {"tokenizer": abstract_params(config.model, "tokenizer")}
    if not config.train_text:
        frozen["text"] = stored_params(config.model, "text", config.text_dtype)
    check_rules(frozen)
    return with_shardings(frozen, param_shardings(frozen, mesh))


def abstract_batch(config: RunConfig, pyramid: Pyramid, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns a batch of images, or of precomputed features where the config has them, as abstract arrays.

    Raises UserError if the batch does not divide over the mesh.
    """
    batch = config.data.batch_size
    check_batch(mesh, batch, config.optimizer.accumulation)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "text_ids": ((batch, config.data.text_tokens), np.int32),
        "text_length": ((batch,), np.int32),
    }
    for side in ("source", "target"):
        if config.data.features == "precomputed":
            # Features of the whole pyramid: the first stages of a run resize them.
            cells = editor_pyramid(config.model).cells(config.model.patchify).last
            shapes[f"{side}_features"] = ((batch, *cells, config.model.tokenizer.bits), np.float32)
        else:
            shapes[side] = ((batch, *image_size(config.model, pyramid), 3), np.uint8)
    sharding = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(*entry, sharding=sharding) for name, entry in shapes.items()}


def abstract_key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Returns a PRNG key as an abstract array."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))


def abstract_arguments(
    config: RunConfig, pyramid: Pyramid, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, Params, dict[str, jax.ShapeDtypeStruct], jax.ShapeDtypeStruct]:
    """Returns state, frozen weights, batch and key of a step as abstract arrays. Raises UserError as those above."""
    return (
        abstract_state(config, optimizer, mesh),
        abstract_frozen(config, mesh),
        abstract_batch(config, pyramid, mesh),
        abstract_key(mesh),
    )


def sharded_step(config: RunConfig, pyramid: Pyramid, optimizer: optax.GradientTransformation, mesh: Mesh) -> Any:
    """Returns the jitted step (state, frozen, batch, key) -> (state, metrics) of a run on `mesh`.

    The state is donated and keeps its shardings; metrics are replicated. Create, call and lower it under
    `jax.set_mesh(mesh)`. Raises UserError as `check_attention` and `compiler_options`.
    """
    check_attention(config)
    state = abstract_state(config, optimizer, mesh)
    out = jax.tree.map(lambda leaf: leaf.sharding, state)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        make_step(config, pyramid, optimizer),
        donate_argnums=0,
        out_shardings=(out, everywhere),
        compiler_options=compiler_options(mesh.devices.flat[0], config.compiler_options) or None,
    )
