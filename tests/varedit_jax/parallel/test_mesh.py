"""Meshes: what users write, what fits, which part of a batch a process reads."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from varedit_jax.config import MeshConfig
from varedit_jax.errors import UserError
from varedit_jax.parallel.mesh import batch_part, check_batch, make_mesh, mesh_sizes, parse_mesh, put_batch
from varedit_jax.parallel.topology import topology_devices


@dataclasses.dataclass(frozen=True)
class Device:
    """The attributes of a TPU that the layout of a mesh reads."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5e"
    core_on_chip: int = 0
    process_index: int = 0


def test_what_users_write():
    assert parse_mesh("fsdp=-1, tensor=4") == MeshConfig(data=1, fsdp=-1, tensor=4)
    assert parse_mesh("") == MeshConfig(data=1)
    for text, message in (
        ("fsdp", "'fsdp' is not AXIS=SIZE"),
        ("pipe=2", "'pipe=2' is not AXIS=SIZE with an axis of data, fsdp, tensor"),
        ("data=0", "sizes are at least 1"),
        ("data=-1,fsdp=-1", "one of them may be -1"),
    ):
        with pytest.raises(UserError, match=message):
            parse_mesh(text)


def test_sizes_fit_the_devices():
    assert mesh_sizes(MeshConfig(data=2, fsdp=-1, tensor=2), 16) == {"data": 2, "fsdp": 4, "tensor": 2}
    assert mesh_sizes(MeshConfig(), 1) == {"data": 1, "fsdp": 1, "tensor": 1}
    for config, devices in ((MeshConfig(data=1, fsdp=3), 8), (MeshConfig(fsdp=3), 8), (MeshConfig(data=2), 1)):
        with pytest.raises(UserError, match=f"does not fit {devices} devices"):
            mesh_sizes(config, devices)


def test_slices_lie_along_data():
    """Devices of a slice stay together; the slow network is crossed by `data` alone."""
    devices = [Device(id=i, slice_index=i // 4, coords=(i % 2, i // 2 % 2, 0)) for i in range(8)]
    grid = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices).devices
    assert [{device.slice_index for device in part.flat} for part in grid] == [{0}, {1}]
    with pytest.raises(UserError, match="mesh.data is 1, which does not divide over 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=8), devices)


def test_nodes_of_gpus_are_no_slices():
    """JAX gives the GPUs of each node a slice_index of their own; a mesh may lie over all of them, in their order."""
    devices = [Device(i, i // 4, (0, 0, 0), platform="gpu", device_kind="NVIDIA H100 80GB HBM3") for i in range(8)]
    grid = make_mesh(MeshConfig(data=1, fsdp=-1), devices).devices
    assert [device.id for device in grid.flat] == list(range(8))


@pytest.mark.parametrize(
    ("topology", "slices", "config"),
    [
        ("v5p:4x4x8", 1, MeshConfig(data=1, fsdp=-1)),
        ("v5p:4x4x8", 1, MeshConfig(data=1, fsdp=-1, tensor=2)),
        ("v6e:16x16", 1, MeshConfig(data=1, fsdp=-1)),
        ("v5e:16x16", 1, MeshConfig(data=1, fsdp=-1, tensor=4)),
        ("v5p:4x4x4", 2, MeshConfig(data=2, fsdp=-1)),
        ("v5e:16x16", 2, MeshConfig(data=2, fsdp=-1, tensor=4)),
    ],
)
@pytest.mark.tpu
def test_hosts_of_tpus_share_a_batch(topology, slices, config):
    """Every part is read, by those hosts alone whose chips hold it, wherever their blocks of the torus lie."""
    mesh = make_mesh(config, topology_devices(topology, slices))
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
    hosts = {device.process_index for device in rows.flat}
    parts = {host: batch_part(mesh, host) for host in hosts}
    count = next(iter(parts.values()))[1]
    assert set(parts.values()) == {(part, count) for part in range(count)}
    assert all(len({parts[device.process_index] for device in row}) == 1 for row in rows)


def test_hosts_that_share_some_of_their_examples():
    """Devices 0, 1, 3 are of one host and 2 of another: with tensor 2, both hold the second part, one the first."""
    devices = np.array([Device(i, 0, (i, 0, 0), process_index=int(i == 2)) for i in range(4)]).reshape(1, 2, 2)
    mesh = types.SimpleNamespace(shape={"data": 1, "fsdp": 2, "tensor": 2}, devices=devices)
    with pytest.raises(UserError, match=r"process 1 holds the parts \[1\] of 2 of a batch, and other processes some"):
        batch_part(mesh, 1)


def test_batches_divide_over_the_mesh():
    mesh = jax.sharding.AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
    check_batch(mesh, 8, 2)
    with pytest.raises(UserError, match="batch_size 12 with optimizer.accumulation 2 does not divide .* multiple of 8"):
        check_batch(mesh, 12, 2)


def test_one_process_reads_the_whole_batch():
    mesh = make_mesh(MeshConfig())
    assert batch_part(mesh) == (0, 1)
    placed = put_batch(mesh, {"x": np.arange(6).reshape(3, 2)})["x"]
    assert placed.sharding.mesh == mesh
    np.testing.assert_array_equal(placed, np.arange(6).reshape(3, 2))
