"""Bytes that instructions read and write, of short programs in the compiler's form, with sums by hand."""

import pathlib

import numpy as np
import pytest

from varedit_jax.analysis import hbm, hlo, work

DATA = pathlib.Path(__file__).parents[2] / "data" / "hlo"

# f32[8,100] has 3200 bytes, bf16[8,100] 1600; three runs of the loop's body.
TEXT = """HloModule jit_step, is_scheduled=true

%slice_body (p0: f32[3,8,100], p1: s32[]) -> bf16[8,100] {
  %p0 = f32[3,8,100]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero.1 = s32[]{:T(128)} constant(0)
  %one.1 = f32[1,8,100]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1, %zero.1, %zero.1), dynamic_slice_sizes={1,8,100}
  %two.1 = f32[8,100]{1,0:T(8,128)} bitcast(%one.1)
  ROOT %three.1 = bf16[8,100]{1,0:T(8,128)(2,1)} convert(%two.1)
}

%late_slice_body (p2: f32[3,8,100], p3: f32[8,100]) -> f32[8,100] {
  %p2 = f32[3,8,100]{2,1,0:T(8,128)} parameter(0)
  %turned.1 = bf16[3,8,100]{2,1,0:T(8,128)(2,1)} convert(%p2)
  %flat.1 = bf16[24,100]{1,0:T(8,128)(2,1)} bitcast(%turned.1)
  %first.1 = bf16[8,100]{1,0:T(8,128)(2,1)} slice(%flat.1), slice={[0:8], [0:100]}
  %p3 = f32[8,100]{1,0:T(8,128)} parameter(1)
  %wide.1 = f32[8,100]{1,0:T(8,128)} convert(%first.1)
  ROOT %sum.1 = f32[8,100]{1,0:T(8,128)} add(%wide.1, %p3)
}

%both_body (p4: f32[3,8,100]) -> f32[3,8,100] {
  %p4 = f32[3,8,100]{2,1,0:T(8,128)} parameter(0)
  %part.1 = f32[1,8,100]{2,1,0:T(8,128)} slice(%p4), slice={[0:1], [0:8], [0:100]}
  %many.1 = f32[3,8,100]{2,1,0:T(8,128)} pad(%part.1, %p4), padding=0_2x0_0x0_0
  ROOT %sum.2 = f32[3,8,100]{2,1,0:T(8,128)} add(%many.1, %p4)
}

%update_body (p5: bf16[3,8,100], p6: f32[8,100], p7: s32[]) -> (bf16[3,8,100], f32[8,100]) {
  %p5 = bf16[3,8,100]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p6 = f32[8,100]{1,0:T(8,128)} parameter(1)
  %p7 = s32[]{:T(128)} parameter(2)
  %zero.2 = s32[]{:T(128)} constant(0)
  %half.1 = bf16[8,100]{1,0:T(8,128)(2,1)} convert(%p6)
  %row.1 = bf16[1,8,100]{2,1,0:T(8,128)(2,1)} bitcast(%half.1)
  %updated.1 = bf16[3,8,100]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%p5, %row.1, %p7, %zero.2, %zero.2)
  %twice.1 = f32[8,100]{1,0:T(8,128)} add(%p6, %p6)
  ROOT %pair.1 = (bf16[3,8,100]{2,1,0:T(8,128)(2,1)}, f32[8,100]{1,0:T(8,128)}) tuple(%updated.1, %twice.1)
}

%not_in_place_body (p8: bf16[3,8,100], p9: bf16[1,8,100], p10: s32[]) -> bf16[3,8,100] {
  %p8 = bf16[3,8,100]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p9 = bf16[1,8,100]{2,1,0:T(8,128)(2,1)} parameter(1)
  %p10 = s32[]{:T(128)} parameter(2)
  %zero.3 = s32[]{:T(128)} constant(0)
  %updated.2 = bf16[3,8,100]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%p8, %p9, %p10, %zero.3, %zero.3)
  ROOT %negated.1 = bf16[3,8,100]{2,1,0:T(8,128)(2,1)} negate(%updated.2)
}

%nested_body (p11: f32[3,8,100], p12: s32[]) -> bf16[8,100] {
  %p11 = f32[3,8,100]{2,1,0:T(8,128)} parameter(0)
  %p12 = s32[]{:T(128)} parameter(1)
  ROOT %inner.1 = bf16[8,100]{1,0:T(8,128)(2,1)} fusion(%p11, %p12), kind=kLoop, calls=%slice_body
}

%gather_body (p13: bf16[8,100], p14: bf16[8,100]) -> (bf16[8,100], bf16[16,100]) {
  %p13 = bf16[8,100]{1,0:T(8,128)(2,1)} parameter(0)
  %p14 = bf16[8,100]{1,0:T(8,128)(2,1)} parameter(1)
  %product.1 = bf16[8,100]{1,0:T(8,128)(2,1)} multiply(%p13, %p13)
  %all-gather.1 = bf16[16,100]{1,0:T(8,128)(2,1)} all-gather(%p14), replica_groups={{0,1}}, dimensions={0}
  ROOT %pair.2 = (bf16[8,100]{1,0:T(8,128)(2,1)}, bf16[16,100]{1,0:T(8,128)(2,1)}) tuple(%product.1, %all-gather.1)
}

%handed_body (p15: f32[3,8,100], p16: s32[]) -> bf16[8,100] {
  %p15 = f32[3,8,100]{2,1,0:T(8,128)} parameter(0)
  %p16 = s32[]{:T(128)} parameter(1)
  %zero.4 = s32[]{:T(128)} constant(0)
  %narrow.1 = bf16[3,8,100]{2,1,0:T(8,128)(2,1)} fusion(%p15), kind=kLoop, calls=%narrow_body
  %one.2 = bf16[1,8,100]{2,1,0:T(8,128)(2,1)} dynamic-slice(%narrow.1, %p16, %zero.4, %zero.4), dynamic_slice_sizes={}
  ROOT %two.2 = bf16[8,100]{1,0:T(8,128)(2,1)} bitcast(%one.2)
}

%narrow_body (p17: f32[3,8,100]) -> bf16[3,8,100] {
  %p17 = f32[3,8,100]{2,1,0:T(8,128)} parameter(0)
  ROOT %narrow.2 = bf16[3,8,100]{2,1,0:T(8,128)(2,1)} convert(%p17)
}

%twice_body (p18: f32[8,100]) -> (bf16[8,100], bf16[1,8,100]) {
  %p18 = f32[8,100]{1,0:T(8,128)} parameter(0)
  %narrow.3 = bf16[8,100]{1,0:T(8,128)(2,1)} convert(%p18)
  %view.1 = bf16[1,8,100]{2,1,0:T(8,128)(2,1)} bitcast(%narrow.3)
  ROOT %pair.3 = (bf16[8,100]{1,0:T(8,128)(2,1)}, bf16[1,8,100]{2,1,0:T(8,128)(2,1)}) tuple(%narrow.3, %view.1)
}

%keep (p19: f32[8,100], p20: bf16[8,100]) -> (f32[8,100], bf16[8,100]) {
  %p19 = f32[8,100]{1,0:T(8,128)} parameter(0)
  %p20 = bf16[8,100]{1,0:T(8,128)(2,1)} parameter(1)
  %negative.1 = bf16[8,100]{1,0:T(8,128)(2,1)} negate(%p20)
  ROOT %pair.4 = (f32[8,100]{1,0:T(8,128)}, bf16[8,100]{1,0:T(8,128)(2,1)}) tuple(%p19, %negative.1)
}

%view_body (p21: f32[8,100]) -> f32[800] {
  %p21 = f32[8,100]{1,0:T(8,128)} parameter(0)
  ROOT %view.2 = f32[800]{0:T(1024)} bitcast(%p21)
}

%rows_body (p22: f32[8,100], p23: s32[4]) -> f32[2,100] {
  %p22 = f32[8,100]{1,0:T(8,128)} parameter(0)
  %p23 = s32[4]{0:T(128)} parameter(1)
  %inside.1 = s32[4]{0:T(128)} custom-call(%p23), custom_call_target="AssumeGatherIndicesInBound"
  %two.3 = s32[2]{0:T(128)} slice(%inside.1), slice={[0:2]}
  ROOT %rows.1 = f32[2,100]{1,0:T(8,128)} gather(%p22, %two.3), offset_dims={1}, slice_sizes={1,100}
}

%condition (c: (s32[], f32[3,8,100])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[3,8,100]{2,1,0:T(8,128)}) parameter(0)
  %index.1 = s32[]{:T(128)} get-tuple-element(%c), index=0
  %bound.1 = s32[]{:T(128)} constant(3)
  ROOT %less.1 = pred[]{:T(512)} compare(%index.1, %bound.1), direction=LT
}

%body (b: (s32[], f32[3,8,100])) -> (s32[], f32[3,8,100]) {
  %b = (s32[]{:T(128)}, f32[3,8,100]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %x = f32[3,8,100]{2,1,0:T(8,128)} get-tuple-element(%b), index=1
  %slice_fusion = bf16[8,100]{1,0:T(8,128)(2,1)} fusion(%x, %i), kind=kLoop, calls=%slice_body
  %nested_fusion = bf16[8,100]{1,0:T(8,128)(2,1)} fusion(%x, %i), kind=kLoop, calls=%nested_body
  ROOT %carried = (s32[]{:T(128)}, f32[3,8,100]{2,1,0:T(8,128)}) tuple(%i, %x)
}

ENTRY %main (x: f32[3,8,100], y: f32[8,100], z: bf16[3,8,100], i: s32[]) -> f32[8,100] {
  %x = f32[3,8,100]{2,1,0:T(8,128)} parameter(0)
  %y = f32[8,100]{1,0:T(8,128)} parameter(1)
  %z = bf16[3,8,100]{2,1,0:T(8,128)(2,1)} parameter(2)
  %i = s32[]{:T(128)} parameter(3)
  %w = bf16[8,100]{1,0:T(8,128)(2,1)} convert(%y)
  %line = f32[2400]{0:T(1024)} bitcast(%x)
  %ahead = (f32[8,100]{1,0:T(8,128)S(1)}, f32[8,100]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%y)
  %there = f32[8,100]{1,0:T(8,128)S(1)} copy-done(%ahead)
  %late_slice_fusion = f32[8,100]{1,0:T(8,128)} fusion(%x, %there), kind=kLoop, calls=%late_slice_body
  %both_fusion = f32[3,8,100]{2,1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%both_body
  %update_fusion = (bf16[3,8,100], f32[8,100]) fusion(%z, %y, %i), kind=kLoop, calls=%update_body
  %row = bf16[1,8,100]{2,1,0:T(8,128)(2,1)} bitcast(%w)
  %not_in_place_fusion = bf16[3,8,100]{2,1,0:T(8,128)(2,1)} fusion(%z, %row, %i), kind=kLoop, calls=%not_in_place_body
  %update = bf16[3,8,100]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%z, %row, %i, %i, %i)
  %twice = f32[8,100]{1,0:T(8,128)} add(%y, %y)
  %gathering_fusion = (bf16[8,100], bf16[16,100]) fusion(%w, %row), kind=kLoop, calls=%gather_body
  %all-gather.2 = bf16[16,100]{1,0:T(8,128)(2,1)} all-gather(%w), replica_groups={{0,1}}, dimensions={0}
  %handed_fusion = bf16[8,100]{1,0:T(8,128)(2,1)} fusion(%x, %i), kind=kLoop, calls=%handed_body
  %twice_fusion = (bf16[8,100], bf16[1,8,100]) fusion(%y), kind=kLoop, calls=%twice_body
  %kept = (f32[8,100], bf16[8,100]) fusion(%y, %w), output_to_operand_aliasing={{0}: (0, {}), {1}: (1, {})}, calls=%keep
  %view_fusion = f32[800]{0:T(1024)} fusion(%y), kind=kLoop, calls=%view_body
  %indices = s32[4]{0:T(128)S(1)} iota(), iota_dimension=0
  %rows_fusion = f32[2,100]{1,0:T(8,128)} fusion(%there, %indices), kind=kCustom, calls=%rows_body
  %sum = f32[8,100]{1,0:T(8,128)} all-reduce(%y), replica_groups={{0,1}}, to_apply=%add_body
  %flat = f32[800]{0:T(1024)} reshape(%sum)
  %sent = (f32[8,100], f32[16,100]) all-gather-start(%y), replica_groups={{0,1}}, dimensions={0}
  %small = bf16[1,8,100]{2,1,0:T(8,128)(2,1)S(1)} bitcast(%row)
  %update.2 = bf16[3,8,100]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%z, %small, %i, %i, %i)
  %start = (s32[]{:T(128)}, f32[3,8,100]{2,1,0:T(8,128)}) tuple(%i, %x)
  %loop = (s32[]{:T(128)}, f32[3,8,100]{2,1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  ROOT %end = f32[8,100]{1,0:T(8,128)} negate(%twice)
}
"""
WIDE, HALF, INDEX = 3200, 1600, 4
MODULE = hlo.parse(TEXT)


@pytest.fixture(scope="module")
def found():
    """By name."""
    return {access.instruction.name: access for access in hbm.accesses(MODULE, [])}


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("w", WIDE + HALF),  # operand and result
        ("twice", WIDE + WIDE),  # an operand counts once
        ("slice_fusion", WIDE + INDEX + HALF),  # of three rows one is read
        ("nested_fusion", WIDE + INDEX + HALF),  # by a fusion in a fusion
        ("late_slice_fusion", WIDE + WIDE + WIDE),  # of what is converted, too, in the type that it has outside
        ("both_fusion", 3 * WIDE + 3 * WIDE),  # a row, and all
        ("update_fusion", WIDE + INDEX + HALF + WIDE),  # a row of the first result, and the second
        ("not_in_place_fusion", 3 * HALF + HALF + INDEX + 3 * HALF),
        ("update", HALF + INDEX + HALF),
        ("gathering_fusion", HALF + HALF),  # what is gathered meanwhile are the links' bytes
        ("handed_fusion", WIDE + INDEX + HALF),  # a slice of what a fusion in the fusion converts
        ("twice_fusion", WIDE + HALF + HALF),  # read for results alone
        ("kept", HALF + HALF),  # a result that is an operand, where that lies
        ("view_fusion", WIDE + WIDE),  # one that lies elsewhere is copied
        ("rows_fusion", WIDE // 4 + 2 * INDEX + WIDE // 4),  # two rows, at two of four indices
        ("flat", WIDE + WIDE),
        ("update.2", HALF + INDEX + HALF),
    ],
)
def test_bytes(found, name, moved):
    assert found[name].bytes == moved


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("late_slice_fusion", WIDE + WIDE),  # an operand is on the chip
        ("rows_fusion", WIDE // 4),  # all operands are
        ("update.2", HALF),  # what is written is, where it comes from
        ("update", HALF + HALF),
        ("ahead", WIDE),
        ("there", 0),
        ("gathering_fusion", HALF + HALF + HALF + 2 * HALF),
        ("all-gather.2", HALF + 2 * HALF),
        ("sent", WIDE + 2 * WIDE),
        ("sum", WIDE + WIDE),
        ("kept", HALF + HALF),
    ],
)
def test_bytes_of_hbm_alone(name, moved):
    """Arrays in a chip's own memory do not count; copies to it and collectives do."""
    assert hbm.bytes_of(MODULE, MODULE.computations["main"][name], "main", alone=True) == moved


def test_a_gather_in_steps_counts_once():
    """Its result at its start; the fusions that overlap with it hand it on where it is."""
    text = (DATA / "overlap.txt").read_text()
    shared = "output_to_operand_aliasing={{1}: (2, {}), {2}: (3, {}), {3}: (3, {})}, calls=%async_collective_fusion.1"
    text = text.replace("calls=%async_collective_fusion.1", shared)
    module = hlo.parse(text.replace("calls=%done.1", "output_to_operand_aliasing={{}: (1, {})}, calls=%done.1"))
    found = {
        entry.name: hbm.bytes_of(module, entry, name, alone=True)
        for name in module.schedules()
        for entry in module.computations[name].values()
    }
    product, part, whole = 2 * 64 * 64, 2 * 256 * 512, 2 * 1024 * 512
    assert found["begin"] == part + whole and found["end"] == 0
    assert found["step.1"] == found["step.2"] == 2 * product


def test_what_moves_nothing(found):
    """Views, copies to VMEM ahead of their use, collectives and loops themselves are not there."""
    fusions = {"slice_fusion", "nested_fusion", "late_slice_fusion", "both_fusion", "update_fusion"}
    fusions |= {"not_in_place_fusion", "gathering_fusion", "handed_fusion", "twice_fusion", "kept"}
    fusions |= {"view_fusion", "rows_fusion"}
    assert set(found) == fusions | {"w", "twice", "update", "update.2", "indices", "flat", "end"}


def test_a_loop_counts_by_its_length(found):
    assert found["slice_fusion"].times == found["nested_fusion"].times == 3
    assert {found[name].times for name in ("w", "update_fusion", "end")} == {1}


def test_kinds_and_kernels():
    """As of what has cycles; kernels and matmuls have operations, and kernels no bytes."""
    module = hlo.parse((DATA / "work.txt").read_text())
    found = {access.instruction.name: access for access in hbm.accesses(module, [np.ones((1000, 1300), bool)])}
    timed = [entry for name in module.schedules() for entry in module.computations[name].values() if entry.cycles]
    assert {entry.name: work.kind_of(module, entry) for entry in timed} == {
        name: access.kind for name, access in found.items() if not access.kernel
    }
    assert found["matmul.1"].flops == 2 * 512**3 and found["matmul.1"].bytes == 2 * 2 * 512 * 512
    assert found["zeros_fusion.1"].bytes == 2 * 4 * 512  # is only written
    kernel = found["splash_mha_fwd_residuals.3"]
    assert kernel.bytes == 0 and kernel.flops == kernel.kernel.flops([]) > 0 and kernel.times == 3
