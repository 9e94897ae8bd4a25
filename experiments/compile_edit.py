"""Compiles the stages of an edit ahead of time, without the TPU, and prints what each needs beside the floor.

    python -m experiments.compile_edit --preset=8b --topology=v6e:1x1
    python -m experiments.compile_edit --preset=8b --pixels=1024 --topology=v6e:2x2 --mesh=tensor=4 --memory_only

The weights are abstract, in the types that they are kept in for editing: matrices of the blocks and the text encoder
in --dtype, all else float32. Each stage (source, text, prefill, begin, every scale, decode) is a program of its own and
is compiled by itself; --stages=prefill,last are two of them. This runs on any CPU with libtpu
(pip install 'varedit-jax[tpu]').

Per stage: memory of a device (the program's, and the weights that lie beside it), operations and bytes of all devices
together as the compiled program has them, and the floor of both by formula (varedit_jax/analysis/edit_floor.py). Then
what would be in the way of speed: arrays of queries x keys in float32, conversions or copies of the weights of all
layers at once, copies of caches. --memory_only ends each compilation before code is generated, which takes most of its
time; only the compiler's estimate of the seconds is missing then.

--max_hbm_gib, --max_operations, --max_weight_reads and --strict are bounds: beyond one, or where a stage does not fit,
the figures are printed all the same, then a sentence, and the exit code is 1.
"""

import dataclasses
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # or JAX looks for the TPU that libtpu compiles for

from typing import Any

import jax
from absl import flags

from experiments import program
from experiments.benchmarks import harness
from varedit_jax import command
from varedit_jax import config as config_lib
from varedit_jax.analysis import edit_ahead
from varedit_jax.analysis.ahead import StepFigures, in_seconds
from varedit_jax.analysis.jobs import Job, Target
from varedit_jax.config import DataConfig, RunConfig, SamplingConfig
from varedit_jax.errors import UserError
from varedit_jax.parallel.mesh import parse_mesh
from varedit_jax.parallel.processes import say
from varedit_jax.storage import files, paths

_PRESET = flags.DEFINE_enum("preset", "8b", config_lib.PRESETS, "size of the editor")
_CONFIG = flags.DEFINE_string("config", "", "experiment config whose model and sampling are taken, instead of --preset")
_PIXELS = flags.DEFINE_integer("pixels", None, f"side of the images: {', '.join(map(str, program.BUDGETS))}")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "chips: VERSION:SIDES, such as v5e:1x1, v6e:2x2 or v5p:1x1x1", required=True
)
_MESH = flags.DEFINE_string("mesh", "tensor=-1", "sizes of the mesh's axes")
_BATCH = flags.DEFINE_integer("batch", 1, "images that are edited together", lower_bound=1)
_TEXT_TOKENS = flags.DEFINE_integer("text_tokens", 32, "of an instruction; padded to a bucket", lower_bound=1)
_GUIDANCE = flags.DEFINE_float("guidance", None, "the config's by default; 1: off, without the unconditional half")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16", "int8"], "of matrices and the text encoder")
_DEPTH = flags.DEFINE_integer("depth", None, "blocks, instead of all: quicker, with memory and sums that are too small")
_STAGES = flags.DEFINE_list(
    "stages", ["all"], "stages, such as prefill, scale_3, last (the last scale), decode; or all"
)
_MEMORY_ONLY = flags.DEFINE_bool("memory_only", False, "end before code is generated: all but the estimated seconds")
_HBM_GIB = flags.DEFINE_float("hbm_gib", 0.0, "memory per chip, instead of the actual one", lower_bound=0.0)
_JSON = command.DEFINE_path("json", "", "JSONL file that the figures of each stage are appended to")
_PROGRAMS = command.DEFINE_path("programs", "", "directory for the text of each stage's program")
_MAX_HBM_GIB = flags.DEFINE_float("max_hbm_gib", None, "bound: memory of the fullest stage, with what lies beside it")
_MAX_OPERATIONS = flags.DEFINE_float(
    "max_operations", None, "bound: operations of the transformer, of those by formula"
)
_MAX_WEIGHT_READS = flags.DEFINE_float(
    "max_weight_reads", None, "bound: bytes of the transformer's stages, of those of reading its weights in each"
)
_STRICT = flags.DEFINE_bool("strict", False, "bound: no scores in float32, whole stacks or copies of caches; kernels")


def _job() -> Job:
    """Returns the edit of the flags. Raises UserError if they contradict each other."""
    if _CONFIG.value:
        if _PIXELS.value:
            raise UserError(f"--pixels={_PIXELS.value} is for --preset; --config={_CONFIG.value} has its own size")
        run = program.load_config(_CONFIG.value, RunConfig)
    else:
        run = RunConfig(name=_PRESET.value, model=program.preset_model(_PRESET.value, _PIXELS.value))
    quantized = _DTYPE.value == "int8"
    dtype: Any = "bfloat16" if quantized else _DTYPE.value  # that products are computed in
    transformer = dataclasses.replace(run.model.transformer, dtype=dtype)
    if _DEPTH.value:
        transformer = dataclasses.replace(transformer, depth=_DEPTH.value)
    sampling = run.sampling if _GUIDANCE.value is None else SamplingConfig(guidance=_GUIDANCE.value)
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, transformer=transformer),
        sampling=sampling,
        text_dtype=dtype,
        data=DataConfig(batch_size=_BATCH.value, text_tokens=_TEXT_TOKENS.value),
        mesh=parse_mesh(_MESH.value),
    )
    return Job("edit", run, Target(topology=_TOPOLOGY.value, hbm_gib=_HBM_GIB.value), _BATCH.value, quantized=quantized)


def _titles(job: Job) -> list[str]:
    """Returns the titles of the stages to compile. Raises UserError for one that there is not."""
    known = list(job.stages)
    last = max(index for index, title in enumerate(known) if title.startswith("scale"))
    names = {title.replace(" ", "_"): title for title in known} | {"last": known[last]}
    if _STAGES.value == ["all"]:
        return known
    for name in _STAGES.value:
        if name not in names:
            raise UserError(f"--stages={name} is unknown; give all, or some of {', '.join(names)}")
    return [names[name] for name in _STAGES.value]


HEAD = (
    "stage", "needed of HBM (arguments, temporaries, beside), GiB", "TFLOP (floor)", "GB (floor)", "kernel calls",
    "in the way", "floor, s", "estimated, s", "compiled, s",
)  # fmt: skip


def cells(row: StepFigures) -> list[str]:
    """Returns the cells of a stage."""
    memory, floor = row["memory"], row["floor"]
    if memory["needed_gib"] is None or "arguments_gib" not in memory:
        needed = f"{memory['needed_gib'] or 'more'} of {memory['hbm_gib']:.1f}, and {memory['beside_gib']:.1f} beside"
    else:
        parts = ", ".join(f"{memory[name]:.2f}" for name in ("arguments_gib", "temporaries_gib", "beside_gib"))
        needed = f"{memory['needed_gib'] + memory['beside_gib']:.2f} of {memory['hbm_gib']:.1f} ({parts})"
    found = [f"{len(row[name])} {name.replace('_', ' ')}" for name in edit_ahead.IN_THE_WAY if row.get(name)]
    return [
        row["stage"],
        needed if row["fits"] else f"{needed}: **does not fit**",
        f"{row['tflop']:.3f} ({floor['tflop']:.3f})" if "tflop" in row else f"({floor['tflop']:.3f})",
        f"{row['gb']:.2f} ({floor['gb']:.2f})" if "gb" in row else f"({floor['gb']:.2f})",
        str(row.get("kernel_calls", "")),
        ", ".join(found),
        f"{floor['seconds']:.4f}",
        f"{row['estimated_s']:.4f}" if "estimated_s" in row else "",
        in_seconds(row),
    ]


def _sums(total: StepFigures) -> list[str]:
    """Returns what is said of all stages together."""
    part, floor = total["transformer"], total["floor"]
    needed = "more than there is" if total["needed_gib"] is None else f"{total['needed_gib']:.2f} GiB"
    lines = [
        f"{total['stages']} of {total['of_stages']} stages; weights {total['weights_gib']:.2f} GiB a device, the "
        f"fullest stage {needed} of {total['hbm_gib']:.2f}; floor {floor['tflop']:.2f} TFLOP, {floor['gb']:.1f} GB, "
        f"{floor['seconds']:.3f} s"
    ]
    if "gb" in total:
        lines.append(
            f"compiled: {total['tflop']:.2f} TFLOP, {total['gb']:.1f} GB, {total['kernel_calls']} kernel calls"
        )
    if "gb_to_reads" in part:
        lines.append(
            f"transformer, {part['stages']} stages: {part['tflop']:.2f} TFLOP, {part['tflop_to_floor']:.3f} of the "
            f"formula's; {part['gb']:.1f} GB, {part['gb_to_reads']:.3f} of {part['stages']} reads of its weights "
            f"({part['reads_of_all_weights_gb']:.1f} GB)"
        )
    if "estimated_s" in total:
        lines.append(
            f"estimated by the compiler, kernels at {edit_ahead.KERNEL_SHARE:.0%} of peak: {total['estimated_s']:.3f} s"
        )
    return lines


def main(argv: list[str]) -> None:
    """Compiles and prints."""
    del argv
    jax.config.update("jax_enable_compilation_cache", False)  # compiled programs could not run here
    job = _job()
    rows: list[StepFigures] = []
    keep = None
    if _PROGRAMS.value:
        place = paths.resolve(_PROGRAMS.value)
        place.mkdir(parents=True, exist_ok=True)
        keep = lambda title, text: files.write_text(place / f"{title.replace(' ', '_')}.hlo", text)  # noqa: E731
    print(harness.table(HEAD, ()), flush=True)
    with harness.kept_figures(_JSON.value) as record:
        for row in edit_ahead.compile_stages(job, _titles(job), _MEMORY_ONLY.value, keep):
            rows.append(row)
            print(f"| {' | '.join(cells(row))} |", flush=True)
            for name in edit_ahead.IN_THE_WAY:
                for entry in row.get(name, ()):
                    say(f"{row['stage']}: {name}: {entry}")
            record(row)
        total = edit_ahead.total(rows, job)
        record(total)
    print()
    for line in _sums(total):
        print(line)
    edit_ahead.check(
        rows,
        total,
        max_hbm_gib=_MAX_HBM_GIB.value,
        max_operations=_MAX_OPERATIONS.value,
        max_weight_reads=_MAX_WEIGHT_READS.value,
        strict=_STRICT.value,
    )


if __name__ == "__main__":
    program.run(main)
