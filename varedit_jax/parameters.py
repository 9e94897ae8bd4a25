"""The parameters of an editor, abstract and initial: one tree for init, restore and conversion."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from varedit_jax.config import ComputeType, EditorConfig
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


_COMPUTED_IN_DTYPE = re.compile(r"block(_0|s)/.*kernel")  # of the transformer, by path: the matrices of its blocks


def stored_params(config: EditorConfig, part: str, text_dtype: ComputeType = "float32") -> Params:
    """`abstract_params` in the types in which weights that are not trained are kept.

    Matrices of the transformer's blocks have the type that these compute in: they are rounded once, instead of in every
    step. The text encoder has `text_dtype`, which it has to compute in. All else is float32, as it is computed.
    """

    def typed(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if part == "text":
            return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(text_dtype))
        if part == "transformer" and _COMPUTED_IN_DTYPE.fullmatch(name):
            return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.transformer.dtype))
        return leaf

    return jax.tree_util.tree_map_with_path(typed, abstract_params(config, part))


def count(params: Params) -> int:
    """Number of parameters of a tree, abstract or not."""
    return sum(x.size for x in jax.tree.leaves(params))


def bytes_by_type(params: Params) -> dict[str, int]:
    """Bytes of a tree, abstract or not, by the name of the type."""
    sizes: dict[str, int] = {}
    for leaf in jax.tree.leaves(params):
        sizes[str(leaf.dtype)] = sizes.get(str(leaf.dtype), 0) + leaf.size * leaf.dtype.itemsize
    return sizes
