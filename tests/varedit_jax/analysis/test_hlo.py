"""Reading HLO: how often what runs, and what its products cost, on texts as the TPU's compiler writes them."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from varedit_jax.analysis import hlo
from varedit_jax.analysis.hlo import Array

LOOP = (pathlib.Path(__file__).parents[2] / "data" / "hlo" / "loops.txt").read_text()


def test_loops_within_loops_multiply():
    """A product in three rounds of a loop in five rounds of another counts fifteen times."""
    module = hlo.parse(LOOP)
    times = module.executions()
    assert module.entry == "main.7_spmd"
    assert (times["main.7_spmd"], times["outer_body"], times["inner_body"], times["fused.1"]) == (1, 5, 15, 15)
    assert hlo.matmul_flops(module) == 15 * 2 * 8 * 512 * 256


def test_kernels_with_line_breaks_in_their_attributes():
    """The instructions behind them are read too."""
    module = hlo.parse(LOOP)
    kernel, *_ = (entry for entry, _, _ in module.instructions() if entry.opcode == "custom-call")
    assert kernel.op_name == "jit(step)/attention/splash" and list(module.computations[module.entry])[-1] == "while.2"


def test_length_that_xla_states_and_one_that_cannot_be_read():
    stated = LOOP.replace("body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"7"}}')
    assert hlo.parse(stated).executions()["fused.1"] == 5 * 7
    unsigned = LOOP.replace("%bound.1 = s32[]", "%bound.1 = u32[]")
    assert hlo.parse(unsigned).executions()["fused.1"] == 15
    unknown = hlo.parse(LOOP.replace("constant(3)", "get-tuple-element(%c0), index=0"))
    assert unknown.executions()["fused.1"] == 5 and unknown.loops_counted_once() == ["while.1"]
    assert hlo.parse(LOOP).loops_counted_once() == []
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing")


def test_schedules_and_what_is_inside_of_an_instruction():
    """Loops' bodies run one instruction after the other, fusions do not; what these hold is found at any depth."""
    overlap = hlo.parse((pathlib.Path(__file__).parents[2] / "data" / "hlo" / "overlap.txt").read_text())
    assert overlap.schedules() == {"main.7_spmd": 1, "body.1": 2, "windowed_dot_general_body_rs.1": 2}
    assert hlo.parse(LOOP).schedules() == {"main.7_spmd": 1, "outer_body": 5, "inner_body": 15}
    entry = overlap.computations[overlap.entry]
    assert [x.opcode for x, _ in overlap.inside(entry["begin"])] == ["parameter", "all-gather", "custom-call"]
    assert ("all-gather.4", "on_sparse_core") in [
        (x.name, name) for x, name in overlap.inside(entry["all-gather.6.call-start"])
    ]
    assert not list(overlap.inside(entry["while.1"]))
    assert (entry["step.1"].cycles, entry["begin"].cycles) == (300, 0)
    assert overlap.executions()["on_sparse_core"] == 1


def test_attributes_and_arrays():
    """Types with layouts and tuples are taken apart; a name says where an instruction comes from."""
    product = hlo.parse(LOOP).computations["fused.1"]["convolution.1"]
    assert product.operands == ("p0", "p1") and product.results == (Array("bf16", (8, 256)),)
    assert product.op_name == "jit(step)/while/body/mlp/dot_general"
    assert hlo.arrays("(s32[]{:T(128)}, /*index=1*/bf16[8,512]{1,0:T(8,128)(2,1)})") == (
        Array("s32", ()),
        Array("bf16", (8, 512)),
    )
    assert Array("bf16", (8, 512)).bytes == 8192 and Array("pred", (3,)).bytes == 3


def test_products_of_a_compiled_program():
    """A scanned product, a batched one and a strided, padded convolution, as compiled here, against their formulas."""

    def function(x, w, image, kernel):
        x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=6)
        batched = jnp.einsum("bij,bkj->bik", image[..., 0], image[..., 1])
        image = jax.lax.conv_general_dilated(image, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return x, batched, image

    shapes = [(16, 32), (32, 32), (2, 9, 9, 3), (3, 3, 3, 5)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    module = hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())
    # Along 9 inputs, 5 outputs of stride 2 under 3 taps meet 13 that are no padding.
    convolution = 2 * 2 * 5 * 3 * 13 * 13
    assert hlo.matmul_flops(module) == 6 * 2 * 16 * 32 * 32 + 2 * 2 * 9 * 9 * 9 + convolution
