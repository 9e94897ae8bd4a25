"""One table of names and layouts: path in our tree <-> published PyTorch name, for both directions.

A row is (our path, published name, layout). Rows of a block or a layer are repeated for each of them; our tensors are
stacked along a leading axis (a transformer's block 0 stands alone). `LAYOUTS` converts a tensor from one side to the
other. Tokenizer names are patterns, because that tree is regular.

Sources: model.md, sections 2, 4 and 6; the published state dicts; Flan-T5 in the names of the transformers library.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np

from varedit_jax.errors import UserError
from varedit_jax.types import Params

Shape = tuple[int, ...]


class NameRow(NamedTuple):
    """A row of the table."""

    path: str  # in our tree; of a buffer: the parameter whose number of values it has
    name: str  # published
    layout: str


class TensorLayout(NamedTuple):
    """Conversion of a tensor's shape and axes."""

    published_shape: Callable[[Shape], Shape]  # from our shape
    ours: Callable[[np.ndarray, Shape], np.ndarray]  # published tensor, our shape -> ours
    published: Callable[[np.ndarray, Shape], np.ndarray]  # our tensor, published shape -> published


def _reshaped(published_shape: Callable[[Shape], Shape]) -> TensorLayout:
    return TensorLayout(published_shape, lambda x, shape: x.reshape(shape), lambda x, shape: x.reshape(shape))


LAYOUTS = {
    "plain": _reshaped(lambda shape: shape),
    "flat": _reshaped(lambda shape: (math.prod(shape),)),  # [H, D] -> [H D]
    "row": _reshaped(lambda shape: (1, *shape)),
    "rows": _reshaped(lambda shape: (1, 1, *shape)),
    "heads": _reshaped(lambda shape: (1, *shape, 1, 1)),  # [H] -> [1, H, 1, 1]
    "matrix": TensorLayout(  # [in, ...out] -> [out, in]
        lambda shape: (math.prod(shape[1:]), shape[0]),
        lambda x, shape: x.T.reshape(shape),
        lambda x, shape: x.reshape(shape[::-1]).T,
    ),
    "matrix_in": TensorLayout(  # [...in, out] -> [out, in]
        lambda shape: (shape[-1], math.prod(shape[:-1])),
        lambda x, shape: x.T.reshape(shape),
        lambda x, shape: x.reshape(shape[::-1]).T,
    ),
    "conv": TensorLayout(  # [y, x, in, out] -> [out, in, y, x]
        lambda shape: (shape[3], shape[2], shape[0], shape[1]),
        lambda x, shape: x.transpose(2, 3, 1, 0),
        lambda x, shape: x.transpose(3, 2, 0, 1),
    ),
}

# Buffers that published files hold and no computation of ours needs: their required content, from their shape.
BUFFERS: dict[str, Callable[[Shape], np.ndarray]] = {
    "zeros": lambda shape: np.zeros(shape, np.float32),
    "powers": lambda shape: 2 ** np.arange(shape[0] - 1, -1, -1, dtype=np.int64),  # value of each bit of a code
}

_AROUND_BLOCKS = (
    NameRow("text_unconditional", "cfg_uncond", "plain"),
    NameRow("pos_start", "pos_start", "rows"),
    NameRow("text_norm/scale", "text_norm.weight", "plain"),
    NameRow("text_pool/query", "text_proj_for_sos.ca.mat_q", "row"),
    NameRow("text_pool/v_bias", "text_proj_for_sos.ca.v_bias", "flat"),
    NameRow("text_pool/v_bias", "text_proj_for_sos.ca.zero_k_bias", "zeros"),
    NameRow("text_pool/kv_kernel", "text_proj_for_sos.ca.mat_kv.weight", "matrix"),
    NameRow("text_pool/proj/kernel", "text_proj_for_sos.ca.proj.weight", "matrix"),
    NameRow("text_pool/proj/bias", "text_proj_for_sos.ca.proj.bias", "plain"),
    NameRow("text_proj_in/kernel", "text_proj_for_ca.0.weight", "matrix"),
    NameRow("text_proj_in/bias", "text_proj_for_ca.0.bias", "plain"),
    NameRow("text_proj_out/kernel", "text_proj_for_ca.2.weight", "matrix"),
    NameRow("text_proj_out/bias", "text_proj_for_ca.2.bias", "plain"),
    NameRow("level_embed", "lvl_embed.weight", "plain"),
    NameRow("word_embed/kernel", "word_embed.weight", "matrix"),
    NameRow("word_embed/bias", "word_embed.bias", "plain"),
    NameRow("shared_ada/kernel", "shared_ada_lin.1.weight", "matrix"),
    NameRow("shared_ada/bias", "shared_ada_lin.1.bias", "plain"),
    NameRow("head_ada/kernel", "head_nm.ada_lin.1.weight", "matrix"),
    NameRow("head_ada/bias", "head_nm.ada_lin.1.bias", "plain"),
    NameRow("head/kernel", "head.weight", "matrix"),
    NameRow("head/bias", "head.bias", "plain"),
)

_BLOCK = (
    NameRow("ada_gss", "ada_gss", "rows"),
    NameRow("self_attention/scale_mul", "sa.scale_mul_1H11", "heads"),
    NameRow("self_attention/q_bias", "sa.q_bias", "flat"),
    NameRow("self_attention/v_bias", "sa.v_bias", "flat"),
    NameRow("self_attention/v_bias", "sa.zero_k_bias", "zeros"),
    NameRow("self_attention/qkv_kernel", "sa.mat_qkv.weight", "matrix"),
    NameRow("self_attention/proj/kernel", "sa.proj.weight", "matrix"),
    NameRow("self_attention/proj/bias", "sa.proj.bias", "plain"),
    NameRow("cross_attention/v_bias", "ca.v_bias", "flat"),
    NameRow("cross_attention/v_bias", "ca.zero_k_bias", "zeros"),
    NameRow("cross_attention/q/kernel", "ca.mat_q.weight", "matrix"),
    NameRow("cross_attention/q/bias", "ca.mat_q.bias", "plain"),
    NameRow("cross_attention/kv_kernel", "ca.mat_kv.weight", "matrix"),
    NameRow("cross_attention/proj/kernel", "ca.proj.weight", "matrix"),
    NameRow("cross_attention/proj/bias", "ca.proj.bias", "plain"),
    NameRow("mlp/fc1/kernel", "ffn.fc1.weight", "matrix"),
    NameRow("mlp/fc1/bias", "ffn.fc1.bias", "plain"),
    NameRow("mlp/fc2/kernel", "ffn.fc2.weight", "matrix"),
    NameRow("mlp/fc2/bias", "ffn.fc2.bias", "plain"),
    NameRow("cross_norm/scale", "ca_norm.weight", "plain"),
    NameRow("cross_norm/bias", "ca_norm.bias", "plain"),
)

_TEXT_AROUND = (
    NameRow("embedding/embedding", "shared.weight", "plain"),
    NameRow("relative_bias/table", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "plain"),
    NameRow("final_norm/scale", "encoder.final_layer_norm.weight", "plain"),
)

_TEXT_LAYER = (
    NameRow("attention/query/kernel", "layer.0.SelfAttention.q.weight", "matrix"),
    NameRow("attention/key/kernel", "layer.0.SelfAttention.k.weight", "matrix"),
    NameRow("attention/value/kernel", "layer.0.SelfAttention.v.weight", "matrix"),
    NameRow("attention/out/kernel", "layer.0.SelfAttention.o.weight", "matrix_in"),
    NameRow("attention_norm/scale", "layer.0.layer_norm.weight", "plain"),
    NameRow("mlp/gate/kernel", "layer.1.DenseReluDense.wi_0.weight", "matrix"),
    NameRow("mlp/up/kernel", "layer.1.DenseReluDense.wi_1.weight", "matrix"),
    NameRow("mlp/down/kernel", "layer.1.DenseReluDense.wo.weight", "matrix"),
    NameRow("mlp_norm/scale", "layer.1.layer_norm.weight", "plain"),
)

# Module of our tokenizer -> published module; norms and convolutions sit in an inner module of that name.
_TOKENIZER = (
    (r"(encoder|decoder)/(conv_in|conv_out)", r"\1.\2.conv"),
    (r"(encoder|decoder)/norm_out", r"\1.norm_out.norm"),
    (r"encoder/down_(\d+)/downsample", r"encoder.down.\1.downsample.conv.conv"),
    (r"decoder/up_(\d+)/upsample", r"decoder.up.\1.upsample.conv.conv"),
    (r"(encoder|decoder)/(down|up)_(\d+)/block_(\d+)/(norm|conv)_(\d)", r"\1.\2.\3.block.\4.\5\6.\5"),
    (r"(encoder|decoder)/(down|up)_(\d+)/block_(\d+)/shortcut", r"\1.\2.\3.block.\4.nin_shortcut.conv"),
    (r"(encoder|decoder)/mid_0/(norm|conv)_(\d)", r"\1.mid.block_1.\2\3.\2"),
    (r"(encoder|decoder)/mid_1/(norm|conv)_(\d)", r"\1.mid.block_2.\2\3.\2"),
)
_TOKENIZER_LEAVES = {"kernel": ("weight", "conv"), "scale": ("weight", "plain"), "bias": ("bias", "plain")}
_TOKENIZER_BUFFERS = (
    NameRow("encoder/conv_out/bias", "quantizer.lfq.mask", "powers"),
    NameRow("encoder/conv_out/bias", "quantize.lfq.mask", "powers"),
)

# Other tensors that published files may hold: masks for a resolution, a tokenizer's counts of its codes, the decoder of
# T5 and the second name of its embedding.
_PASSED_OVER = {
    "transformer": re.compile(r"(.*\.)?mask$"),
    "tokenizer": re.compile(r"quantizer?\..*"),
    "text": re.compile(r"decoder\..*|lm_head\..*|encoder\.embed_tokens\.weight$"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialect:
    """One of the published ways to write names."""

    chunks: int = 0  # `block_chunks.{i}.module.{j}`, the depth in so many equal chunks; 0: `blocks.{i}`
    inner: bool = True  # the tokenizer's `.conv` and `.norm` modules


@dataclasses.dataclass(frozen=True)
class Link:
    """One published tensor and its path in our tree."""

    name: str
    shape: Shape  # published
    path: str  # in our tree, slashes between; for a buffer see NameRow
    index: int | None  # along the leading axis of a stack
    layout: str  # of LAYOUTS or BUFFERS

    @property
    def is_buffer(self) -> bool:
        """Returns True if our tree has no such tensor: it is computed when files are written."""
        return self.layout in BUFFERS


def published_chunks(depth: int, width: int) -> int:
    """Chunks of blocks in published transformers: 8 in 2B and 8B, 4 in the smaller ones (model.md, section 6).

    Of 20B (58 blocks, which 4 does not divide) nothing is published; it gets 2.
    """
    if (depth, width) in ((32, 2048), (40, 3584)):
        return 8
    return next((chunks for chunks in (4, 2) if depth % chunks == 0), 0)


def flat(tree: Params) -> dict[str, Any]:
    """A tree by path, slashes between."""
    return flax.traverse_util.flatten_dict(tree, sep="/")


def tree(flat_tree: Mapping[str, Any]) -> Params:
    """Inverse of `flat`."""
    return flax.traverse_util.unflatten_dict(dict(flat_tree), sep="/")


def links(part: str, expected: Params, dialect: Dialect | None = None) -> list[Link]:
    """Every published tensor of a part (transformer, tokenizer, text), in the order of published files.

    `expected` is our tree, abstract or not. Raises UserError if it holds parameters that have no published name, or a
    depth that does not divide into the chunks of the dialect.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in flat(expected).items()}
    rows = {"transformer": _transformer_links, "tokenizer": _tokenizer_links, "text": _text_links}[part]
    found = list(rows(shapes, dialect or Dialect()))
    nameless = sorted(set(shapes) - {link.path for link in found})
    if nameless:
        raise UserError(
            f"the {part} has parameters that published models do not have: {', '.join(nameless)}; "
            f"such a model can be exported in our own names only (--to=directory)"
        )
    return found


def _link(
    row: NameRow, shapes: Mapping[str, Shape], prefix: str = "", path: str = "", index: int | None = None
) -> Link:
    path += row.path
    ours = shapes[path] if index is None else shapes[path][1:]
    shape = (math.prod(ours),) if row.layout in BUFFERS else LAYOUTS[row.layout].published_shape(ours)
    return Link(prefix + row.name, shape, path, index, row.layout)


def _transformer_links(shapes: Mapping[str, Shape], dialect: Dialect) -> Iterator[Link]:
    for row in _AROUND_BLOCKS:
        yield _link(row, shapes)
    depth = 1 + (shapes["blocks/ada_gss"][0] if "blocks/ada_gss" in shapes else 0)
    for block, prefix in enumerate(block_prefixes(depth, dialect.chunks)):
        for row in _BLOCK:
            path, index = ("block_0/", None) if block == 0 else ("blocks/", block - 1)
            yield _link(row, shapes, prefix, path, index)


def block_prefixes(depth: int, chunks: int) -> list[str]:
    """Published prefix of each block. Raises UserError if the depth does not divide into the chunks."""
    if chunks == 0:
        return [f"blocks.{block}." for block in range(depth)]
    if depth % chunks:
        raise UserError(f"{depth} blocks do not divide into {chunks} chunks; give a number that divides {depth}, or 0")
    each = depth // chunks
    return [f"block_chunks.{block // each}.module.{block % each}." for block in range(depth)]


def block_counts(names: Iterable[str]) -> tuple[int, int]:
    """Depth of a transformer and number of chunks (0: none), by the largest numbers in the published names."""
    numbers = [
        (int(match[2] or -1) + 1, int(match[3]) + 1)
        for name in names
        if (match := re.match(r"(block_chunks\.(\d+)\.module|blocks)\.(\d+)\.", name))
    ]
    chunks, each = (max((number[part] for number in numbers), default=0) for part in (0, 1))
    return max(chunks, 1) * each, chunks


def _text_links(shapes: Mapping[str, Shape], dialect: Dialect) -> Iterator[Link]:
    for row in _TEXT_AROUND:
        yield _link(row, shapes)
    for layer in range(shapes["layers/attention_norm/scale"][0]):
        for row in _TEXT_LAYER:
            yield _link(row, shapes, f"encoder.block.{layer}.", "layers/", layer)


def _tokenizer_links(shapes: Mapping[str, Shape], dialect: Dialect) -> Iterator[Link]:
    for path in shapes:
        module, leaf = path.rsplit("/", 1)
        suffix, layout = _TOKENIZER_LEAVES[leaf]
        for pattern, published in _TOKENIZER:
            if re.fullmatch(pattern, module):
                name = re.sub(pattern, published, module)
                name = name if dialect.inner else re.sub(r"\.(conv|norm)$", "", name)
                yield _link(NameRow(path, f"{name}.{suffix}", layout), shapes)
                break
    for row in _TOKENIZER_BUFFERS:
        yield _link(row, shapes)


def dialect_of(names: Iterable[str]) -> Dialect:
    """The dialect in which a file's names are written."""
    names = list(names)
    return Dialect(chunks=block_counts(names)[1], inner="encoder.conv_in.weight" not in names)


def match(part: str, shapes: Mapping[str, Shape], expected: Params) -> list[Link]:
    """The links of a published file that holds the tensors `shapes`: every parameter, and those buffers it has.

    Raises UserError listing every missing and every unexpected name, or every tensor of another shape with both shapes.
    """
    wanted = {link.name: link for link in links(part, expected, dialect_of(shapes))}
    if part == "text" and "shared.weight" not in shapes and "encoder.embed_tokens.weight" in shapes:
        renamed = dataclasses.replace(wanted.pop("shared.weight"), name="encoder.embed_tokens.weight")
        wanted[renamed.name] = renamed
    missing = [name for name, link in wanted.items() if name not in shapes and not link.is_buffer]
    unexpected = [name for name in shapes if name not in wanted and not _PASSED_OVER[part].fullmatch(name)]
    if missing or unexpected:
        lists = [
            f"{what} ({len(found)}): {', '.join(found)}"
            for what, found in (("it lacks", missing), ("it has besides", unexpected))
            if found
        ]
        raise UserError(f"the file is not one of this {part}; {'; '.join(lists)}")
    misshapen = [
        f"{name} has shape {list(shapes[name])}, the model's is {list(link.shape)}"
        for name, link in wanted.items()
        if name in shapes and tuple(shapes[name]) != link.shape
    ]
    if misshapen:
        raise UserError(f"the file is of another {part}: {'; '.join(misshapen)}")
    return [link for name, link in wanted.items() if name in shapes]


def to_ours(tensor: np.ndarray, link: Link, shape: Shape) -> np.ndarray:
    """A published tensor in our layout; `shape` is ours, without the axis of a stack. A view where that is possible."""
    return LAYOUTS[link.layout].ours(tensor, shape)


def to_published(tensor: np.ndarray, link: Link) -> np.ndarray:
    """Our tensor (one entry of a stack) in the published layout. A view where that is possible."""
    return LAYOUTS[link.layout].published(tensor, link.shape)


def check_buffer(tensor: np.ndarray, link: Link) -> None:
    """Raises UserError if a buffer does not hold what the computation takes for granted."""
    if not np.array_equal(np.asarray(tensor, np.float64), BUFFERS[link.layout](link.shape).astype(np.float64)):
        wanted = "zeros" if link.layout == "zeros" else "the powers of two, falling"
        raise UserError(f"{link.name} does not hold {wanted}; the file is of a model that computes something else")


def to_tree(part: str, state: Mapping[str, np.ndarray], expected: Params) -> Params:
    """A published state dict -> our tree, shaped like `expected` (of jax.ShapeDtypeStruct), types as published.

    Raises UserError as `match` and `check_buffer` do.
    """
    wanted = flat(expected)
    stacks: dict[str, list[np.ndarray]] = {}
    ours: dict[str, np.ndarray] = {}
    for link in match(part, {name: tuple(x.shape) for name, x in state.items()}, expected):
        tensor = np.asarray(state[link.name])
        if link.is_buffer:
            check_buffer(tensor, link)
        elif link.index is None:
            ours[link.path] = to_ours(tensor, link, wanted[link.path].shape)
        else:
            stacks.setdefault(link.path, []).append(to_ours(tensor, link, wanted[link.path].shape[1:]))
    return tree(ours | {path: np.stack(entries) for path, entries in stacks.items()})


def as_float32(params: Params) -> Params:
    """Every tensor as float32."""
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)
