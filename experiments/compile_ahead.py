"""Compiles the complete training step for TPUs that are not there, and prints its needs as one JSON line.

    python -m experiments.compile_ahead --config=experiments/configs/varedit_8b_512.py --topology=v5p:4x4x4 \\
        --global_batch=256 --mesh=fsdp=-1

Images and token ids in; frozen encoders, forward and backward pass and the optimizer inside. It runs on any CPU, with
libtpu installed (pip install 'varedit-jax[tpu]'); 8B takes some minutes. --find_batch looks for the largest batch of a
chip that fits, with a line on standard error for each that it tries. Of the figures, memory, collectives and
`compiled_tflop_per_device` are of one device and one step, other TFLOP of all of them. `needed_gib` against `hbm_gib`
decides `fits`; a program too large for the memory is a line like any other.
"""

import dataclasses
import json
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # or JAX looks for the TPU that libtpu compiles for

import jax
from absl import flags

from experiments import program
from varedit_jax.analysis.ahead import Target, compile_step, find_batch
from varedit_jax.config import RunConfig
from varedit_jax.parallel.mesh import parse_mesh
from varedit_jax.parallel.processes import say

_CONFIG = program.ConfigFlag(RunConfig)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "machine: VERSION:SIDES, as in v5p:4x4x4, v5e:16x16, v6e:16x16", required=True
)
_SLICES = flags.DEFINE_integer("slices", 1, "number of machines, joined by DCN along the axis data")
_FIELDS = program.FieldFlags(RunConfig, {"global_batch": "data.batch_size", "accumulation": "optimizer.accumulation"})
_MESH = flags.DEFINE_string("mesh", "", "sizes of the mesh's axes, as in fsdp=-1,tensor=4; the config's by default")
_FIND_BATCH = flags.DEFINE_bool("find_batch", False, "find the largest batch of a chip that fits")
_HBM_GIB = flags.DEFINE_float("hbm_gib", 0.0, "memory per chip, instead of its own", lower_bound=0.0)


def main(argv: list[str]) -> None:
    """Compiles and prints."""
    jax.config.update("jax_enable_compilation_cache", False)  # compiled programs could not run here
    config = _FIELDS.override(_CONFIG.value)
    if _FIND_BATCH.value:
        data = dataclasses.replace(config.data, batch_size=config.optimizer.accumulation)
        config = dataclasses.replace(config, data=data)
    if _MESH.value:
        config = dataclasses.replace(config, mesh=parse_mesh(_MESH.value))
    target = Target(topology=_TOPOLOGY.value, slices=_SLICES.value, hbm_gib=_HBM_GIB.value)
    row = find_batch(config, target, say) if _FIND_BATCH.value else compile_step(config, target)
    print(json.dumps(row))


if __name__ == "__main__":
    program.run(main)
