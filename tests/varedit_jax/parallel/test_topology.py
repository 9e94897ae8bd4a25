"""Machines that are not there: their devices, and one sentence for those that cannot be."""

import pytest

from varedit_jax.errors import UserError
from varedit_jax.parallel import topology
from varedit_jax.parallel.topology import chips, topology_devices

pytestmark = pytest.mark.tpu


@pytest.mark.parametrize(
    ("name", "kind", "slices"),
    [("v5e:16x16", "TPU v5 lite", 1), ("v6e:16x16", "TPU v6 lite", 2), ("v5p:4x4x4", "TPU v5", 2), ("v5e:1x1", "", 1)],
)
def test_devices(name, kind, slices):
    """As many devices as chips, of the kind that `hardware` knows, each in its slice."""
    devices = topology_devices(name, slices)
    assert len(devices) == chips(name, slices)
    assert devices[0].platform == "tpu" and devices[0].device_kind.startswith(kind)
    if slices > 1:
        assert {device.slice_index for device in devices} == set(range(slices))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("v9:2x2", "v9:2x2' is unknown; give VERSION:SIDES with a version of v4, v5p"),
        ("v5p", "'v5p' is unknown"),
        ("v5p:4x4", "a slice of v5p has 3 sides of at most 16x16x24 chips"),
        ("v5e:16x32", "a slice of v5e has 2 sides of at most 16x16 chips"),
        ("v5e:0x4", "a slice of v5e has 2 sides"),
        ("v6e:3x5", "'v6e:3x5': Topology layout"),
    ],
)
def test_topologies_that_are_none(name, sentence):
    with pytest.raises(UserError, match=sentence):
        topology_devices(name)


def test_no_slices_and_no_libtpu(monkeypatch):
    with pytest.raises(UserError, match="0 slices; give at least 1"):
        topology_devices("v5e:2x2", 0)
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu, which is not installed: pip install 'varedit-jax\[tpu\]'"):
        topology_devices("v5e:2x2")


def test_rings():
    """Sides close into rings as the machines are wired: cubes of v5p, full sides of v5e."""
    assert topology._wraps("v5p", (4, 4, 8)) == (True, True, True)
    assert topology._wraps("v5p", (2, 4, 4)) == (False, False, False)
    assert topology._wraps("v5e", (8, 16)) == (False, True, False)
