"""What modules may say about sharding. All of it is without effect where no mesh is set (`jax.set_mesh`)."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from varedit_jax.parallel.mesh import BATCH

Axis = str | tuple[str, ...] | None


def has_mesh() -> bool:
    """Whether a mesh of more than one device is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def constrain(x: jax.Array, *axes: Axis) -> jax.Array:
    """Says over which axes of the mesh each dimension of `x` is split; dimensions that are left out are not."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes)) if has_mesh() else x


def tokens_between_blocks(x_BLC: jax.Array) -> jax.Array:
    """The residual stream between blocks: examples over data x fsdp, tokens over tensor."""
    return constrain(x_BLC, BATCH, "tensor")


def gather_tokens(x_BLC: jax.Array) -> jax.Array:
    """The input of a branch, whole on every device of `tensor`. Cast it before: its type is what goes over the wires."""
    # From pieces: its gradient, a sum over `tensor`, comes back as a reduce-scatter.
    return constrain(tokens_between_blocks(x_BLC), BATCH)


def batch_only(x: jax.Array) -> jax.Array:
    """An activation that is split by examples alone."""
    return constrain(x, BATCH)


def per_shard(
    function: Callable[..., Any], in_specs: tuple[PartitionSpec, ...], out_specs: PartitionSpec
) -> Callable[..., Any]:
    """`function` on each device's shards, as kernels need it that the compiler cannot split by itself."""
    if not has_mesh():
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
