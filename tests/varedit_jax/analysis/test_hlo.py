"""Reading HLO: how often what runs, and what its products cost, on texts as the TPU's compiler writes them."""

import jax
import jax.numpy as jnp
import pytest

from varedit_jax.analysis import hlo
from varedit_jax.analysis.hlo import Array

LOOP = """HloModule jit_step, is_scheduled=true

%fused.1 (p0: bf16[8,512], p1: bf16[512,256]) -> bf16[8,256] {
  %p0 = bf16[8,512]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[512,256]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[8,256]{1,0:T(8,128)(2,1)} convolution(%p0, %p1), dim_labels=bf_io->bf, metadata={op_name="jit(step)/while/body/mlp/dot_general"}
}

%inner_condition (c0: (s32[], bf16[8,512])) -> pred[] {
  %c0 = (s32[]{:T(128)}, bf16[8,512]{1,0:T(8,128)(2,1)}) parameter(0)
  %index.1 = s32[]{:T(128)} get-tuple-element(%c0), index=0
  %bound.1 = s32[]{:T(128)} constant(3)
  ROOT %less.1 = pred[]{:T(512)} compare(%index.1, %bound.1), direction=LT
}

%inner_body (b0: (s32[], bf16[8,512])) -> (s32[], bf16[8,512]) {
  %b0 = (s32[]{:T(128)}, /*index=1*/bf16[8,512]{1,0:T(8,128)(2,1)}) parameter(0)
  %x.1 = bf16[8,512]{1,0:T(8,128)(2,1)} get-tuple-element(%b0), index=1
  %w.1 = bf16[512,256]{1,0:T(8,128)(2,1)} constant({...})
  %y.1 = bf16[8,256]{1,0:T(8,128)(2,1)} fusion(%x.1, %w.1), kind=kOutput, calls=%fused.1
  %index.2 = s32[]{:T(128)} get-tuple-element(%b0), index=0
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[8,512]{1,0:T(8,128)(2,1)}) tuple(%index.2, %x.1)
}

%outer_condition (d0: (s32[], bf16[8,512])) -> pred[] {
  %d0 = (s32[]{:T(128)}, bf16[8,512]{1,0:T(8,128)(2,1)}) parameter(0)
  %index.3 = s32[]{:T(128)} get-tuple-element(%d0), index=0
  %bound.2 = s32[]{:T(128)} constant(5)
  ROOT %less.2 = pred[]{:T(512)} compare(%index.3, %bound.2), direction=LT
}

%outer_body (e0: (s32[], bf16[8,512])) -> (s32[], bf16[8,512]) {
  %e0 = (s32[]{:T(128)}, bf16[8,512]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %while.1 = (s32[]{:T(128)}, bf16[8,512]{1,0:T(8,128)(2,1)}) while(%e0), condition=%inner_condition, body=%inner_body
}

ENTRY %main.7_spmd (x: bf16[8,512]) -> (s32[], bf16[8,512]) {
  %x = bf16[8,512]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %tuple.2 = (s32[]{:T(128)}, bf16[8,512]{1,0:T(8,128)(2,1)}) tuple(%zero, %x)
  ROOT %while.2 = (s32[]{:T(128)}, bf16[8,512]{1,0:T(8,128)(2,1)}) while(%tuple.2), condition=%outer_condition, body=%outer_body
}
"""


def test_loops_within_loops_multiply():
    """A product in three rounds of a loop in five rounds of another counts fifteen times."""
    module = hlo.parse(LOOP)
    times = module.executions()
    assert module.entry == "main.7_spmd"
    assert (times["main.7_spmd"], times["outer_body"], times["inner_body"], times["fused.1"]) == (1, 5, 15, 15)
    assert hlo.product_flops(module) == 15 * 2 * 8 * 512 * 256


def test_length_that_xla_states_and_one_that_cannot_be_read():
    stated = LOOP.replace("body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"7"}}')
    assert hlo.parse(stated).executions()["fused.1"] == 5 * 7
    with pytest.raises(ValueError, match=r"while\.1 has no length"):
        hlo.parse(LOOP.replace("constant(3)", "get-tuple-element(%c0), index=0")).executions()
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing")


def test_attributes_and_arrays():
    """Types with layouts and tuples are taken apart; a name says where an instruction comes from."""
    product = hlo.parse(LOOP).computations["fused.1"]["convolution.1"]
    assert product.root and product.operands == ("p0", "p1") and product.results == (Array("bf16", (8, 256)),)
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
    assert hlo.product_flops(module) == 6 * 2 * 16 * 32 * 32 + 2 * 2 * 9 * 9 * 9 + convolution
