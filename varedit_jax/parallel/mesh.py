"""Meshes of devices, and the sharding of a batch.

Three axes: `data` (replicas of the parameters; slices joined by DCN are split along it), `fsdp` (parameters and
optimizer state are split over it) and `tensor` (heads, feed-forward width and tokens). A batch is split over data x
fsdp; devices that differ in `tensor` alone work on the same examples.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from varedit_jax.config import MeshConfig
from varedit_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # axes that the examples of a batch are split over


def parse_mesh(text: str) -> MeshConfig:
    """The mesh of a text such as "fsdp=-1,tensor=4"; axes that are left out have size 1.

    Raises UserError for another form, an unknown axis or a bad size.
    """
    sizes = dict.fromkeys(AXES, 1)
    for entry in filter(None, text.replace(" ", "").split(",")):
        axis, _, size = entry.partition("=")
        if axis not in sizes or not size.lstrip("-").isdecimal():
            raise UserError(f"mesh {text!r}: {entry!r} is not AXIS=SIZE with an axis of {', '.join(AXES)}")
        sizes[axis] = int(size)
    try:
        return MeshConfig(**sizes)
    except ValueError as error:
        raise UserError(str(error)) from error


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Size of each axis on `devices` devices. Raises UserError if the sizes do not multiply to `devices`."""
    sizes = dataclasses.asdict(config)
    known = int(np.prod([size for size in sizes.values() if size > 0]))
    if devices % known == 0:
        sizes = {axis: devices // known if size == -1 else size for axis, size in sizes.items()}
    if int(np.prod(list(sizes.values()))) != devices:
        asked = " x ".join(f"{axis} {size}" for axis, size in dataclasses.asdict(config).items())
        raise UserError(f"mesh {asked} does not fit {devices} devices; set --config.mesh.fsdp=-1, or sizes that do")
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (all by default), with neighbors in hardware next to each other.

    Raises UserError if the sizes do not fit the devices, or `data` does not divide over their slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    shape = tuple(sizes.values())
    # On GPUs slice_index is the node: fsdp may have to span nodes, so only TPU slices constrain the mesh.
    tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if tpu else 1
    if slices > 1:
        if sizes["data"] % slices:
            raise UserError(
                f"mesh.data is {sizes['data']}, which does not divide over {slices} slices; "
                f"give a multiple, as in --config.mesh.data={slices}"
            )
        within = (sizes["data"] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose leading axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def check_batch(mesh: Mesh, batch: int, accumulation: int = 1) -> None:
    """Raises UserError unless every microbatch divides over data x fsdp."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % (shards * accumulation):
        raise UserError(
            f"data.batch_size {batch} with optimizer.accumulation {accumulation} does not divide over data "
            f"{mesh.shape['data']} x fsdp {mesh.shape['fsdp']}; give a multiple of {shards * accumulation}"
        )


def whole_batch(mesh: Mesh, count: int) -> int:
    """Returns the smallest number of examples, at least `count`, that divides over data x fsdp."""
    shards = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-count // shards) * shards


def batch_part(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """(index, count): the part, of `count` equal parts of each batch, that a process (this one by default) reads.

    Processes that differ in `tensor` alone read the same part. The devices of a process form a block of a TPU torus and
    need not be consecutive in the mesh; `put_batch` then interleaves its part with those of others: the batch has the
    same examples in another order. Raises UserError if two processes share some of their examples, but not all.
    """
    process = jax.process_index() if process is None else process
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    held: dict[int, set[int]] = {}
    for row, devices in enumerate(mesh.devices.reshape(shards, -1)):
        for device in devices:
            held.setdefault(device.process_index, set()).add(row)
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    own = tuple(sorted(held[process]))
    if sum(map(len, parts)) != shards or any(len(rows) != len(own) for rows in parts):
        raise UserError(
            f"process {process} holds the parts {list(own)} of {shards} of a batch, and other processes some of them, "
            f"or another number; choose sizes of the mesh that divide the devices of a process, or are multiples of "
            f"them"
        )
    return parts.index(own), len(parts)


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's part of a batch (numpy [B / count, ...]) to global arrays [B, ...] on the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
