"""The complete training step compiled ahead of time for a TPU topology: its memory, collectives and operations."""

import collections
import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from varedit_jax import hardware
from varedit_jax.analysis import compiled, hlo
from varedit_jax.analysis.operations import count_step, recomputed_share
from varedit_jax.config import RunConfig
from varedit_jax.errors import UserError
from varedit_jax.parallel.compiler_options import compiler_options, options_explained
from varedit_jax.parallel.mesh import make_mesh
from varedit_jax.parallel.topology import topology_devices
from varedit_jax.scales import editor_pyramid
from varedit_jax.training.compile_step import abstract_arguments, check_attention, sharded_step
from varedit_jax.training.flops import CONVENTION, run_flops
from varedit_jax.training.optimizer import make_optimizer

StepFigures = dict[str, Any]  # of a compiled step, ready for JSON


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A TPU topology that a step is compiled for."""

    topology: str  # as in "v5p:4x4x4"
    slices: int = 1
    hbm_gib: float = 0.0  # limit on a program's memory per chip; 0: that of the chip

    @functools.cached_property
    def devices(self) -> list[Any]:
        """Its JAX devices, on which nothing can run. Raises UserError as `topology_devices`."""
        return topology_devices(self.topology, self.slices)

    @property
    def chip(self) -> hardware.Chip:
        """The accelerator."""
        found = hardware.chip_of(self.devices[0])
        if found is None:
            raise UserError(f"topology {self.topology!r}: varedit_jax/hardware.py does not know its chip")
        return found

    @property
    def hbm_bytes(self) -> int:
        """HBM that a program gets on one device."""
        return int(self.hbm_gib * hardware.GIB) if self.hbm_gib else self.chip.device_hbm


def compile_step(config: RunConfig, target: Target) -> StepFigures:
    """Compiles the step of a run, images and token ids in, for `target`.

    Figures of a program that is too large for the memory have `fits` false. Raises UserError for a topology, mesh,
    batch or attention kernel that do not go together.
    """
    mesh = make_mesh(config.mesh, target.devices)
    with jax.set_mesh(mesh):
        check_attention(config)
    pyramid = editor_pyramid(config.model)
    optimizer = make_optimizer(config.optimizer, config.steps)
    arguments = abstract_arguments(config, pyramid, optimizer, mesh)
    began = time.perf_counter()
    row = _about(config, target, mesh) | _flops(config, mesh)
    with jax.set_mesh(mesh):
        lowered = sharded_step(config, pyramid, optimizer, mesh).lower(*arguments)
        traced = time.perf_counter()
        try:
            with options_explained():
                program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            memory = _too_large(str(error), target)
            if memory is None:
                raise
            program = None
    seconds = {"lower_seconds": round(traced - began, 1), "compile_seconds": round(time.perf_counter() - traced, 1)}
    if program is None:
        return {**row, "fits": False, "memory": memory, **seconds}
    memory = _memory(program, target)
    module = hlo.parse(program.as_text())
    found = compiled.collectives(module, mesh)
    width, tokens = config.model.transformer.width, run_flops(config, pyramid).tokens
    sizes = compiled.parameter_sizes((arguments[0].params, arguments[1]))
    return {
        **row,
        "fits": memory["needed_gib"] <= memory["hbm_gib"],
        "memory": memory,
        "collectives": compiled.summary(found, sizes, tokens * width // mesh.shape["tensor"]),
        "link_seconds_at_least": float(f"{compiled.link_seconds(found, target.chip):.4g}"),
        "compiled_tflop_per_device": _tera(hlo.matmul_flops(module)),
        "kernel_calls": sum(
            times
            for instruction, _, times in module.instructions()
            if instruction.opcode == "custom-call" and "tpu_custom_call" in instruction.text
        ),
        "loops_counted_once": module.loops_counted_once(),
        **seconds,
    }


def with_batch(config: RunConfig, mesh: Mesh, per_device: int) -> RunConfig:
    """The run with `per_device` examples on each device along data x fsdp in every microbatch."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch = per_device * shards * config.optimizer.accumulation
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch))


def find_batch(
    config: RunConfig, target: Target, log: Callable[[str], None], compiling: Callable[..., StepFigures] = compile_step
) -> StepFigures:
    """Figures of the largest batch that fits; `batch_per_device` is its examples per device and microbatch.

    Memory is about linear in the batch, so the next try extrapolates from the two largest that fit to full memory; then
    once from the largest that fits and the first that does not; after that the interval is halved. `log` gets a line
    for each. If not even one example fits, its figures, with `fits` false and `batch_per_device` 0.
    """
    mesh = make_mesh(config.mesh, target.devices)
    rows: dict[int, StepFigures] = {}

    def fits(count: int) -> bool:
        rows[count] = row = compiling(with_batch(config, mesh, count), target)
        memory = row["memory"]
        needed = "more than all" if memory["needed_gib"] is None else f"{memory['needed_gib']:.2f}"
        log(
            f"{count} per device: {'fits' if row['fits'] else 'does not fit'}, "
            f"{needed} of {memory['hbm_gib']:.2f} GiB, compiled in {row['compile_seconds']:.0f} s"
        )
        return row["fits"]

    good, bad = 0, 0  # largest that is known to fit, smallest that is known not to; 0: none yet
    count = 1
    while not bad or bad - good > 1:
        if fits(count):
            good = count
        else:
            bad = count
        count = _next(rows, good, bad)
    return rows[good or 1] | {"batch_per_device": good, "tried": sorted(rows)}


def _next(rows: dict[int, StepFigures], good: int, bad: int) -> int:
    """The batch to try: linear extrapolation from two that are known to full memory; then bisection."""
    known = sorted(count for count in rows if rows[count]["fits"])[-2:]
    first = next((count for count in rows if not rows[count]["fits"]), 0)  # that did not fit
    if good and bad == first == list(rows)[-1] and rows[bad]["memory"]["needed_gib"] is not None:
        known = [good, bad]
    elif bad or len(known) < 2:
        return (good + bad) // 2 if bad else 2 * good
    low, high = (rows[count]["memory"]["needed_gib"] for count in known)
    slope = (high - low) / (known[1] - known[0])
    room = rows[good]["memory"]["hbm_gib"] - rows[good]["memory"]["needed_gib"]
    guess = good + int(room / slope) if slope > 0 else 2 * good
    return min(max(guess, good + 1), bad - 1) if bad else max(guess, good + 1)


def _about(config: RunConfig, target: Target, mesh: Mesh) -> StepFigures:
    transformer = config.model.transformer
    remat = transformer.remat
    return {
        "name": config.name,
        "depth": transformer.depth,
        "topology": target.topology,
        "slices": target.slices,
        "chips": mesh.size // target.chip.devices,
        "chip": target.chip.name,
        "mesh": dict(mesh.shape),
        "global_batch": config.data.batch_size,
        "accumulation": config.optimizer.accumulation,
        "remat": remat if remat != "named" else f"named: {', '.join(transformer.remat_saved)}",
        "attention": transformer.attention,
        "compiler_options": compiler_options(target.devices[0], config.compiler_options),
    }


def _flops(config: RunConfig, mesh: Mesh) -> StepFigures:
    """Operations of a step over all devices, by formula and counted in the traced program."""
    flops = run_flops(config, editor_pyramid(config.model))
    batch = config.data.batch_size
    program = batch * count_step(config, config.model.transformer.remat)
    return {
        "convention": CONVENTION,
        "model_tflop": _tera(batch * flops.training),
        "model_tflop_with_encoders": _tera(batch * flops.training_with_encoders),
        "program_tflop": _tera(program),
        "program_tflop_per_device": _tera(program / mesh.size),
        "again_of_forward": round(recomputed_share(config), 4),
    }


def _tera(operations: float) -> float:
    """In 1e12, to six digits."""
    return float(f"{operations / 1e12:.6g}")


def _memory(program: Any, target: Target) -> StepFigures:
    """GiB of one device. Arguments, outputs that do not alias them, temporaries and code have to fit together."""
    sizes = program.memory_analysis()
    kept = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    needed = kept + sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes
    values = {
        "arguments": sizes.argument_size_in_bytes,
        "outputs": sizes.output_size_in_bytes,
        "donated": sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "code": sizes.generated_code_size_in_bytes,
        "peak": sizes.peak_memory_in_bytes,
        "needed": needed,
        "hbm": target.hbm_bytes,
    }
    return {f"{name}_gib": round(value / hardware.GIB, 3) for name, value in values.items()}


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}


def _too_large(message: str, target: Target) -> StepFigures | None:
    """The memory a program would need, read off the compiler's error; None for another error.

    libtpu states that of the whole program, or of its temporaries alone, or none (then `needed_gib` is None).
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    size = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"Used {size} of {size} hbm", message) or re.search(
        rf"\({size}\) exceeds available HBM \({size}\)", message
    )
    largest: collections.Counter[str] = collections.Counter()
    for number, unit, block in re.findall(rf"Size: {size}\n(.*?)={{5}}", message, re.DOTALL):
        operator = re.search(r'op_name="([^"]*)"', block)
        shape = re.search(r"Shape: (\S+)", block)
        name = f"{shape[1] if shape else ''} {operator[1] if operator else ''}"
        largest[name] = max(largest[name], math.ceil(float(number) * _UNITS[unit]))
    return {
        "needed_gib": round(float(found[1]) * _UNITS[found[2]] / hardware.GIB, 3) if found else None,
        "hbm_gib": round(target.hbm_bytes / hardware.GIB, 3),
        "says": message.splitlines()[0],
        "largest": [f"{number / hardware.GIB:.2f} GiB {name}" for name, number in largest.most_common(8)],
    }
