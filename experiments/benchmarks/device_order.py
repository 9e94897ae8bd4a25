"""Do the bits of a training step depend on the order of the devices? On CPUs it runs; for TPUs programs are compared.

    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python -m experiments.benchmarks.device_order \
        --output=results/device_order.md
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments import program
from experiments.benchmarks import harness
from varedit_jax import command
from varedit_jax.config import ComputeType, DataConfig, LossConfig, MeshConfig, OptimizerConfig, RunConfig, preset
from varedit_jax.parallel.compiler_options import compiler_options
from varedit_jax.parallel.mesh import AXES, make_mesh
from varedit_jax.parallel.topology import topology_devices
from varedit_jax.parameters import INIT
from varedit_jax.scales import image_size
from varedit_jax.training import compile_step
from varedit_jax.training.setup import MeshRun
from varedit_jax.training.verify import digests

_TOPOLOGIES = flags.DEFINE_list("topologies", ["v6e:4x4", "v5p:4x4x4"], "of TPUs to compile sums for")
_OUTPUT = command.DEFINE_path("output", "", "Markdown file for the tables")
_MESHES: tuple[dict[str, int], ...] = (
    {"data": 1, "fsdp": 8},
    {"data": 2, "fsdp": 4},
    {"data": 1, "fsdp": 4, "tensor": 2},
)
_TYPES: tuple[ComputeType, ...] = ("float32", "bfloat16")
_WIDTH, _ROWS = 4096, 1024  # of the matmul whose gradients TPUs sum: square, and rows of each chip


def _orders(mesh: Mesh) -> Iterator[tuple[str, Mesh]]:
    """Yields other orders of the devices of a mesh, by name."""

    def ordered(devices: np.ndarray) -> Mesh:
        return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))

    grid = mesh.devices
    yield "shifted by one along fsdp", ordered(np.roll(grid, 1, axis=1))
    if hasattr(grid.flat[0], "coords"):
        at = {tuple(device.coords): device for device in grid.flat}
        sides = np.array(list(at)).max(axis=0) + 1
        moved = [at[tuple(((np.array(device.coords) + [1, 0, 0]) % sides).tolist())] for device in grid.flat]
        yield "shifted by one along a side of the torus", ordered(np.array(moved, object).reshape(grid.shape))
    yield "random", ordered(np.random.default_rng(0).permutation(grid.ravel()).reshape(grid.shape))


def _step(dtype: ComputeType, mesh: Mesh) -> np.ndarray:
    """Returns digests of state and metrics after a step of the smallest model with noise, [devices, arrays]."""
    model = preset("tiny")
    transformer = dataclasses.replace(model.transformer, dtype=dtype, depth=2)
    config = RunConfig(
        name="order",
        model=dataclasses.replace(model, transformer=transformer),
        loss=LossConfig(noise_max=0.3, text_drop=0.3),
        data=DataConfig(batch_size=16, text_tokens=5),
        optimizer=OptimizerConfig(learning_rate=1e-2, accumulation=2),
    )
    draw = np.random.default_rng(0)
    frozen = {part: INIT[part](config.model, jax.random.key(1)) for part in ("tokenizer", "text")}
    with jax.set_mesh(mesh):
        run = MeshRun(config, mesh)
        images = (16, *image_size(config.model, run.pyramid), 3)
        batch = {name: draw.integers(0, 256, images, np.uint8) for name in ("source", "target")}
        batch |= {"text_ids": draw.integers(2, 20, (16, 5), np.int32), "text_length": np.full(16, 5, np.int32)}
        everywhere = NamedSharding(mesh, PartitionSpec())
        abstract = compile_step.abstract_frozen(config, mesh)
        frozen = jax.device_put(frozen, jax.tree.map(lambda leaf: leaf.sharding, abstract))
        with run.stages(frozen) as stages:
            key = jax.device_put(jax.random.key(3), everywhere)
            new, metrics = stages.step(0)(run.init_state(), run.put(batch), key)
        return digests({"state": new, "metrics": metrics}).values


def _sums(mesh: Mesh) -> list[str]:
    """Returns the lines of a compiled matmul, its gradient and sums over the mesh, without lines of its source."""

    def losses(x: jax.Array, kernel: jax.Array) -> Any:
        def loss(kernel: jax.Array) -> jax.Array:
            return jnp.mean(jnp.square(x @ kernel).astype(jnp.float32))

        value, gradient = jax.value_and_grad(loss)(kernel)
        return value, gradient, jnp.sum(jnp.square(gradient.astype(jnp.float32)))

    rows, columns = (NamedSharding(mesh, spec) for spec in (PartitionSpec(AXES[:2]), PartitionSpec(None, "fsdp")))
    x = jax.ShapeDtypeStruct((mesh.size * _ROWS, _WIDTH), jnp.bfloat16, sharding=rows)
    kernel = jax.ShapeDtypeStruct((_WIDTH, _WIDTH), jnp.bfloat16, sharding=columns)
    everywhere = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        options = compiler_options(mesh.devices.flat[0])
        jitted = jax.jit(losses, out_shardings=(everywhere, columns, everywhere), compiler_options=options)
        text = str(jitted.lower(x, kernel).compile().as_text())
    return re.sub(r"(?m)^\d+ \{.*\}$|stack_frame_id=\d+", "", text).splitlines()


def _differing(lines: list[str], others: list[str]) -> str:
    kinds = (" all-gather(", " all-reduce(", " reduce-scatter(", " collective-permute-start(", " all-gather-start(")

    def counts(text: list[str]) -> str:
        found = {kind.strip(" ("): sum(kind in line for line in text) for kind in kinds}
        return ", ".join(f"{count} {kind}" for kind, count in found.items() if count)

    return "the same" if lines == others else f"{counts(lines)} -> {counts(others)}"


def main(argv: list[str]) -> None:
    """Compares, and writes the tables."""
    del argv
    ran, compiled = [], []
    for sizes in _MESHES:
        mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:8])
        name = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
        for dtype in _TYPES:
            first = _step(dtype, mesh)
            for order, other in _orders(mesh):
                differ = int((_step(dtype, other) != first).any(axis=0).sum())
                ran.append([name, dtype, order, f"{differ} of {first.shape[1]}"])
                print(*ran[-1], flush=True)
    for topology in _TOPOLOGIES.value:
        mesh = make_mesh(MeshConfig(data=1, fsdp=-1), topology_devices(topology))
        lines = _sums(mesh)
        for order, other in _orders(mesh):
            compiled.append([topology, f"fsdp {mesh.size}", order, _differing(lines, _sums(other))])
            print(*compiled[-1], flush=True)
    harness.publish(
        harness.report(
            "The order of the devices and the bits of a step",
            harness.command_line("experiments.benchmarks.device_order", _TOPOLOGIES, _OUTPUT),
            "Eight CPU devices of one process (JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8): every device's part of the "
            "new state, and the metrics, after a step of the smallest model with noise, in two microbatches.",
            harness.table(("mesh of CPU devices", "type", "order", "arrays that differ"), ran),
            "A matmul, its gradient and sums over all chips, compiled for TPUs that are not there: the program for "
            "the other order, or its collectives before and after.",
            harness.table(("topology", "mesh", "order", "program"), compiled),
        ),
        _OUTPUT.value,
    )


if __name__ == "__main__":
    program.run(main)
