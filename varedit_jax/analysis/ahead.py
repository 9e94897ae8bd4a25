"""The complete training step compiled ahead of time for a TPU topology: its memory, collectives and operations."""

import collections
import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from varedit_jax import hardware
from varedit_jax.analysis import compiled, hlo, passes, predict, predict_gpu, traffic
from varedit_jax.analysis.jobs import Job, Target
from varedit_jax.analysis.operations import count_step, recomputed_share
from varedit_jax.config import RunConfig
from varedit_jax.parallel.compiler_options import compiler_options, options_explained
from varedit_jax.parallel.mesh import make_mesh
from varedit_jax.scales import editor_pyramid
from varedit_jax.training.compile_step import abstract_state
from varedit_jax.training.flops import CONVENTION, run_flops
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.transformer.visibility import Visibility, visibility_mask

StepFigures = dict[str, Any]  # of a compiled step, ready for JSON


def compile_step(
    config: RunConfig, target: Target, keep: Callable[[str], object] | None = None, memory_only: bool = False
) -> StepFigures:
    """Compiles the step of a run, images and token ids in, for `target`; `keep` gets the program's text.

    With `memory_only` no code is generated: the figures have `compiled` "memory", and of the step's time nothing but
    the prediction for a GPU that the chips stand in for. Figures of a program that is too large for the memory have
    `fits` false. Raises UserError for a topology, mesh, batch or attention kernel that do not go together.
    """
    target.gpu  # noqa: B018  a mistake in it is said before minutes of compiling
    job = Job("step", config, target)
    row = _about(job) | _flops(config, job.mesh)
    text, requirements = compile_job(job, memory_only)
    if text is None:
        return row | requirements
    if keep:
        keep(text)
    mesh, module, arguments = job.mesh, hlo.parse(text), job.function_and_arguments[1]
    found = compiled.collectives(module, mesh)
    width, tokens = config.model.transformer.width, run_flops(config, editor_pyramid(config.model)).tokens
    sizes = compiled.parameter_sizes((arguments[0].params, arguments[1]))
    row |= requirements | {
        "collectives": compiled.summary(found, sizes, tokens * width // mesh.shape["tensor"]),
        "link_seconds_at_least": float(f"{compiled.link_seconds(found, target.chip):.4g}"),
        "compiled_tflop_per_device": _tera(hlo.matmul_flops(module)),
        "kernel_calls": traffic.kernel_calls(module),
        "loops_counted_once": module.loops_counted_once(),
    }
    if memory_only and not target.gpu:
        return row
    return row | {"predicted": _predicted(config, target, mesh, module)}


def compile_evaluation(config: RunConfig, target: Target, memory_only: bool = False) -> StepFigures:
    """Compiles the evaluation of a held-out batch, in the microbatches of the step; figures and errors as above."""
    job = Job("evaluation", config, target)
    return _about(job) | with_beside(job, compile_job(job, memory_only)[1])


def compile_sampling(config: RunConfig, target: Target, images: int, memory_only: bool = False) -> StepFigures:
    """Compiles the stages of a sheet of so many images that may need the most memory; the figures are of that one.

    One image on each device of data x fsdp at least. The texts have `data.text_tokens`. Errors as above.
    """
    job = Job("sampling", config, target, images)
    rows: list[StepFigures] = []
    for title in job.largest_stages:
        one = job.at(title)
        rows.append({"stage": title, **with_beside(one, compile_job(one, memory_only)[1])})
    needed = {row["stage"]: row["memory"]["needed_gib"] for row in rows}
    largest = max(rows, key=lambda row: (not row["fits"], _all_gib(row)))
    batch = next(iter(job.stages.values()))[0].batch
    return _about(job) | {"images": batch, "stages_gib": needed} | largest


def _all_gib(row: StepFigures) -> float:
    """Memory of a program and of what lies beside it; of one that the compiler refuses without a number, any."""
    memory = row["memory"]
    return float("inf") if memory["needed_gib"] is None else memory["needed_gib"] + memory["beside_gib"]


def with_beside(job: Job, requirements: StepFigures) -> StepFigures:
    """Returns requirements with what lies on a device beside the program: moments, EMA, weights it does not take."""
    trees: list[Any] = []
    if job.what != "edit":
        state = abstract_state(job.config, make_optimizer(job.config.optimizer, job.config.steps), job.mesh)
        trees += [state.opt_state, state.ema]
    if job.stage:
        taken = {"source": "tokenizer", "decode": "tokenizer", "text": "text"}.get(job.stage, "transformer")
        trees += [params for part, params in job.editor_params.items() if part != taken]
    held = sum(shard_bytes(leaf) for leaf in jax.tree.leaves(trees)) / hardware.GIB
    memory = requirements["memory"]
    fits = requirements["fits"] and memory["needed_gib"] + held <= memory["hbm_gib"]
    return requirements | {"fits": fits, "memory": memory | {"beside_gib": round(held, 3)}}


def shard_bytes(leaf: Any) -> int:
    """Bytes of an abstract array on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def compile_job(job: Job, memory_only: bool) -> tuple[str | None, StepFigures]:
    """Returns the text of a job's program, None if it is too large, and its memory and the time it took."""
    job.function_and_arguments  # noqa: B018  mistakes are said before
    began = time.perf_counter()
    text: str | None = None
    spent: dict[str, float] = {}
    try:
        with options_explained():
            if memory_only:
                assigned = passes.run(job.to_dict())
                text, memory = assigned.text, _assigned_memory(assigned, job.target)
            else:
                lowered = job.lower()
                spent["lower_seconds"], began = time.perf_counter() - began, time.perf_counter()
                program = lowered.compile()
                text, memory = program.as_text(), _memory(program, job.target)
    except jax.errors.JaxRuntimeError as error:
        refused = _too_large(str(error), job.target)
        if refused is None:
            raise
        memory = refused
    spent["memory_seconds" if memory_only else "compile_seconds"] = time.perf_counter() - began
    return text, {
        "compiled": "memory" if memory_only else "all",
        "fits": text is not None and memory["needed_gib"] <= memory["hbm_gib"],
        "memory": memory,
        **{name: round(seconds, 1) for name, seconds in spent.items()},
    }


def read_step(config: RunConfig, target: Target, text: str) -> StepFigures:
    """Figures of a program that `compile_step` kept the text of, compiled for the same config and target."""
    mesh = make_mesh(config.mesh, target.devices)
    row = _about(Job("step", config, target))
    return row | {"predicted": _predicted(config, target, mesh, hlo.parse(text))}


def _predicted(config: RunConfig, target: Target, mesh: Mesh, module: hlo.Module) -> StepFigures:
    pyramid, batch = editor_pyramid(config.model), config.data.batch_size
    flops, conditioning = run_flops(config, pyramid), config.model.transformer.conditioning
    masks = [visibility_mask(Visibility(pyramid, conditioning, scale_aligned=aligned)) for aligned in (True, False)]
    tflops = batch * flops.training_with_encoders / 1e12, batch * flops.training / 1e12
    if target.gpu:
        return predict_gpu.predict(module, target.chip, mesh, *tflops, masks, gpu=target.gpu)
    return predict.predict(module, target.chip, mesh, *tflops, masks)


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
            f"{needed} of {memory['hbm_gib']:.2f} GiB, {in_seconds(row)}"
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


def in_seconds(row: StepFigures) -> str:
    """How long a compilation took, in words that say whether it was one of the whole program."""
    if row["compiled"] == "memory":
        return f"memory alone in {row['memory_seconds']:.0f} s"
    return f"compiled in {row['compile_seconds']:.0f} s"


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


def _about(job: Job) -> StepFigures:
    config, target, mesh = job.config, job.target, job.mesh
    transformer = config.model.transformer
    remat = transformer.remat
    return {
        "what": job.what,
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
        # An edit is compiled with the compiler's defaults.
        "compiler_options": {}
        if job.what == "sampling"
        else compiler_options(target.devices[0], config.compiler_options),
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
    return _gib(
        arguments=sizes.argument_size_in_bytes,
        outputs=sizes.output_size_in_bytes,
        donated=sizes.alias_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
        peak=sizes.peak_memory_in_bytes,
        needed=needed,
        hbm=target.hbm_bytes,
    )


def _assigned_memory(assigned: passes.Assigned, target: Target) -> StepFigures:
    """GiB of one device of a program without its code."""
    kept = assigned.arguments + assigned.outputs - assigned.donated
    return _gib(
        arguments=assigned.arguments,
        outputs=assigned.outputs,
        donated=assigned.donated,
        temporaries=assigned.total - kept,
        needed=assigned.total,
        hbm=target.hbm_bytes,
    )


def _gib(**values: int) -> StepFigures:
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
