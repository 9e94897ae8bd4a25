"""What each host reads of weights on disk: what its devices hold, once, and the devices exchange the rest."""

import itertools
import os
import pathlib
import subprocess
import sys
import tracemalloc
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from varedit_jax.errors import UserError
from varedit_jax.weights import blocks, native
from varedit_jax.weights.blocks import RawArray

VALUES = np.random.default_rng(0).normal(size=(3, 24, 40)).astype(np.float32)

# Eight devices as four hosts of two. Every byte that is read goes through `counting`.
HOSTS = """
import math, pathlib, sys
import jax, numpy as np, safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec as P
from varedit_jax.config import MeshConfig
from varedit_jax.parallel.mesh import make_mesh
from varedit_jax.weights import blocks, native

root = pathlib.Path(sys.argv[1])
native._CHUNK_BYTES = 2**19
blocks._PART_BYTES = 2**18
shapes = {"blocks/fc1": (5, 128, 2048), "blocks/fc2": (5, 2048, 128), "embed": (1024, 512), "heads": (6, 8, 16, 512),
    "odd": (1001, 512), "bias": (2048,)}
values = {name: np.random.default_rng(1).normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
leaves = {name: native.Leaf(value.shape, value.dtype) for name, value in values.items()}
part = native.OrbaxPart(root / "chunks" / "text", leaves)
part.create()
for name, value in values.items():
    if native.is_stack(name):
        for index, row in enumerate(value):
            part.write(name, index, row)
    else:
        part.write(name, None, value)
(root / "file").mkdir()
safetensors.numpy.save_file(values, root / "file" / "text.safetensors")

blocks.host_of = lambda device: device.id // 2
count = 0
read_ranges = blocks.read_ranges

def counting(path, ranges):
    global count
    found = read_ranges(path, ranges)
    count += sum(map(len, found))
    return found

blocks.read_ranges = counting
specs = {
    "blocks/fc1": P(None, "fsdp", "tensor"), "blocks/fc2": P(None, "tensor", "fsdp"),
    "embed": P(None, "fsdp"), "heads": P(None, "tensor", None, "fsdp"), "odd": P(None, "fsdp"), "bias": P(),
}
for sizes in [dict(data=1, fsdp=8), dict(data=1, fsdp=2, tensor=4), dict(data=2, fsdp=2, tensor=2)]:
    mesh = make_mesh(MeshConfig(**sizes))
    for form in ("chunks", "file"):
        for name, leaf in native.find_part(root / form, "text").items():
            count, sharding = 0, NamedSharding(mesh, specs[name])
            like = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            array = native.load_sharded(leaf, like)
            np.testing.assert_array_equal(array, values[name])
            assert array.sharding == sharding
            hosts = blocks.held(sharding, leaf.shape, leaf.shape).values()
            holds = sum(4 * math.prod(b - a for a, b in block) for own in hosts for block in set(own.values()))
            assert 0 < count <= 1.1 * holds, (sizes, form, name, count, holds)
            reading = blocks.choose_reading(leaf, sharding, 4)
            if reading.exchanged:  # nothing is gathered whole on the way
                like = jax.ShapeDtypeStruct(reading.shape, leaf.dtype, sharding=reading.sharding)
                text = blocks.exchange_of(leaf.shape, sharding, reading).lower(like).compile().as_text()
                assert "all-to-all" in text and "all-gather" not in text, (sizes, name)
                print("exchanged", name)
"""


@pytest.mark.subprocess
def test_a_host_reads_what_it_holds_once(tmp_path: pathlib.Path) -> None:
    """In both forms, on meshes with and without replicas, also where blocks lie across the stored order."""
    done = subprocess.run(
        [sys.executable, "-c", HOSTS, str(tmp_path)],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {f"exchanged {name}" for name in ("embed", "blocks/fc2", "heads", "odd")} <= set(done.stdout.splitlines())


@pytest.mark.parametrize("chunks", [(1, 24, 40), (1, 10, 40), (2, 7, 9), (3, 24, 40)])
@pytest.mark.parametrize("block", [((0, 3), (0, 24), (0, 40)), ((1, 2), (3, 17), (5, 6)), ((0, 3), (23, 24), (0, 40))])
@pytest.mark.parametrize("least", [1, 64, 10**6])
def test_any_block_of_any_chunks(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    chunks: tuple[int, int, int],
    block: tuple[tuple[int, int], ...],
    least: int,
) -> None:
    """Also of chunks that go beyond the array's end; what is read is what was said to be."""
    monkeypatch.setattr("varedit_jax.weights.blocks._LEAST_RUN", least)
    monkeypatch.setattr(native, "_chunks", lambda *_, **__: chunks)
    part = native.OrbaxPart(tmp_path / "text", {"x": native.Leaf(VALUES.shape, VALUES.dtype)})
    part.create()
    part.write("x", None, VALUES)
    read: list[int] = []
    raw = native.find_part(tmp_path, "text")["x"].raw
    assert isinstance(raw, RawArray) and raw.chunks == chunks
    ranges = blocks.read_ranges

    def counting(path: pathlib.Path, wanted: list[tuple[int, int]]) -> list[bytes]:
        read.extend(length for _, length in wanted)
        return ranges(path, wanted)

    monkeypatch.setattr(blocks, "read_ranges", counting)
    np.testing.assert_array_equal(raw.read(block), VALUES[tuple(slice(*part) for part in block)])
    assert sum(read) == raw.bytes_of(block)


@pytest.mark.parametrize("chunks", [(1, 1, 1), (3, 24, 40), (1, 5, 40), (2, 24, 7)])
@pytest.mark.parametrize("block", [((0, 3), (0, 24), (0, 40)), ((1, 3), (3, 17), (5, 6)), ((2, 3), (0, 24), (9, 40))])
def test_parts_make_up_a_block(
    monkeypatch: pytest.MonkeyPatch, chunks: tuple[int, int, int], block: tuple[tuple[int, int], ...]
) -> None:
    """Each value once, no part larger than allowed but for whole chunks, and none that divides a chunk needlessly."""
    monkeypatch.setattr(blocks, "_PART_BYTES", 400)
    seen, around = np.zeros((3, 24, 40), int), np.zeros((3, 24, 40), int)
    around[blocks.slices(block)] = 1
    parts = list(blocks.parts_of(block, chunks, 4))
    for part in parts:
        seen[blocks.slices(part)] += 1
        touched = [-(-high // size) - low // size for (low, high), size in zip(part, chunks, strict=True)]
        assert blocks.size_of(part) * 4 <= 400 or max(touched) == 1
    np.testing.assert_array_equal(seen, around)
    of_chunk = [{(low // size, (high - 1) // size) for low, high in axis} for axis, size in _axes(parts, chunks)]
    assert chunks == (1, 1, 1) or all(_apart(ranges) for ranges in of_chunk)


def _axes(parts: list[Any], chunks: tuple[int, ...]) -> list[tuple[set[tuple[int, int]], int]]:
    return [({part[axis] for part in parts}, size) for axis, size in enumerate(chunks)]


def _apart(ranges: set[tuple[int, int]]) -> bool:
    """True if no two ranges of chunks share one."""
    ordered = sorted(ranges)
    return all(last < first for (_, last), (first, _) in itertools.pairwise(ordered))


@pytest.mark.parametrize("form", ["file", "chunks"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_host_needs_memory_for_an_array_and_a_part(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, form: str, dtype: str
) -> None:
    """Nothing is as large as the array but the array: no copy, and none in float32 of what is kept in bfloat16."""
    monkeypatch.setattr(blocks, "_PART_BYTES", 2**18)
    values = np.random.default_rng(0).normal(size=(8, 512, 512)).astype(np.float32)
    if form == "file":
        safetensors.numpy.save_file({"blocks/x": values}, tmp_path / "text.safetensors")
    else:
        part = native.OrbaxPart(tmp_path / "text", {"blocks/x": native.Leaf(values.shape, values.dtype)})
        part.create()
        for index, row in enumerate(values):
            part.write("blocks/x", index, row)
    leaf = native.find_part(tmp_path, "text")["blocks/x"]
    like = jax.ShapeDtypeStruct(values.shape, dtype)
    native.load_sharded(leaf, like)  # what is imported and cached on first use
    tracemalloc.start()
    try:
        array = native.load_sharded(leaf, like)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(array, values.astype(dtype))
    assert array.nbytes <= most <= array.nbytes + 6 * 2**18


@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (300, 11)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpu_takes_the_memory_of_an_array_as_it_is(shape: tuple[int, ...], dtype: str) -> None:
    memory = blocks._zeros(shape, np.dtype(dtype))
    assert (memory.shape, memory.dtype) == (shape, dtype) and not memory.any()
    assert jax.device_put(memory).unsafe_buffer_pointer() == memory.ctypes.data


def test_values_that_do_not_fit_the_type_are_one_sentence(tmp_path: pathlib.Path) -> None:
    """3.4e38 is finite, and rounds to infinity in bfloat16; NaN is none in any type."""
    safetensors.numpy.save_file(
        {"large": np.float32([1, 3.4e38]), "none": np.float32([np.nan, 1, 2])}, tmp_path / "text.safetensors"
    )
    leaves = native.find_part(tmp_path, "text")
    for name, dtype, sentence in (
        ("large", "bfloat16", "text.safetensors: large, as bfloat16, holds 1 of 2 values that are NaN or infinite"),
        ("none", "bfloat16", "text.safetensors: none holds 1 of 3 values that are NaN or infinite"),
        ("none", "float32", "text.safetensors: none holds 1 of 3 values that are NaN or infinite"),
    ):
        with pytest.raises(UserError, match=sentence):
            native.load_sharded(leaves[name], jax.ShapeDtypeStruct(leaves[name].shape, dtype))
    large = native.load_sharded(leaves["large"], jax.ShapeDtypeStruct((2,), "float32"))
    np.testing.assert_array_equal(large, np.float32([1, 3.4e38]))
