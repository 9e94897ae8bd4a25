"""The stages of an edit compiled ahead of time for a TPU topology: memory, operations and bytes beside the floor."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from varedit_jax import hardware
from varedit_jax.analysis import ahead, compiled, edit_floor, hlo, traffic
from varedit_jax.analysis.ahead import StepFigures
from varedit_jax.analysis.edit_floor import Floor
from varedit_jax.analysis.jobs import Job
from varedit_jax.errors import UserError
from varedit_jax.sampling.pipeline import Stage

KERNEL_SHARE = 0.5  # of peak that the kernels of attention are assumed to reach, for the estimated seconds
IN_THE_WAY = ("scores", "whole_stacks", "cache_copies")  # lists of what a stage should not have


def compile_stages(
    job: Job, titles: Sequence[str], memory_only: bool, keep: Callable[[str, str], object] | None = None
) -> Iterator[StepFigures]:
    """Compiles stages of an edit, each in its own right, and yields the figures of each; `keep` gets title and program.

    Operations and bytes are of all devices together. Figures of a stage that is too large have `fits` false. Raises
    UserError for a topology, mesh or attention kernel that do not go together.
    """
    for title in titles:
        one = job.at(title)
        stage = job.stages[title][0]
        text, requirements = ahead.compile_job(one, memory_only)
        row = {"stage": title, "guided": stage.guided} | ahead.with_beside(one, requirements)
        found = edit_floor.floor(stage, job.editor_params)
        row |= {"floor": _floor(found, job)}
        if text is not None:
            if keep:
                keep(title, text)
            row |= figures(job, stage, text)
        yield row


def figures(job: Job, stage: Stage, text: str) -> StepFigures:
    """What the text of a stage's compiled program tells."""
    module, devices = hlo.parse(text), job.mesh.size
    matmuls, kernels = hlo.matmul_flops(module), traffic.kernel_flops(module)
    row: StepFigures = {
        "tflop": (matmuls + kernels) * devices / 1e12,
        "gb": traffic.hbm_bytes(module) * devices / 1e9,
        "kernel_calls": traffic.kernel_calls(module),
    }
    chip = job.target.chip
    cycles = sum(times * instruction.cycles for _, instruction, times in traffic.scheduled(module))
    if cycles and chip.clock:
        peak = KERNEL_SHARE * chip.tflops * 1e12 / chip.devices
        row["estimated_s"] = cycles / chip.clock + kernels / peak
    found = compiled.collectives(module, job.mesh)
    if found:
        row["collectives"] = {"count": sum(x.times for x in found), "gb": sum(x.bytes for x in found) / 1e9}
        row["link_s_at_least"] = compiled.link_seconds(found, chip)
    shapes = shapes_of(job, stage)
    if shapes:
        row |= {
            "scores": traffic.scores(module, shapes),
            "whole_stacks": traffic.whole_stacks(module, shapes),
            "cache_copies": traffic.cache_copies(module, shapes),
        }
    return row


def shapes_of(job: Job, stage: Stage) -> traffic.Shapes | None:
    """What arrays of a stage of the transformer are recognized by; None for other stages."""
    if stage.name not in ("prefill", "scale"):
        return None
    assert stage.pyramid is not None
    model, pyramid = job.config.model.transformer, stage.pyramid
    source = pyramid.source_tokens(model.conditioning)
    queries = source if stage.name == "prefill" else pyramid.lengths[stage.scale]
    keys = source if stage.name == "prefill" else source + pyramid.offsets[stage.scale + 1]
    sizes = job.mesh.shape
    samples = stage.batch * (2 if stage.guided else 1)
    _, program, arguments = job.stages["begin"]
    cache = program.results(*arguments).prefilled.caches.block_0.k
    return traffic.Shapes(
        layers=model.depth - 1,
        heads=model.heads // sizes["tensor"],
        head_size=model.head_size,
        queries=queries,
        keys=keys,
        stacks=frozenset(
            leaf.sharding.shard_shape(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(job.editor_params["transformer"].get("blocks", {}))
            if "kernel" in jax.tree_util.keystr(path)
        ),
        samples=max(samples // (sizes["data"] * sizes["fsdp"]), 1),
        cache_tokens=cache.shape[3],
    )


def weight_bytes(job: Job) -> int:
    """Bytes of all weights on one device."""
    return sum(ahead.shard_bytes(leaf) for leaf in jax.tree.leaves(job.editor_params))


def total(rows: Sequence[StepFigures], job: Job) -> StepFigures:
    """Sums over the stages that were compiled, the largest memory, and the floor of the same stages."""
    floor = sum((edit_floor.floor(job.stages[row["stage"]][0], job.editor_params) for row in rows), edit_floor.NOTHING)
    needed = [row["memory"]["needed_gib"] for row in rows]
    result: StepFigures = {
        "stage": "all",
        "stages": len(rows),
        "of_stages": len(job.stages),
        "fits": all(row["fits"] for row in rows),
        "weights_gib": weight_bytes(job) / hardware.GIB,
        "needed_gib": None
        if None in needed
        else max(row["memory"]["needed_gib"] + row["memory"]["beside_gib"] for row in rows),
        "hbm_gib": rows[0]["memory"]["hbm_gib"],
        "floor": _floor(floor, job),
        "transformer": _transformer(rows, job),
    }
    for name in ("tflop", "gb", "kernel_calls", "estimated_s"):
        if all(name in row for row in rows):
            result[name] = sum(row[name] for row in rows)
    return result


def check(
    rows: Sequence[StepFigures],
    total: StepFigures,
    *,
    max_hbm_gib: float | None = None,
    max_operations: float | None = None,
    max_weight_reads: float | None = None,
    strict: bool = False,
) -> None:
    """Raises UserError for the first stage that does not fit, and the first bound that is passed; None: no bound.

    Args:
      rows, total: of `compile_stages` and `total`.
      max_hbm_gib: of the fullest stage.
      max_operations, max_weight_reads: of the transformer's stages, as shares of the floor's operations and of the
        bytes of its weights once for each stage.
      strict: True if nothing of `IN_THE_WAY` may be there, and prefill and scales must have kernels.
    """
    for row in rows:
        if not row["fits"]:
            memory = row["memory"]
            needed = "more than all" if memory["needed_gib"] is None else f"{memory['needed_gib']:.2f} GiB"
            raise UserError(
                f"{row['stage']} does not fit: it needs {needed} with {memory['beside_gib']:.2f} GiB beside it, of "
                f"{memory['hbm_gib']:.2f} GiB; give more chips, a smaller --batch, or a narrower --dtype"
            )
    if max_hbm_gib is not None and total["needed_gib"] > max_hbm_gib:
        raise UserError(
            f"the fullest stage needs {total['needed_gib']:.2f} GiB, more than --max_hbm_gib={max_hbm_gib:g}"
        )
    part = total["transformer"]
    for name, key, bound in (
        ("max_operations", "tflop_to_floor", max_operations),
        ("max_weight_reads", "gb_to_reads", max_weight_reads),
    ):
        if bound is not None and part.get(key, 0) > bound:
            raise UserError(f"the transformer's stages have {part[key]:.3f} of what --{name}={bound:g} is a bound of")
    for row in rows if strict else ():
        for name in IN_THE_WAY:
            if row.get(name):
                raise UserError(f"{row['stage']} has {name.replace('_', ' ')}, which --strict refuses: {row[name][0]}")
        if "scores" in row and not row["kernel_calls"]:
            raise UserError(
                f"{row['stage']} calls no kernel, which --strict refuses; its heads need a multiple of 128 channels"
            )


def _transformer(rows: Sequence[StepFigures], job: Job) -> StepFigures:
    """Of prefill and scales: operations and bytes, and those of reading the weights once for each of them."""
    chosen = [row for row in rows if row["stage"] == "prefill" or row["stage"].startswith("scale")]
    floors = [edit_floor.floor(job.stages[row["stage"]][0], job.editor_params) for row in chosen]
    whole = sum((floor for floor in floors), edit_floor.NOTHING)
    reads = len(chosen) * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(job.editor_params["transformer"]))
    result: StepFigures = {"stages": len(chosen), "floor": _floor(whole, job), "reads_of_all_weights_gb": reads / 1e9}
    for name in ("tflop", "gb"):
        if chosen and all(name in row for row in chosen):
            result[name] = sum(row[name] for row in chosen)
    if "gb" in result and reads:
        result |= {
            "tflop_to_floor": result["tflop"] * 1e12 / whole.operations,
            "gb_to_reads": result["gb"] * 1e9 / reads,
        }
    return result


def _floor(floor: Floor, job: Job) -> dict[str, Any]:
    return {
        "tflop": floor.operations / 1e12,
        "gb": floor.bytes / 1e9,
        "weights_gb": floor.weight_bytes / 1e9,
        "seconds": floor.seconds(job.target.chip, job.mesh.size),
    }
