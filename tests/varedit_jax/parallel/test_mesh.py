"""Meshes: what users write, what fits, which part of a batch a process reads."""

import dataclasses

import jax
import numpy as np
import pytest

from varedit_jax.config import MeshConfig
from varedit_jax.errors import UserError
from varedit_jax.parallel.mesh import batch_part, check_batch, make_mesh, mesh_sizes, parse_mesh, put_batch


@dataclasses.dataclass(frozen=True)
class Device:
    """What the layout of a mesh asks of a TPU."""

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
