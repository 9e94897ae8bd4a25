"""Weights converted to int8 on disk: what is loaded from them, and damage that is found."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from varedit_jax.config import EditingConfig, SamplingConfig, preset
from varedit_jax.conversion import convert
from varedit_jax.conversion.quantize import to_int8
from varedit_jax.errors import UserError
from varedit_jax.parameters import abstract_params, quantized_params
from varedit_jax.quantized import Int8, dequantized
from varedit_jax.sampling.loading import load
from varedit_jax.weights import native
from varedit_jax.weights.directory import PARTS, save_weights
from varedit_jax.weights.export_source import open_source

TINY = preset("tiny")
EDITING = EditingConfig(text_dtype="bfloat16", aspects=("1.0",))
KERNEL = "blocks/mlp/fc1/kernel"


@pytest.fixture(scope="module")
def params(lively) -> dict[str, Any]:
    return {part: lively(abstract_params(TINY, part)) for part in PARTS}


@pytest.fixture(scope="module")
def plain(params, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("weights") / "plain"
    save_weights(path, TINY, params, sampling=SamplingConfig(top_p=0.97), editing=EDITING)
    return path


@pytest.fixture(scope="module")
def int8(plain, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("weights") / "int8"
    to_int8(open_source(plain), path, quiet=True)
    return path


@pytest.fixture
def copy(int8, tmp_path) -> pathlib.Path:
    """A directory to damage."""
    return pathlib.Path(shutil.copytree(int8, tmp_path / "copy"))


def assert_same(found: Any, wanted: Any) -> None:
    """Types and values."""
    assert jax.tree.map(lambda x: str(x.dtype), found) == jax.tree.map(lambda x: str(x.dtype), wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_what_is_rounded_on_disk_while_it_is_read_or_in_memory_is_the_same(plain, int8, params):
    """Bit for bit; other parameters come as they always do, as does what is recorded."""
    stored, read = load(int8), load(plain, dtype="int8")
    assert_same(stored.params, read.params)
    assert stored[2:4] == read[2:4] == (SamplingConfig(top_p=0.97), EDITING)
    assert stored.config == read.config == TINY
    wanted = load(plain).params
    rounded = quantized_params(params)
    is_int8 = lambda leaf: isinstance(leaf, Int8)  # noqa: E731
    wanted = jax.tree.map(lambda own, other: own if is_int8(own) else other, rounded, wanted, is_leaf=is_int8)
    assert_same(read.params, wanted)
    assert load(int8, dtype="int8").config == TINY


def test_other_types_give_what_int8_stands_for(int8, params):
    """To edit with and to train from, in float32; rounded once more for bfloat16."""
    kernel = quantized_params(params)["transformer"]["blocks"]["mlp"]["fc1"]["kernel"]
    wanted = dequantized(kernel.values, kernel.scale)
    loaded = {dtype: load(int8, dtype=dtype).params["transformer"] for dtype in ("float32", "bfloat16")}
    np.testing.assert_array_equal(loaded["float32"]["blocks"]["mlp"]["fc1"]["kernel"], wanted)
    half = loaded["bfloat16"]["blocks"]["mlp"]["fc1"]["kernel"]
    np.testing.assert_array_equal(half, wanted.astype(half.dtype))
    assert str(half.dtype) == "bfloat16"
    part = native.load_part(int8, "transformer", abstract_params(TINY, "transformer"))
    np.testing.assert_array_equal(part["blocks"]["mlp"]["fc1"]["kernel"], wanted)
    leaf = open_source(int8).open("transformer")[KERNEL]
    np.testing.assert_array_equal(leaf.read((slice(0, 1), slice(2, 5), slice(3, 9))), wanted[:1, 2:5, 3:9])
    first = open_source(int8).open("transformer")["block_0/mlp/fc1/kernel"]
    np.testing.assert_array_equal(first.read(), loaded["float32"]["block_0"]["mlp"]["fc1"]["kernel"])


def test_it_takes_a_quarter_of_the_disk(int8, plain):
    def size(directory: pathlib.Path) -> int:
        leaves = open_source(directory).open("transformer").values()
        stored = [leaf.source for leaf in leaves if isinstance(leaf.source, native.StoredInt8)]
        return sum(int(np.prod(x.shape)) * x.dtype.itemsize for s in stored for x in (s.values, s.scale))

    matrices = 16 * TINY.transformer.width**2 * TINY.transformer.depth
    # A scale each: qkv 3, q 1, kv 2, outputs 2, fc1 4, fc2 1.
    channels = 13 * TINY.transformer.width * TINY.transformer.depth
    assert size(plain) == 0
    assert size(int8) == matrices + 4 * channels


# --- damage


def chunks(directory: pathlib.Path, name: str) -> list[pathlib.Path]:
    """Files of the values of an array of the transformer."""
    found = sorted((directory / "transformer" / name.replace("/", ".")).iterdir())
    return [path for path in found if not path.name.startswith(".")]


@pytest.mark.parametrize("name", [KERNEL, KERNEL + native.SCALE])
def test_values_and_scales_are_verified(copy, name):
    count = convert.verify(copy)
    assert count == len(json.loads((copy / "manifest.json").read_text())["tensors"])
    path = chunks(copy, name)[0]
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"checksum of transformer/blocks/mlp/fc1/kernel\[0\] differs"):
        convert.verify(copy)
    path.unlink()
    with pytest.raises(UserError, match=r"checksum of transformer/blocks/mlp/fc1/kernel\[0\] differs"):
        convert.verify(copy)
    with pytest.raises(UserError, match=f"{KERNEL}.* is damaged"):
        load(copy)


def rewrite_scale(directory: pathlib.Path, shape: tuple[int, ...], fill: float) -> None:
    """The scales of a kernel as an array of this shape."""
    name = KERNEL + native.SCALE
    part = native.OrbaxPart(directory / "transformer", {})
    where = directory / "transformer" / name.replace("/", ".")
    shutil.rmtree(where)
    part._open(name, native.Leaf(shape, np.dtype(np.float32))).write(np.full(shape, fill, np.float32)).result()


def test_scales_of_another_shape(copy):
    layers, _, channels = load(copy).params["transformer"]["blocks"]["mlp"]["fc1"]["kernel"].scale.shape
    rewrite_scale(copy, (layers, 1, channels - 1), 1.0)
    with pytest.raises(UserError, match=r"kernel_scale is float32 of shape .* does not fit the int8 array of shape"):
        load(copy)
    rewrite_scale(copy, (layers, 1, 1), 1.0)
    with pytest.raises(UserError, match=r"one scale per output channel is \[\d+, 1, \d+\]; convert the weights again"):
        load(copy)
    rewrite_scale(copy, (layers, 1, channels), np.nan)
    with pytest.raises(UserError, match="values that are NaN or infinite"):
        load(copy)


def test_int8_without_scales(copy):
    """The description of the checkpoint does not have them any more."""
    path = copy / "transformer" / "_METADATA"
    described = json.loads(path.read_text())
    entries = described["tree_metadata"]
    scale = next(key for key, entry in entries.items() if entry["key_metadata"][-1]["key"] == "kernel_scale")
    del entries[scale]
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match="is int8 without its scales .*kernel_scale; convert the weights again"):
        load(copy)


def test_int8_is_not_rounded_again(int8, tmp_path):
    with pytest.raises(UserError, match="the tokenizer|the text in .* is int8 already; give the weights"):
        to_int8(open_source(int8), tmp_path / "again", quiet=True)
    assert not (tmp_path / "again").exists()


# --- on a mesh

ON_A_MESH = """
import functools, sys
import jax, numpy as np
from varedit_jax.config import MeshConfig
from varedit_jax.parallel.mesh import make_mesh
from varedit_jax.parallel.rules import check_rules, gather, param_shardings
from varedit_jax.sampling.loading import load
from varedit_jax.scales import editor_pyramid
from varedit_jax.text.t5 import T5Encoder
from varedit_jax.transformer.model import Transformer

mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
alone = load(sys.argv[1])
check_rules(alone.params)
for where, dtype in ((sys.argv[1], None), (sys.argv[2], "int8")):
    split = load(where, dtype=dtype, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, split.params, alone.params)
    assert jax.tree.map(lambda x: x.sharding, split.params) == param_shardings(split.params, mesh)
block = split.params["transformer"]["blocks"]
for kernel in (block["mlp"]["fc1"]["kernel"], block["mlp"]["fc2"]["kernel"]):
    print([x.addressable_shards[0].data.shape for x in (kernel.values, kernel.scale)])

config, draw = alone.config, np.random.default_rng(0)
tokens = draw.normal(size=(2, 16, 4)).astype(np.float32), draw.normal(size=(2, 20, 4)).astype(np.float32)
ids_BT, length_B = np.int32([[3, 4, 5, 1], [7, 1, 0, 0]]), np.int32([4, 2])

def run(params):
    features = T5Encoder(config.text, gather=functools.partial(gather, "text")).apply(
        {"params": params["text"]}, ids_BT, length_B)
    model = Transformer(config.transformer, editor_pyramid(config), functools.partial(gather, "transformer"))
    return model.apply({"params": params["transformer"]}, *tokens, features, length_B)

wanted = jax.jit(run)(alone.params)
with jax.set_mesh(mesh):
    lowered = jax.jit(run).lower(split.params)
    compiled = lowered.compile()
    found = compiled(split.params)
np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.std(wanted))
gathers = [line for line in compiled.as_text().splitlines() if "all-gather" in line]
print("gathers in int8" if any(" s8[" in line for line in gathers) else "")
"""


@pytest.mark.slow
@pytest.mark.subprocess
def test_values_and_scales_are_split_alike(int8, plain):
    """As they lie on disk, and rounded while they are read: a host's part of a channel is not its scale.

    Models compute on a mesh what they do on one device; kernels are gathered in int8.
    """
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MESH, str(int8), str(plain)],
        env={
            **os.environ,
            "JAX_NUM_CPU_DEVICES": "4",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "PYTHONPATH": str(pathlib.Path(__file__).parents[3]),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[(2, 16, 64), (2, 1, 64)]\n[(2, 64, 16), (2, 1, 16)]\ngathers in int8\n"
