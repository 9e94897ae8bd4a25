"""Collectives of a compiled program: kinds, purposes, who takes part, and what they move."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from varedit_jax import hardware
from varedit_jax.analysis import compiled, hlo
from varedit_jax.parallel.topology import topology_devices

# As the compiler writes for a TPU: a gather in a loop, a gather made of a sum with zeros, a sum that is cut at once, a
# sum over everything, tokens gathered between chips with the same examples, an activation gathered, one sent on.
TEXT = """HloModule jit_step

%all-reduce-scatter (input: bf16[64,256]) -> bf16[32,256] {
  %input = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.2 = bf16[64,256]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=3, replica_groups={{0,2},{1,3},{4,6},{5,7}}, use_global_device_ids=true, to_apply=%add, metadata={op_name="jit(step)/transpose(jvp())/mlp/dot_general"}
  ROOT %dynamic-slice.6 = bf16[32,256]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.2)
}

%condition (c0: (s32[], bf16[32,256])) -> pred[] {
  %c0 = (s32[]{:T(128)}, bf16[32,256]{1,0:T(8,128)(2,1)}) parameter(0)
  %index.1 = s32[]{:T(128)} get-tuple-element(%c0), index=0
  %bound.1 = s32[]{:T(128)} constant(3)
  ROOT %less.1 = pred[]{:T(512)} compare(%index.1, %bound.1), direction=LT
}

%body (b0: (s32[], bf16[32,256])) -> (s32[], bf16[32,256]) {
  %b0 = (s32[]{:T(128)}, bf16[32,256]{1,0:T(8,128)(2,1)}) parameter(0)
  %w.1 = bf16[32,256]{1,0:T(8,128)(2,1)} get-tuple-element(%b0), index=1
  %all-gather.1 = bf16[64,256]{1,0:T(8,128)(2,1)} all-gather(%w.1), channel_id=1, replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}, use_global_device_ids=true
  %fusion.1 = bf16[32,256]{1,0:T(8,128)(2,1)} fusion(%all-gather.1), kind=kCustom, calls=%all-reduce-scatter
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[32,256]{1,0:T(8,128)(2,1)}) tuple(%w.1, %fusion.1)
}

ENTRY %main.7_spmd (x: bf16[32,256]) -> bf16[32,256] {
  %x = bf16[32,256]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %tuple.2 = (s32[]{:T(128)}, bf16[32,256]{1,0:T(8,128)(2,1)}) tuple(%zero, %x)
  %while.2 = (s32[]{:T(128)}, bf16[32,256]{1,0:T(8,128)(2,1)}) while(%tuple.2), condition=%condition, body=%body
  %dynamic-update-slice.7 = f32[64,256]{1,0:T(8,128)} dynamic-update-slice(%x, %x, %zero)
  %all-reduce.3 = f32[64,256]{1,0:T(8,128)} all-reduce(%dynamic-update-slice.7), channel_id=4, replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_1'}, to_apply=%add
  %all-reduce.4 = (f32[10]{0:T(256)}, f32[]{:T(128)}) all-reduce(%x, %zero), channel_id=5, replica_groups={}, to_apply=%add, metadata={op_name="jit(step)/transpose(jvp())/bias"}
  %all-gather.2 = bf16[4,512,64]{2,1,0:T(8,128)(2,1)} all-gather(%x), channel_id=6, replica_groups=mesh['axis_0'=8] {'axis_0':(4)2}, dimensions={1}
  %all-gather-start.3 = (bf16[4,64]{1,0}, bf16[4,512]{1,0}) all-gather-start(%x), channel_id=7, replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={1}, metadata={op_name="jit(step)/ada"}
  ROOT %collective-permute-start.4 = (bf16[32,256]{1,0}, bf16[32,256]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=8, source_target_pairs={{0,1},{1,0}}
}
"""


@pytest.fixture(scope="module")
def mesh():
    """Data 2 x fsdp 2 x tensor 2."""
    devices = np.array(topology_devices("v5e:2x4"), object).reshape(2, 2, 2)
    return Mesh(devices, ("data", "fsdp", "tensor"))


@pytest.fixture(scope="module")
def found(mesh):
    return compiled.collectives(hlo.parse(TEXT), mesh)


def test_kinds_axes_and_bytes(found):
    """Every way of writing groups; what runs in a loop counts each time; a cut sum is a reduce-scatter."""
    seen = [(entry.kind, entry.array.shape, entry.times, entry.axes, entry.group, entry.bytes) for entry in found]
    assert sorted(seen) == sorted(
        [
            ("all-gather", (64, 256), 3, ("fsdp",), 2, 3 * 64 * 256 * 2),
            ("reduce-scatter", (64, 256), 3, ("fsdp",), 2, 3 * 64 * 256 * 2),
            ("all-gather", (64, 256), 1, ("fsdp",), 2, 64 * 256 * 4),
            ("all-reduce", (10,), 1, ("data", "fsdp", "tensor"), 8, 40),
            ("all-reduce", (), 1, ("data", "fsdp", "tensor"), 8, 4),
            ("all-gather", (4, 512, 64), 1, ("tensor",), 2, 4 * 512 * 64 * 2),
            ("all-gather", (4, 512), 1, ("fsdp",), 2, 4 * 512 * 2),
            ("collective-permute", (32, 256), 1, ("tensor",), 2, 32 * 256 * 2),
        ]
    )


def test_purposes(found, mesh):
    """Parameters and their gradients by size, tokens by the axis; an activation gathered over fsdp is named."""
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())
    stack = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    params = [
        jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=split),
        jax.ShapeDtypeStruct((4, 512), jnp.float32, sharding=whole),
        jax.ShapeDtypeStruct((3, 8, 20), jnp.float32, sharding=stack),
    ]
    sizes = compiled.parameter_sizes(params)
    assert {64 * 256, 3 * 8 * 10, 8 * 10} <= sizes and 4 * 512 not in sizes
    counts = compiled.summary(found, sizes, activation=2000)
    assert {name: entry["count"] for name, entry in counts["by_purpose"].items()} == {
        compiled.PARAMETERS: 4,
        compiled.GRADIENTS: 3,
        compiled.SUMS: 1,
        compiled.TOKENS: 2,
        compiled.OTHER: 1,
    }
    assert counts["activation_sized_all_gathers"] == 1
    assert counts["activation_sized"] == ["bf16[4, 512] jit(step)/ada"]
    assert compiled.summary(found, sizes, activation=4000)["activation_sized_all_gathers"] == 0


def test_link_time(found):
    """A gather sends the others' share, a sum twice that, over the links of a chip in one direction."""
    half = [3 * 64 * 256 * 2, 3 * 64 * 256 * 2, 2 * 64 * 256 * 4, 4 * 512 * 64 * 2, 4 * 512 * 2]
    sent = sum(half) / 2 + 2 * 44 * 7 / 8 + 32 * 256 * 2
    chip = hardware.CHIPS[r"TPU v5 ?(lite|e)"]
    assert compiled.link_seconds(found, chip) == pytest.approx(sent / 200e9)


def test_groups_over_a_part_of_an_axis():
    """XLA may split an axis: the groups are still those of the devices' numbers."""
    instruction = types.SimpleNamespace(
        opcode="all-reduce", attribute=lambda pattern: "mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1':(1)2}, more"
    )
    mesh = types.SimpleNamespace(
        size=8, devices=np.zeros((1, 2, 4)), axis_names=("data", "fsdp", "tensor"), shape={"fsdp": 2}
    )
    assert compiled._group(instruction, mesh) == (("fsdp", "tensor"), 4)
