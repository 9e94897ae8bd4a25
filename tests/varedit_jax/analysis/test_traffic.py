"""Bytes that a compiled program moves, and arrays it should not make, on a text as the TPU's compiler writes it."""

import pathlib

import pytest

from varedit_jax.analysis import hlo, traffic

TEXT = (pathlib.Path(__file__).parents[2] / "data" / "hlo" / "edit.txt").read_text()
SHAPES = traffic.Shapes(
    layers=4,
    stacks=frozenset({(4, 256, 512)}),
    heads=2,
    head_size=128,
    queries=16,
    keys=500,
    samples=2,
    cache_tokens=512,
)
STACK, CACHE = 4 * 256 * 512, 4 * 2 * 2 * 512 * 128


@pytest.fixture(scope="module")
def module():
    return hlo.parse(TEXT)


def moved(module, name):
    computation = next(place for place, found in module.computations.items() if name in found)
    return traffic.moved(module, computation, module.computations[computation][name])


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("made.1", 16 * 256 + STACK // 4),  # a layer of the stack alone; what it makes stays on the chip
        ("made.2", 512 * 256 + 16 * 256),  # a matrix that a fusion in the fusion hands on: all of it
        ("same.1", 2 * 512 * 256),  # all of it, handed on
        ("kept.1", 2 * 2 * 2 * 16 * 128),  # an update in place: read and written
        ("layer.1", 2 * CACHE // 4),  # a copy of a layer: read and written
        ("copy-start.1", 16 * 256),  # to the chip: read
        ("copy-done.1", 0),
        ("while.1", 0),  # its body counts
        ("room.1", 0),
        ("q.1", 0),
    ],
)
def test_bytes_of_an_instruction(module, name, elements):
    scalars = {"made.1": 4, "kept.1": 4, "layer.1": 0}.get(name, 0)  # positions
    assert moved(module, name) == 2 * elements + scalars


def test_bytes_of_a_program(module):
    """Loops by their length; a kernel as it states them."""
    assert moved(module, "cached_attention.1") == 50000
    body = sum(moved(module, name) for name in ("made.1", "cached_attention.1", "layer.1", "kept.1"))
    entry = sum(moved(module, name) for name in ("convert.1", "copy-start.1", "seen.1", "made.2", "wide.1", "same.1"))
    assert traffic.hbm_bytes(module) == 4 * body + entry
    assert moved(module, "convert.1") == STACK * (4 + 2)


def test_kernels(module):
    assert traffic.kernel_calls(module) == 4 and traffic.kernel_flops(module) == 4 * 1000


def test_what_is_in_the_way(module):
    """Scores in float32, a stack that is converted as a whole, a layer of the cache that is copied in the loop."""
    assert traffic.scores(module, SHAPES) == ["f32[2, 2, 16, 512] ", "f32[2, 2, 16, 512] jit(scale)/attend/dot"]
    assert traffic.whole_stacks(module, SHAPES) == ["convert bf16[4, 256, 512] 1,048,576 bytes jit(scale)/narrowed"]
    assert traffic.cache_copies(module, SHAPES) == ["4 x dynamic-slice bf16[1, 2, 2, 512, 128] jit(scale)/copied"]


def test_what_is_not(module):
    """Rows and heads of activations are no scores; other stacks no weights; an update in place is no copy."""
    text = TEXT.replace("f32[2,2,16,512]", "f32[2,2,16,128]")
    assert traffic.scores(hlo.parse(text), SHAPES) == []
    assert traffic.scores(hlo.parse(TEXT.replace("f32[2,2,16,512]", "bf16[2,2,16,512]")), SHAPES) == []
    other = TEXT.replace("bf16[4,256,512]{2,1,0:T(8,128)(2,1)} convert(", "bf16[4,256,511]{2,1,0} convert(")
    assert traffic.whole_stacks(hlo.parse(other), SHAPES) == []
    without = "\n".join(line for line in TEXT.splitlines() if "%layer.1 =" not in line)
    assert traffic.cache_copies(hlo.parse(without), SHAPES) == []
