"""One table of names and layouts: path in our tree <-> published PyTorch name.

A row is (our path, published name, layout). `{}` in both stands for the same number. Layouts, from PyTorch's to ours:

    matrix   [out, in] -> transposed, then reshaped to our shape ([in, out], or [in, 3, heads, head size], ...)
    conv     [out, in, y, x] -> [y, x, in, out]
    plain    reshaped to our shape
"""

import re
from collections.abc import Iterator
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from varedit_jax.conversion.reader import StateDict
from varedit_jax.errors import UserError

Row = tuple[str, str, str]
Params = dict[str, Any]

_BLOCK: tuple[Row, ...] = (
    ("ada_gss", "ada_gss", "plain"),
    ("self_attention/scale_mul", "sa.scale_mul_1H11", "plain"),
    ("self_attention/q_bias", "sa.q_bias", "plain"),
    ("self_attention/v_bias", "sa.v_bias", "plain"),
    ("self_attention/qkv_kernel", "sa.mat_qkv.weight", "matrix"),
    ("self_attention/proj/kernel", "sa.proj.weight", "matrix"),
    ("self_attention/proj/bias", "sa.proj.bias", "plain"),
    ("cross_norm/scale", "ca_norm.weight", "plain"),
    ("cross_norm/bias", "ca_norm.bias", "plain"),
    ("cross_attention/v_bias", "ca.v_bias", "plain"),
    ("cross_attention/q/kernel", "ca.mat_q.weight", "matrix"),
    ("cross_attention/q/bias", "ca.mat_q.bias", "plain"),
    ("cross_attention/kv_kernel", "ca.mat_kv.weight", "matrix"),
    ("cross_attention/proj/kernel", "ca.proj.weight", "matrix"),
    ("cross_attention/proj/bias", "ca.proj.bias", "plain"),
    ("mlp/fc1/kernel", "ffn.fc1.weight", "matrix"),
    ("mlp/fc1/bias", "ffn.fc1.bias", "plain"),
    ("mlp/fc2/kernel", "ffn.fc2.weight", "matrix"),
    ("mlp/fc2/bias", "ffn.fc2.bias", "plain"),
)

_AROUND_BLOCKS: tuple[Row, ...] = (
    ("text_unconditional", "cfg_uncond", "plain"),
    ("pos_start", "pos_start", "plain"),
    ("text_norm/scale", "text_norm.weight", "plain"),
    ("text_pool/query", "text_proj_for_sos.ca.mat_q", "plain"),
    ("text_pool/v_bias", "text_proj_for_sos.ca.v_bias", "plain"),
    ("text_pool/kv_kernel", "text_proj_for_sos.ca.mat_kv.weight", "matrix"),
    ("text_pool/proj/kernel", "text_proj_for_sos.ca.proj.weight", "matrix"),
    ("text_pool/proj/bias", "text_proj_for_sos.ca.proj.bias", "plain"),
    ("text_proj_in/kernel", "text_proj_for_ca.0.weight", "matrix"),
    ("text_proj_in/bias", "text_proj_for_ca.0.bias", "plain"),
    ("text_proj_out/kernel", "text_proj_for_ca.2.weight", "matrix"),
    ("text_proj_out/bias", "text_proj_for_ca.2.bias", "plain"),
    ("level_embed", "lvl_embed.weight", "plain"),
    ("word_embed/kernel", "word_embed.weight", "matrix"),
    ("word_embed/bias", "word_embed.bias", "plain"),
    ("shared_ada/kernel", "shared_ada_lin.1.weight", "matrix"),
    ("shared_ada/bias", "shared_ada_lin.1.bias", "plain"),
    ("head_ada/kernel", "head_nm.ada_lin.1.weight", "matrix"),
    ("head_ada/bias", "head_nm.ada_lin.1.bias", "plain"),
    ("head/kernel", "head.weight", "matrix"),
    ("head/bias", "head.bias", "plain"),
)

# Norms and convolutions of the tokenizer sit in an inner module `norm` or `conv` in some published files.
_TOKENIZER: tuple[tuple[str, str], ...] = (
    (r"(encoder|decoder)/(conv_in|conv_out)", r"\1.\2.conv"),
    (r"(encoder|decoder)/norm_out", r"\1.norm_out.norm"),
    (r"encoder/down_(\d+)/downsample", r"encoder.down.\1.downsample.conv.conv"),
    (r"decoder/up_(\d+)/upsample", r"decoder.up.\1.upsample.conv.conv"),
    (r"(encoder|decoder)/(down|up)_(\d+)/block_(\d+)/(norm|conv)_(\d)", r"\1.\2.\3.block.\4.\5\6.\5"),
    (r"(encoder|decoder)/(down|up)_(\d+)/block_(\d+)/shortcut", r"\1.\2.\3.block.\4.nin_shortcut.conv"),
    (r"(encoder|decoder)/mid_0/(norm|conv)_(\d)", r"\1.mid.block_1.\2\3.\2"),
    (r"(encoder|decoder)/mid_1/(norm|conv)_(\d)", r"\1.mid.block_2.\2\3.\2"),
)
_LEAVES = {"kernel": ("weight", "conv"), "scale": ("weight", "plain"), "bias": ("bias", "plain")}

# Buffers that published files hold and no computation needs.
_BUFFERS = re.compile(r"(.*\.)?(zero_k_bias|mask|lfq\..*)$|quantize(r)?\..*")


def block_prefixes(names: set[str], depth: int) -> list[str]:
    """Published prefix of every block: `block_chunks.{i}.module.{j}.`, or `blocks.{i}.` where a file has no chunks.

    Raises UserError if the file holds another number of blocks than `depth`.
    """
    matches = [re.match(r"block_chunks\.(\d+)\.module\.(\d+)\.|blocks\.(\d+)\.", name) for name in names]
    found = {m[0]: tuple(int(n) for n in m.groups() if n is not None) for m in matches if m}
    prefixes = sorted(found, key=lambda prefix: found[prefix])
    if len(prefixes) != depth:
        raise UserError(f"the file holds {len(prefixes)} transformer blocks, the configuration has {depth}")
    return prefixes


def _to_ours(tensor: np.ndarray, layout: str, shape: tuple[int, ...], name: str) -> np.ndarray:
    published = tensor.shape
    if layout == "matrix":
        tensor = tensor.T
    elif layout == "conv":
        tensor = tensor.transpose(2, 3, 1, 0)
    fits = tensor.shape == shape if layout == "conv" else tensor.size == np.prod(shape)
    if not fits or (layout == "matrix" and tensor.shape[0] != shape[0]):
        raise UserError(f"{name} has shape {list(published)}, which does not give the model's {list(shape)}")
    return tensor.reshape(shape)


def _take(prefix: str, state: StateDict, used: set[str], row: Row, shape: tuple[int, ...]) -> np.ndarray:
    name = prefix + row[1]
    if name not in state:
        raise UserError(f"the file has no tensor {name}")
    used.add(name)
    return _to_ours(state[name], row[2], shape, name)


def _check_all_used(state: StateDict, used: set[str]) -> None:
    unknown = sorted(name for name in set(state) - used if not _BUFFERS.match(name))
    if unknown:
        raise UserError(f"the file holds tensors the model does not have: {', '.join(unknown)}")


def transformer_params(state: StateDict, expected: Params) -> Params:
    """Published transformer state dict -> our tree, shaped like `expected` (jax.eval_shape of `init`).

    Raises UserError naming the tensor that is missing, unknown or of another shape.
    """
    flat = flax.traverse_util.flatten_dict(expected, sep="/")
    depth = 1 + (flat["blocks/ada_gss"].shape[0] if "blocks/ada_gss" in flat else 0)
    prefixes = block_prefixes(set(state), depth)
    used: set[str] = set()
    ours: dict[str, np.ndarray] = {}
    for row in _AROUND_BLOCKS:
        ours[row[0]] = _take("", state, used, row, flat[row[0]].shape)
    for row in _BLOCK:
        shape = flat[f"block_0/{row[0]}"].shape
        blocks = [_take(prefix, state, used, row, shape) for prefix in prefixes]
        ours[f"block_0/{row[0]}"] = blocks[0]
        if depth > 1:
            ours[f"blocks/{row[0]}"] = np.stack(blocks[1:])
    _check_all_used(state, used)
    return flax.traverse_util.unflatten_dict(ours, sep="/")


def tokenizer_names(expected: Params) -> Iterator[Row]:
    """Rows of the tokenizer's table, one a parameter of `expected`."""
    for path in flax.traverse_util.flatten_dict(expected, sep="/"):
        module, leaf = path.rsplit("/", 1)
        suffix, layout = _LEAVES[leaf]
        for pattern, published in _TOKENIZER:
            if re.fullmatch(pattern, module):
                yield path, re.sub(pattern, published, module) + f".{suffix}", layout
                break
        else:
            raise ValueError(f"no row of the table names the tokenizer parameter {path}")


def tokenizer_params(state: StateDict, expected: Params) -> Params:
    """Published tokenizer state dict (bare, or under `vae`) -> our tree, shaped like `expected`.

    Names with and without the inner `.conv` / `.norm` are taken. Raises UserError as `transformer_params` does.
    """
    state = {name.removeprefix("vae."): tensor for name, tensor in state.items()}
    flat = flax.traverse_util.flatten_dict(expected, sep="/")
    used: set[str] = set()
    ours = {}
    for row in tokenizer_names(expected):
        bare = re.sub(r"\.(conv|norm)\.(weight|bias)$", r".\2", row[1])
        name = row[1] if row[1] in state else bare
        ours[row[0]] = _take("", state, used, (row[0], name, row[2]), flat[row[0]].shape)
    _check_all_used(state, used)
    return flax.traverse_util.unflatten_dict(ours, sep="/")


def as_float32(params: Params) -> Params:
    """Every tensor as float32."""
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)
