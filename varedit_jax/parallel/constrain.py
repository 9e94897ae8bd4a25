"""What modules may say about sharding. All of it is without effect where no mesh is set (`jax.set_mesh`)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from varedit_jax.parallel.mesh import BATCH

TILE = 16  # rows of a TPU's tile in bfloat16
Axis = str | tuple[str, ...] | None


def has_mesh() -> bool:
    """Whether a mesh of more than one device is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def constrain(x: jax.Array, *axes: Axis) -> jax.Array:
    """Says over which axes of the mesh each dimension of `x` is split; dimensions that are left out are not."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes)) if has_mesh() else x


def pad_tokens(x_BLC: jax.Array) -> jax.Array:
    """Adds tokens of zeros until `tensor` devices have equal pieces of whole tiles.

    Of other pieces the compiler for TPUs makes all-reduces where reduce-scatters would do.
    """
    if not has_mesh() or (tensor := jax.sharding.get_abstract_mesh().shape["tensor"]) == 1:
        return x_BLC
    more = -x_BLC.shape[1] % (TILE * tensor)
    return jnp.pad(x_BLC, ((0, 0), (0, more), (0, 0)))


def tokens_between_blocks(x_BLC: jax.Array) -> jax.Array:
    """The residual stream between blocks: examples over data x fsdp, tokens over tensor."""
    return constrain(x_BLC, BATCH, "tensor")


def gather_tokens(x_BLC: jax.Array) -> jax.Array:
    """The input of a branch, all tokens on every device of `tensor`; over the wires go elements of the type it has."""
    # From pieces: its gradient, a sum over `tensor`, comes back as a reduce-scatter.
    return constrain(tokens_between_blocks(x_BLC), BATCH)


def scatter_tokens(x_BLC: jax.Array) -> jax.Array:
    """The output of a branch, a sum over `tensor`, in pieces of the tokens: a reduce-scatter."""
    # From whole ones: its gradient is gathered once, not once for the weights and once for what came before.
    return tokens_between_blocks(constrain(x_BLC, BATCH))


def batch_only(x: jax.Array) -> jax.Array:
    """An activation that is split by examples alone."""
    return constrain(x, BATCH)


def per_shard(attention: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`attention(*arrays)` on the examples and heads that each device holds, over all of their tokens.

    Kernels need it, which the compiler cannot split by itself, and it keeps the compiler from splitting tokens.

    Args:
      attention: of arrays to an array, both as below.
      arrays: [B, L, H, D], split over examples and heads, or others of [B, ...], split over examples alone.
    """
    if not has_mesh():
        return attention(*arrays)
    sizes = jax.sharding.get_abstract_mesh().shape
    # A few images that are sampled need not divide.
    batch = BATCH if arrays[0].shape[0] % (sizes["data"] * sizes["fsdp"]) == 0 else None
    heads = PartitionSpec(batch, None, "tensor")
    specs = tuple(heads if x.ndim == 4 else PartitionSpec(batch) for x in arrays)
    return jax.shard_map(attention, in_specs=specs, out_specs=heads, check_vma=False)(*arrays)
