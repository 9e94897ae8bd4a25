"""Published names and layouts, each read out of real state dicts by hand; and what is missing, unknown or misshapen."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest

from varedit_jax.analysis import parity
from varedit_jax.config import preset
from varedit_jax.errors import UserError
from varedit_jax.parameters import abstract_params, count
from varedit_jax.weights import names
from varedit_jax.weights.reader import StateDict, read_state_dict

GOLDEN = pathlib.Path(__file__).parents[2] / "data" / "golden" / "mini_a"
WIDTH, HEADS, HEAD = 128, 4, 32


@pytest.fixture(scope="module")
def transformer() -> StateDict:
    return read_state_dict(GOLDEN / "transformer.pth")


@pytest.fixture(scope="module")
def tokenizer() -> StateDict:
    return {name.removeprefix("vae."): x for name, x in read_state_dict(GOLDEN / "vae.pth").items()}


@pytest.fixture(scope="module")
def expected() -> dict:
    """Abstract transformer and tokenizer of the golden model, by part."""
    config = parity._editor_config(json.loads((GOLDEN / "config.json").read_text()))
    return {part: abstract_params(config, part) for part in ("transformer", "tokenizer")}


def test_layouts_of_the_transformer(transformer: StateDict, expected: dict) -> None:
    ours = names.to_tree("transformer", transformer, expected["transformer"])
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
    ours = names.to_tree("tokenizer", tokenizer, expected["tokenizer"])
    for side, edge in (("encoder", "conv_in"), ("decoder", "conv_out")):
        theirs = tokenizer[f"{side}.{edge}.conv.weight"]
        np.testing.assert_array_equal(ours[side][edge]["kernel"], np.einsum("oiyx->yxio", theirs))
        theirs = tokenizer[f"{side}.mid.block_2.norm1.norm.weight"]
        np.testing.assert_array_equal(ours[side]["mid_1"]["norm_1"]["scale"], theirs)


def test_every_published_value_is_taken_once(transformer: StateDict, tokenizer: StateDict, expected: dict) -> None:
    """As many values there as here, and the same ones."""
    for state, part in ((transformer, "transformer"), (tokenizer, "tokenizer")):
        ours = names.to_tree(part, state, expected[part])
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
    ours = names.to_tree("transformer", plain, expected["transformer"])
    assert same(ours, names.to_tree("transformer", transformer, expected["transformer"]))


def test_blocks_are_in_order_of_numbers() -> None:
    """Chunk by chunk, and block 10 after block 9, not after block 1."""
    assert names.block_prefixes(12, 0) == [f"blocks.{i}." for i in range(12)]
    chunked = [f"block_chunks.{i}.module.{j}." for i in range(11) for j in range(2)]
    assert names.block_prefixes(22, 11) == chunked
    assert names.dialect_of(f"{prefix}ada_gss" for prefix in chunked) == names.Dialect(chunks=11)
    with pytest.raises(UserError, match="22 blocks do not divide into 4 chunks; give a number that divides 22, or 0"):
        names.block_prefixes(22, 4)


def test_shorter_names_of_the_tokenizer(tokenizer: StateDict, expected: dict) -> None:
    """Without the inner `.conv` and `.norm`."""
    pattern = r"\.(conv|norm)\.(weight|bias)$"
    renamed = {re.sub(pattern, r".\2", name): x for name, x in tokenizer.items() if "lfq" not in name}
    assert set(renamed).isdisjoint(tokenizer)
    assert not names.dialect_of(renamed).inner
    ours = names.to_tree("tokenizer", renamed, expected["tokenizer"])
    assert same(ours, names.to_tree("tokenizer", tokenizer, expected["tokenizer"]))


PLACES = {
    "transformer": "block_chunks.1.module.0.ffn.fc2.weight",
    "tokenizer": "encoder.down.0.block.0.conv1.conv.weight",
}


@pytest.mark.parametrize("part", PLACES)
def test_missing_unknown_and_misshapen_tensors_are_named(
    transformer: StateDict, tokenizer: StateDict, expected: dict, part: str
) -> None:
    """All of them, in one sentence."""
    state = {"transformer": transformer, "tokenizer": tokenizer}[part]
    name, other = PLACES[part], next(key for key in state if key.endswith("bias"))
    spoilt = {key: x for key, x in state.items() if key not in (name, other)}
    spoilt |= {"zz.bias": np.zeros(1), "a.weight": np.zeros(1)}
    with pytest.raises(UserError) as raised:
        names.to_tree(part, spoilt, expected[part])
    sentence = str(raised.value)
    assert "it lacks (2): " in sentence and name in sentence and other in sentence
    assert "it has besides (2): zz.bias, a.weight" in sentence
    wrong = {name: state[name][:, :-1], other: state[other][:-1]}
    with pytest.raises(UserError) as raised:
        names.to_tree(part, state | wrong, expected[part])
    for key, tensor in wrong.items():
        assert f"{key} has shape {list(tensor.shape)}, the model's is {list(state[key].shape)}" in str(raised.value)


def test_buffers_are_checked(transformer: StateDict, tokenizer: StateDict, expected: dict) -> None:
    """Files may lack buffers; what they hold must be what the computation takes for granted."""
    bare = {name: x for name, x in transformer.items() if "zero_k_bias" not in name}
    assert len(bare) == len(transformer) - 5  # two a block, one of the text
    ours = names.to_tree("transformer", transformer, expected["transformer"])
    assert same(names.to_tree("transformer", bare, expected["transformer"]), ours)
    assert same(names.to_tree("transformer", transformer | {"a.mask": np.ones(1)}, expected["transformer"]), ours)
    name = "block_chunks.0.module.0.sa.zero_k_bias"
    with pytest.raises(UserError, match=rf"{name} does not hold zeros"):
        names.to_tree("transformer", transformer | {name: transformer[name] + 1}, expected["transformer"])
    name = "quantizer.lfq.mask"
    with pytest.raises(UserError, match=rf"{name} does not hold the powers of two"):
        names.to_tree("tokenizer", tokenizer | {name: tokenizer[name][::-1]}, expected["tokenizer"])


def test_layouts_are_undone(transformer: StateDict, tokenizer: StateDict, expected: dict) -> None:
    """Published -> ours -> published, tensor by tensor."""
    for part, state in (("transformer", transformer), ("tokenizer", tokenizer)):
        shapes = {name: x.shape for name, x in state.items()}
        wanted = names.flat(expected[part])
        seen = set()
        for link in names.match(part, shapes, expected[part]):
            if not link.is_buffer:
                shape = wanted[link.path].shape[0 if link.index is None else 1 :]
                back = names.to_published(names.to_ours(state[link.name], link, shape), link)
                np.testing.assert_array_equal(back, state[link.name])
                seen.add(link.layout)
        assert len(seen) >= 2


def test_parameters_without_a_published_name_are_refused() -> None:
    tiny = preset("tiny")
    config = dataclasses.replace(tiny, transformer=dataclasses.replace(tiny.transformer, absolute_positions=True))
    with pytest.raises(UserError, match=r"parameters that published models do not have: position_embed/"):
        names.links("transformer", abstract_params(config, "transformer"))
