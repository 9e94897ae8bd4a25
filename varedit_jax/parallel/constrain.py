"""Sharding as modules of models may express it. All of it has no effect where no mesh is set (`jax.set_mesh`)."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from varedit_jax import hardware
from varedit_jax.parallel.mesh import BATCH
from varedit_jax.types import Params

TILE = 16  # rows of a TPU's tile in bfloat16
Axis = str | tuple[str, ...] | None
# (name of a module of a part, type to compute in, type to sum gradients in, its variables) -> the variables, whole over
# fsdp: `rules.gather`.
Gather = Callable[[str, DTypeLike, DTypeLike, Params], Params]


def has_mesh() -> bool:
    """Returns True if a mesh of more than one device is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def device() -> Any:
    """A device of those that are compiled for: that of the mesh that is set, else the first one.

    Ahead-of-time compilation sets a mesh of devices of another platform.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.devices()[0] if mesh.empty or mesh.abstract_device is None else mesh.abstract_device


def chip() -> hardware.Chip | None:
    """The chip that is compiled for; None for CPUs, and kinds that are not known."""
    return hardware.chip_of(device())


def scatters_matrices() -> bool:
    """Returns True where kernels of heads are to meet the devices as matrices, [C, H D]: on v5e and v6e.

    libtpu (0.0.42) scatters sums of gradients of that shape; of [C, H, D] every device gets all, twice the bytes, where
    H is no multiple of eight. And it gathers kernels of that shape under compute, if a matmul takes them as they are.
    The price are copies that turn heads into rows. On v5p, whose chips sum over three dimensions of links instead
    (parallel/compiler_options.py), and hold several examples, they would cost more than they save, by arithmetic.
    """
    found = chip()
    return has_mesh() and found is not None and found.name in ("TPU v5e", "TPU v6e")


def merges_keys_and_values() -> bool:
    """Returns True where the text's kernel [C, 2, H, D] is one matrix: `scatters_matrices`, with heads not split."""
    return scatters_matrices() and jax.sharding.get_abstract_mesh().shape["tensor"] == 1


def constrain(x: jax.Array, *axes: Axis) -> jax.Array:
    """Splits each dimension of `x` over the given axes of the mesh; dimensions that are left out are not split."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes)) if has_mesh() else x


def pad_tokens(x_BLC: jax.Array, tokens: int) -> jax.Array:
    """Pads the tokens with zeros until there are `tokens`, and `tensor` devices have equal pieces of whole tiles.

    For other pieces the compiler for TPUs (libtpu 0.0.42) emits all-reduces where reduce-scatters would do:
    `experiments.compile_ahead` lists the collectives of a step.
    """
    tensor = jax.sharding.get_abstract_mesh().shape["tensor"] if has_mesh() else 1
    if tensor > 1:
        tokens += -tokens % (TILE * tensor)
    return jnp.pad(x_BLC, ((0, 0), (0, tokens - x_BLC.shape[1]), (0, 0)))


def tokens_between_blocks(x_BLC: jax.Array) -> jax.Array:
    """The residual stream between blocks: examples over data x fsdp, tokens over tensor."""
    return constrain(x_BLC, BATCH, "tensor")


def gather_tokens(x_BLC: jax.Array) -> jax.Array:
    """The input of a branch, all tokens on every device of `tensor`; communicated in the type that it has."""
    # Gathered from pieces: its gradient, a sum over `tensor`, comes back as a reduce-scatter.
    return constrain(tokens_between_blocks(x_BLC), BATCH)


def scatter_tokens(x_BLC: jax.Array) -> jax.Array:
    """The output of a branch, a sum over `tensor`, in pieces of the tokens: a reduce-scatter."""
    # Scattered from whole tokens: its gradient is gathered once, not once for the weights and once for the input.
    return tokens_between_blocks(constrain(x_BLC, BATCH))


def batch_only(x: jax.Array) -> jax.Array:
    """An activation that is split by examples alone."""
    return constrain(x, BATCH)


def gathered(module: Any, name: str, gather: Gather | None, dtype: DTypeLike, sums: DTypeLike) -> Any:
    """The module class, with parameters that `gather` makes whole where a mesh is set; other arguments are its own."""
    if gather is None:
        return module
    if not has_mesh():
        return _from_bits(module) if _keeps_bits() else module
    return nn.map_variables(module, "params", functools.partial(gather, name, dtype, sums))


def _keeps_bits() -> bool:
    return not has_mesh() and device().platform == "cpu"


def as_bits(params: Params) -> Params:
    """Parameters for modules of `gathered`: on CPUs bfloat16 as integers of the same bits, to be converted in the loop.

    XLA for CPUs (jaxlib 0.10.2) computes in float32 what is bfloat16, and would convert a whole stack of layers in
    front of the loop over them: that takes twice its memory, besides itself.
    """
    if not _keeps_bits():
        return params
    return jax.tree.map(lambda x: jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x, params)


def _from_bits(module: Any) -> Any:
    """The module class, for parameters as of `as_bits`."""

    def kept(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x

    return nn.map_variables(module, "params", functools.partial(jax.tree.map, kept))


def per_shard(attention: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`attention(*arrays)` on the examples and heads that each device holds, over all of their tokens.

    The compiler cannot split kernels by itself, and would split plain attention over tokens.

    Args:
      attention: from arrays as below to an array [B, H, L, D].
      arrays: [B, H, L, D], the first of them, or [layers, B, H, L, D], split over examples and heads; others of
        [B, ...], split over examples alone; scalars.
    """
    if not has_mesh():
        return attention(*arrays)
    sizes = jax.sharding.get_abstract_mesh().shape
    # The few images of a sampling batch need not divide.
    batch = BATCH if arrays[0].shape[0] % (sizes["data"] * sizes["fsdp"]) == 0 else None
    heads = PartitionSpec(batch, "tensor")
    by_rank = {0: PartitionSpec(), 4: heads, 5: PartitionSpec(None, *heads)}
    specs = tuple(by_rank.get(x.ndim, PartitionSpec(batch)) for x in arrays)
    return jax.shard_map(attention, in_specs=specs, out_specs=heads, check_vma=False)(*arrays)
