"""The parameters of an editor, abstract and initial: one tree for init, restore and conversion."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from varedit_jax.config import ComputeType, EditorConfig
from varedit_jax.quantized import Int8, quantize
from varedit_jax.scales import Pyramid, editor_pyramid
from varedit_jax.text.t5 import T5Encoder
from varedit_jax.tokenizer.autoencoder import Autoencoder
from varedit_jax.transformer.model import Transformer
from varedit_jax.types import Params


def init_tokenizer(config: EditorConfig, key: jax.Array) -> Params:
    """Random tokenizer."""
    side = config.tokenizer.stride  # parameters do not depend on the size of images
    return Autoencoder(config.tokenizer).init(key, jnp.zeros((1, side, side, 3)))["params"]


def init_text(config: EditorConfig, key: jax.Array) -> Params:
    """Random text encoder."""
    ids_BT, length_B = jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32)
    return T5Encoder(config.text).init(key, ids_BT, length_B)["params"]


def init_transformer(config: EditorConfig, key: jax.Array, pyramid: Pyramid | None = None) -> Params:
    """Random transformer. Its parameters do not depend on the pyramid, which only has to fit."""
    pyramid = pyramid or editor_pyramid(config)
    bits = config.transformer.token_bits
    source_BSN = jnp.zeros((1, pyramid.source_tokens(config.transformer.conditioning), bits))
    inputs_BLN = jnp.zeros((1, pyramid.target_tokens - 1, bits))
    features_BTE, length_B = jnp.zeros((1, 1, config.text.width)), jnp.ones((1,), jnp.int32)
    model = Transformer(config.transformer, pyramid)
    return model.init(key, source_BSN, inputs_BLN, features_BTE, length_B)["params"]


INIT: dict[str, Callable[[EditorConfig, jax.Array], Params]] = {
    "tokenizer": init_tokenizer,
    "text": init_text,
    "transformer": init_transformer,
}


@functools.lru_cache(maxsize=64)  # tracing an initialization takes a second or two; callers do not change the tree
def abstract_params(config: EditorConfig, part: str, pyramid: Pyramid | None = None) -> Params:
    """Shapes and types of a part (tokenizer, text, transformer) as jax.ShapeDtypeStruct; nothing is allocated."""
    if part == "transformer":
        pyramid = pyramid or Pyramid(((1, 1),), ((1, 1),))  # the one that is traced in the least time
        return jax.eval_shape(lambda: init_transformer(config, jax.random.key(0), pyramid))
    return jax.eval_shape(lambda: INIT[part](config, jax.random.key(0)))


# By part and path: the matrices of blocks and layers. They are most of an editor: 97 % of 8B with its encoders.
_MATRICES = {"transformer": re.compile(r"block(_0|s)/.*kernel"), "text": re.compile(r"layers/.*kernel")}
_STACKS = ("blocks/", "layers/")


def stored_params(
    config: EditorConfig, part: str, text_dtype: ComputeType = "float32", quantized: bool = False
) -> Params:
    """`abstract_params` in the types in which weights that are not trained are kept.

    Matrices of the transformer's blocks have the type that these compute in: they are rounded once, instead of in every
    step. The text encoder has `text_dtype`, which it has to compute in. All else is float32, as it is computed. With
    `quantized` the matrices of both are `Int8`.
    """

    def typed(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct | Int8:
        name = _name(path)
        summed = summed_axes(part, name)
        if quantized and summed:
            scale = tuple(1 if axis in summed else size for axis, size in enumerate(leaf.shape))
            return Int8(jax.ShapeDtypeStruct(leaf.shape, jnp.int8), jax.ShapeDtypeStruct(scale, jnp.float32))
        if part == "text":
            return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(text_dtype))
        if summed:
            return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.transformer.dtype))
        return leaf

    return jax.tree_util.tree_map_with_path(typed, abstract_params(config, part))


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def summed_axes(part: str, path: str) -> tuple[int, ...]:
    """The axes that products with the matrix at `path` sum over, of a stack as of its entries; () if it is none."""
    if part not in _MATRICES or not _MATRICES[part].fullmatch(path):
        return ()
    first = 1 if path.startswith(_STACKS) else 0
    return (first, first + 1) if path == "layers/attention/out/kernel" else (first,)


def quantized_params(params: Params) -> Params:
    """Parameters by part with the matrices of transformer and text encoder in int8, in the memory of the host.

    Stacks are rounded layer by layer.
    """

    def rounded(part: str, path: tuple[Any, ...], leaf: Any) -> Any:
        summed = summed_axes(part, _name(path))
        return quantize(leaf, summed) if summed else leaf

    return {
        part: jax.tree_util.tree_map_with_path(functools.partial(rounded, part), tree) for part, tree in params.items()
    }


def count(params: Params) -> int:
    """Number of parameters of a tree, abstract or not."""
    return sum(x.size for x in jax.tree.leaves(params))


def bytes_by_type(params: Params) -> dict[str, int]:
    """Bytes of a tree, abstract or not, by the name of the type."""
    sizes: dict[str, int] = {}
    for leaf in jax.tree.leaves(params):
        sizes[str(leaf.dtype)] = sizes.get(str(leaf.dtype), 0) + leaf.size * leaf.dtype.itemsize
    return sizes
