"""Collectives of a compiled program: kinds, purposes, who takes part, and what they move."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from varedit_jax import hardware
from varedit_jax.analysis import compiled, hlo
from varedit_jax.parallel.topology import topology_devices

pytestmark = pytest.mark.tpu

# As the compiler writes for a TPU: a gather in a loop, a gather made of a sum with zeros, a sum that is cut at once, a
# sum over everything, tokens gathered between chips with the same examples (in two parts, behind other work), an
# activation gathered, one sent on.
TEXT = (pathlib.Path(__file__).parents[2] / "data" / "hlo" / "collectives.txt").read_text()


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


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1':(1)2}, more", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (
            "mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}, dimensions={0}",
            [[0, 1], [2, 3], [4, 5], [6, 7]],
        ),
        ("mesh['axis_0'=4], device_ids=(0,2,1,3) {'axis_0':(1)2}", [[0, 1], [2, 3]]),
        ("[2,4]<=[4,2]T(1,0), dimensions={0}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("[1,8]<=[8]", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("{{0,1},{2,3}}, use_global_device_ids=true", [[0, 1], [2, 3]]),
        ("{}, to_apply=%add", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_ways_of_writing_groups(text, groups):
    """Axes in part, devices in another order, counted numbers, lists, and nothing for all of them."""
    found = compiled._replica_groups(text, 8)
    assert sorted(sorted(group) for group in found.tolist()) == groups


def test_groups_of_another_form_are_not_guessed():
    with pytest.raises(ValueError, match="unknown form: all"):
        compiled._replica_groups("all", 8)
