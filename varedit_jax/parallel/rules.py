"""Sharding of parameters: the one table from their paths to the axes of the mesh.

A rule is a regular expression of a whole path, and the dimensions of the array as "LETTER@axis": the letters are those
of varedit_jax.config, and a dimension without an axis is whole on every device. An axis with "?" is dropped where it
does not divide. Stacks of layers (`transformer/blocks`, `text/layers`) have a leading dimension of layers that is never
split.

A kernel in int8 (quantized.py) is two arrays: its values lie as the kernel would, and so do its scales, along the axes
where they are more than one.

The table is strict: a parameter that no rule matches, or several, and a rule that no parameter matches, is an error.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from varedit_jax.errors import UserError
from varedit_jax.parallel.constrain import merges_keys_and_values
from varedit_jax.types import Params

WHOLE = "..."  # small: every device has all of it

RULES: dict[str, tuple[tuple[str, str], ...]] = {
    "transformer": (
        (r"block(_0|s)/self_attention/qkv_kernel", "C@fsdp 3 H@tensor D"),
        (r"block(_0|s)/cross_attention/kv_kernel", "C@fsdp 2 H@tensor D"),
        (r"block(_0|s)/cross_attention/q/kernel", "C@fsdp C@tensor"),
        (r"block(_0|s)/(self|cross)_attention/proj/kernel", "C@tensor C@fsdp"),
        (r"block(_0|s)/mlp/fc1/kernel", "C@fsdp F@tensor"),
        (r"block(_0|s)/mlp/fc2/kernel", "F@tensor C@fsdp"),
        (r"block(_0|s)/(.*bias|.*scale|.*scale_mul|ada_gss)", WHOLE),
        (r"(shared|head)_ada/kernel", "C@fsdp 6C@tensor"),
        (r"text_proj_in/kernel", "E@fsdp C@tensor"),
        (r"text_proj_out/kernel", "C@tensor C@fsdp"),
        (r"text_pool/kv_kernel", "E@fsdp 2 heads channels"),
        (r"text_pool/proj/kernel", "C@fsdp C"),
        (r"text_unconditional", "rows E@fsdp"),
        (r"word_embed/kernel", "N C@fsdp"),
        (r"head/kernel", "C@fsdp 2N"),
        (r"pos_start|level_embed|position_embed/kernel|text_norm/scale|text_pool/(query|v_bias)", WHOLE),
        (r"(word_embed|head|(shared|head)_ada|text_proj_(in|out)|text_pool/proj)/bias", WHOLE),
    ),
    "text": (
        (r"embedding/embedding", "V E@fsdp"),
        (r"layers/attention/(query|key|value)/kernel", "E@fsdp H@tensor D"),
        (r"layers/attention/out/kernel", "H@tensor D E@fsdp"),
        (r"layers/mlp/(gate|up)/kernel", "E@fsdp F@tensor"),
        (r"layers/mlp/down/kernel", "F@tensor E@fsdp"),
        (r"relative_bias/table|final_norm/scale|layers/(attention|mlp)_norm/scale", WHOLE),
    ),
    "tokenizer": (
        (r"(encoder|decoder)/.*/?(conv_\w+|shortcut|downsample|upsample)/kernel", "y x in out@fsdp?"),
        (r"(encoder|decoder)/.*(bias|scale)", WHOLE),
    ),
}
_TEXT_KERNEL = "/cross_attention/kv_kernel"
_INT8 = re.compile(r"(.*kernel)/(values|scale)")
_STACKS = re.compile(r"(transformer/blocks|text/layers)/")


@dataclasses.dataclass(frozen=True)
class ParamAxes:
    """A rule as applied to one parameter: for each dimension its letter, axis ("" for none), and True if it is strict.

    A strict dimension must divide over its axis.
    """

    path: str
    dimensions: tuple[tuple[str, str, bool], ...]

    def spec(self, shape: tuple[int, ...], sizes: Mapping[str, int], without: tuple[str, ...] = ()) -> PartitionSpec:
        """The PartitionSpec of an array of `shape` on a mesh of these sizes; axes in `without` are left out.

        Raises UserError naming the dimension that does not divide over its axis.
        """
        if not self.dimensions:
            return PartitionSpec()
        axes: list[str | None] = []
        for size, (letter, axis, strict) in zip(shape, self.dimensions, strict=True):
            used = axis if axis and axis not in without and sizes[axis] > 1 else None
            if used and size % sizes[used]:
                if strict:
                    raise UserError(
                        f"{self.path} of shape {list(shape)}: dimension {letter} = {size} does not divide over "
                        f"{used} = {sizes[used]}; choose a mesh.{used} that divides {size}"
                    )
                used = None
            axes.append(used)
        return PartitionSpec(*axes)


@functools.cache
def _axes_of(path: str) -> ParamAxes:
    """The axes of the parameter at `path`. Raises ValueError unless exactly one rule matches."""
    int8 = _INT8.fullmatch(path)
    part, _, rest = (int8[1] if int8 else path).partition("/")
    found = [text for pattern, text in RULES.get(part, ()) if re.fullmatch(pattern, rest)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rules of parallel/rules.py match the parameter {path}; it takes exactly one")
    if found[0] == WHOLE:
        return ParamAxes(path, ())
    stacked = (("layers", "", True),) if _STACKS.match(path) else ()
    dimensions = (word.partition("@") for word in found[0].split())
    scale = int8 is not None and int8[2] == "scale"  # 1 does not divide where the kernel's dimension does
    return ParamAxes(
        path,
        (*stacked, *((letter, axis.rstrip("?"), not (scale or axis.endswith("?"))) for letter, _, axis in dimensions)),
    )


def path_name(path: tuple[Any, ...]) -> str:
    """A path of jax.tree_util as text, as in transformer/block_0/mlp/fc1/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_rules(params: Params) -> None:
    """Raises ValueError unless every array of `params` (by part) has one rule, and every rule of its parts an array."""
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for path in paths:
        _axes_of(path)
    for part in params:
        for pattern, _ in RULES[part]:
            if not any(re.fullmatch(f"{part}/(?:{pattern})(/values)?", path) for path in paths):
                raise ValueError(f"the rule {pattern} of {part} in parallel/rules.py matches no parameter")


def param_shardings(params: Params, mesh: Mesh) -> Params:
    """NamedSharding of each array of `params`, a tree by part (transformer, text, tokenizer).

    Raises UserError naming a dimension that does not divide over its axis of the mesh.
    """

    def shard(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _axes_of(path_name(path)).spec(tuple(leaf.shape), mesh.shape))

    return jax.tree_util.tree_map_with_path(shard, params)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """NamedSharding of each array of a TrainState: moments and EMA of a parameter are split as it is.

    Scalars, and vectors that belong to no parameter (an optimizer's coefficients), are whole on every device. Raises
    UserError as `param_shardings`, and ValueError for a larger array that belongs to no parameter.
    """
    known = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}

    def shard(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        words = path_name(path).split("/")
        for start in range(len(words)):
            name = "/".join(words[start:])
            if name in known and known[name].shape == leaf.shape:
                return NamedSharding(mesh, _axes_of(name).spec(tuple(leaf.shape), mesh.shape))
        if leaf.ndim <= 1:
            return NamedSharding(mesh, PartitionSpec())
        raise ValueError(f"{'/'.join(words)} of shape {list(leaf.shape)} belongs to no parameter")

    return jax.tree_util.tree_map_with_path(shard, state)


def with_shardings(tree: Any, shardings: Any) -> Any:
    """The abstract tree with these shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


Specs = tuple[PartitionSpec, PartitionSpec]  # of an array before it is gathered, and after


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x: jax.Array, dtype: DTypeLike, sums: DTypeLike, specs: Specs) -> jax.Array:
    # Cast first, so that `dtype` is communicated; the gradient comes in the type of the result, `sums`.
    x = jax.lax.with_sharding_constraint(x.astype(dtype), specs[0])
    return jax.lax.with_sharding_constraint(x, specs[1]).astype(sums)


def _gather_forward(x: jax.Array, dtype: DTypeLike, sums: DTypeLike, specs: Specs) -> tuple[jax.Array, jax.Array]:
    return _gather(x, dtype, sums, specs), jnp.zeros((0,), x.dtype)


def _gather_backward(
    dtype: DTypeLike, sums: DTypeLike, specs: Specs, like: jax.Array, gradient: jax.Array
) -> tuple[jax.Array]:
    # With its sharding asked for, the sum over examples becomes a reduce-scatter instead of an all-reduce.
    return (jax.lax.with_sharding_constraint(gradient, specs[0]).astype(like.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def gather(part: str, module: str, dtype: DTypeLike, sums: DTypeLike, variables: Params) -> Params:
    """The variables of a module, whole over fsdp on the mesh that is set; those that were split are rounded to `dtype`.

    Gradients come back split, in the type of the parameters.

    Args:
      part: transformer or text.
      module: name of the module below it, as in "block_0"; of a stack, `variables` are the slice of one layer.
      dtype: type that the module computes in, and in which they are gathered.
      sums: type of the result, in which devices sum gradients: `dtype`, or float32, which the module casts itself.
      variables: {"params": tree}.
    """
    sizes = jax.sharding.get_abstract_mesh().shape

    def make_whole(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        axes = _axes_of(f"{part}/{module}/{path_name(path[1:])}")  # without the collection's name
        if len(axes.dimensions) == leaf.ndim + 1:  # a slice of a stack
            axes = ParamAxes(axes.path, axes.dimensions[1:])
        split = axes.spec(leaf.shape, sizes)
        whole = axes.spec(leaf.shape, sizes, without=("fsdp",))
        if split == whole:
            return leaf
        if _INT8.fullmatch(axes.path):  # gathered as it is: a quarter of the bytes
            return _gather(leaf, leaf.dtype, leaf.dtype, (split, whole))
        if axes.path.endswith(_TEXT_KERNEL) and merges_keys_and_values():
            matrix = leaf.reshape(len(leaf), -1)
            split, whole = PartitionSpec(split[0], None), PartitionSpec(None, None)
            return _gather(matrix, dtype, sums, (split, whole)).reshape(leaf.shape)
        return _gather(leaf, dtype, sums, (split, whole))

    return jax.tree_util.tree_map_with_path(make_whole, variables)
