"""Published names and layouts, each read out of real state dicts by hand; and what is missing, unknown or misshapen."""

import json
import pathlib
import re

import numpy as np
import pytest

from varedit_jax.conversion import names, parity
from varedit_jax.conversion.reader import StateDict, read_state_dict
from varedit_jax.errors import UserError
from varedit_jax.parameters import abstract_params, count

GOLDEN = pathlib.Path(__file__).parents[2] / "data" / "golden" / "mini_a"
WIDTH, HEADS, HEAD = 128, 4, 32


@pytest.fixture(scope="module")
def transformer() -> StateDict:
    return read_state_dict(GOLDEN / "transformer.pth")


@pytest.fixture(scope="module")
def tokenizer() -> StateDict:
    return read_state_dict(GOLDEN / "vae.pth")


@pytest.fixture(scope="module")
def expected() -> dict:
    """Abstract transformer and tokenizer of the golden model, by part."""
    config = parity._editor_config(json.loads((GOLDEN / "config.json").read_text()))
    return {part: abstract_params(config, part) for part in ("transformer", "tokenizer")}


def test_layouts_of_the_transformer(transformer: StateDict, expected: dict) -> None:
    ours = names.transformer_params(transformer, expected["transformer"])
    for block, prefix in enumerate(("block_chunks.0.module.0.", "block_chunks.1.module.0.")):
        theirs = {name: transformer[prefix + name] for name in ("sa.mat_qkv.weight", "ca.mat_kv.weight", "sa.q_bias")}
        mine = ours["block_0"] if block == 0 else ours["blocks"]
        pick = (lambda x: x) if block == 0 else (lambda x: x[0])
        qkv = theirs["sa.mat_qkv.weight"].reshape(
            3, HEADS, HEAD, WIDTH
        )  # [out, in], out = q, k, v, each a row of heads
        for part in range(3):
            np.testing.assert_array_equal(
                pick(mine["self_attention"]["qkv_kernel"])[:, part], qkv[part].transpose(2, 0, 1)
            )
        kv = theirs["ca.mat_kv.weight"].reshape(2, HEADS, HEAD, WIDTH)
        np.testing.assert_array_equal(pick(mine["cross_attention"]["kv_kernel"])[:, 1], kv[1].transpose(2, 0, 1))
        np.testing.assert_array_equal(pick(mine["self_attention"]["q_bias"]), theirs["sa.q_bias"].reshape(HEADS, HEAD))
        np.testing.assert_array_equal(pick(mine["mlp"]["fc1"]["kernel"]).T, transformer[f"{prefix}ffn.fc1.weight"])
    np.testing.assert_array_equal(ours["word_embed"]["kernel"].T, transformer["word_embed.weight"])
    np.testing.assert_array_equal(ours["level_embed"], transformer["lvl_embed.weight"])


def test_layouts_of_the_tokenizer(tokenizer: StateDict, expected: dict) -> None:
    ours = names.tokenizer_params(tokenizer, expected["tokenizer"])
    for side, edge in (("encoder", "conv_in"), ("decoder", "conv_out")):
        theirs = tokenizer[f"vae.{side}.{edge}.conv.weight"]
        np.testing.assert_array_equal(ours[side][edge]["kernel"], np.einsum("oiyx->yxio", theirs))
        theirs = tokenizer[f"vae.{side}.mid.block_2.norm1.norm.weight"]
        np.testing.assert_array_equal(ours[side]["mid_1"]["norm_1"]["scale"], theirs)


def test_every_published_value_is_taken_once(transformer: StateDict, tokenizer: StateDict, expected: dict) -> None:
    """As many values there as here, and the same ones."""
    for state, part, convert in (
        (transformer, "transformer", names.transformer_params),
        (tokenizer, "tokenizer", names.tokenizer_params),
    ):
        ours = convert(state, expected[part])
        buffers = [name for name in state if re.search(r"zero_k_bias|lfq|quantize|mask", name)]
        assert count(ours) == sum(x.size for name, x in state.items() if name not in buffers)
        values = np.sort(np.concatenate([np.ravel(x) for x in _leaves(ours)]).astype(np.float32))
        theirs = [np.ravel(x) for name, x in state.items() if name not in buffers]
        np.testing.assert_array_equal(values, np.sort(np.concatenate(theirs).astype(np.float32)))


def _leaves(tree: object) -> list[np.ndarray]:
    return [leaf for value in tree.values() for leaf in _leaves(value)] if isinstance(tree, dict) else [tree]


def same(one: dict, other: dict) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(_leaves(one), _leaves(other), strict=True))


def test_files_without_chunks(transformer: StateDict, expected: dict) -> None:
    plain = {re.sub(r"block_chunks\.(\d)\.module\.0\.", r"blocks.\1.", name): x for name, x in transformer.items()}
    assert set(plain) != set(transformer)
    ours = names.transformer_params(plain, expected["transformer"])
    assert same(ours, names.transformer_params(transformer, expected["transformer"]))


def test_blocks_are_in_order_of_numbers() -> None:
    """Chunk by chunk, and block 10 after block 9, not after block 1."""
    plain = [f"blocks.{i}." for i in range(12)]
    assert names.block_prefixes({f"{prefix}ada_gss" for prefix in plain}, 12) == plain
    chunked = [f"block_chunks.{i}.module.{j}." for i in range(11) for j in range(2)]
    assert names.block_prefixes({f"{prefix}ada_gss" for prefix in chunked}, 22) == chunked
    with pytest.raises(UserError, match="the file holds 12 transformer blocks, the configuration has 32"):
        names.block_prefixes({f"{prefix}ada_gss" for prefix in plain}, 32)


@pytest.mark.parametrize(
    ("pattern", "shorter"), [(r"\.(conv|norm)\.(weight|bias)$", r".\2"), (r"^vae\.", "")], ids=["no inner", "no vae"]
)
def test_shorter_names_of_the_tokenizer(tokenizer: StateDict, expected: dict, pattern: str, shorter: str) -> None:
    """Without the inner `.conv` and `.norm`, and without `vae.`."""
    weights = {name: x for name, x in tokenizer.items() if "lfq" not in name}
    renamed = {re.sub(pattern, shorter, name): x for name, x in weights.items()}
    assert set(renamed).isdisjoint(tokenizer)
    ours = names.tokenizer_params(renamed, expected["tokenizer"])
    assert same(ours, names.tokenizer_params(tokenizer, expected["tokenizer"]))


CASES = {
    "transformer": (names.transformer_params, "block_chunks.1.module.0.ffn.fc2.weight"),
    "tokenizer": (names.tokenizer_params, "encoder.down.0.block.0.conv1.conv.weight"),
}


@pytest.mark.parametrize("part", CASES)
def test_missing_unknown_and_misshapen_tensors_are_named(
    transformer: StateDict, tokenizer: StateDict, expected: dict, part: str
) -> None:
    convert, name = CASES[part]
    state = transformer if part == "transformer" else {key.removeprefix("vae."): x for key, x in tokenizer.items()}
    without = {key: x for key, x in state.items() if key != name}
    with pytest.raises(UserError, match=re.escape("the file has no tensor " + name.replace(".conv.", "."))):
        convert(without, expected[part])
    with pytest.raises(UserError, match=r"tensors the model does not have: a\.weight, zz\.bias"):
        convert(state | {"zz.bias": np.zeros(1), "a.weight": np.zeros(1)}, expected[part])
    wrong = state[name][:, :-1]
    with pytest.raises(UserError, match=re.escape(f"{name} has shape {list(wrong.shape)}, which does not give")):
        convert(state | {name: wrong}, expected[part])
    flipped = state[name].swapaxes(0, 1)
    if flipped.shape != state[name].shape:
        with pytest.raises(UserError, match=re.escape(f"{name} has shape {list(flipped.shape)}")):
            convert(state | {name: flipped}, expected[part])


def test_buffers_are_passed_over(transformer: StateDict, tokenizer: StateDict, expected: dict) -> None:
    """What published files hold and nothing needs; anything else is unknown."""
    buffers = {name: np.zeros(3) for name in ("block_chunks.0.module.0.sa.zero_k_bias", "quantizer.lfq.mask")}
    assert same(
        names.transformer_params(transformer | {"attn_bias.mask": np.zeros(1), **buffers}, expected["transformer"]),
        names.transformer_params(transformer, expected["transformer"]),
    )
    names.tokenizer_params(tokenizer | {"vae.quantizer.lfq.mask": np.zeros(3)}, expected["tokenizer"])
