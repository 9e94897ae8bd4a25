"""Measures the training step and editing at a preset, on the available devices.

    python -m experiments.benchmarks.speed --preset=tiny --json=benchmark.json

On one H200 (141 GB), all of 2B, and 8B at full width with as many blocks as fit, whose MFU is that of these blocks:

    python -m experiments.benchmarks.speed --preset=2b --batch=8 --what=train,edit,attention,remat --json=2b.json
    python -m experiments.benchmarks.speed --preset=8b --depth=10 --batch=8 --what=train,attention,remat --json=8b.json

Weights and images are random. The step is complete: frozen encoders on images and token ids, forward and backward
pass, clipping, AdamW, a donated state. It is timed from dispatch until its results are ready, after two warm-up calls.
An edit is timed as a whole, and stage by stage (source, text, prefill, every scale, decode) beside the floor of its
operations and bytes; the weights have the types that they are kept in for editing.
A program that does not fit into memory becomes a row that says so.
"""

import dataclasses
import json
import resource
from typing import Any, get_args

import jax
from absl import flags

from experiments import program
from experiments.benchmarks import harness
from varedit_jax import command
from varedit_jax import config as config_lib
from varedit_jax.analysis.benchmark import Benchmark, Row, environment
from varedit_jax.config import ComputeType, DataConfig, RunConfig
from varedit_jax.errors import UserError
from varedit_jax.hardware import GIB
from varedit_jax.parallel.mesh import check_batch, make_mesh, parse_mesh
from varedit_jax.scales import editor_pyramid, image_size
from varedit_jax.storage import files, paths
from varedit_jax.training.flops import CONVENTION, run_flops

WHAT = ("train", "edit", "attention", "remat")

_PRESET = flags.DEFINE_enum("preset", "tiny", config_lib.PRESETS, "size of the editor")
_TEXT = flags.DEFINE_string("text", "", "Flan-T5 encoder: small, base, large, xl, xxl; the preset's own by default")
_PIXELS = flags.DEFINE_integer(
    "pixels", None, f"side of the images: {', '.join(map(str, program.BUDGETS))}; 512 by default"
)
_FIELDS = program.FieldFlags(
    RunConfig,
    {
        "depth": "model.transformer.depth",
        "text_tokens": "data.text_tokens",
        "batch": "data.batch_size",
        "accumulation": "optimizer.accumulation",
        "features": "data.features",
        "moments": "optimizer.moment_dtype",
        "precision": "tokenizer_precision",
        "remat": "model.transformer.remat",
        "saved": "model.transformer.remat_saved",
        "attention": "model.transformer.attention",
    },
)
_TEXT_FEATURES = flags.DEFINE_bool(
    "text_features", False, "texts are features, too: no frozen encoder runs; with --features=precomputed"
)
_DTYPE: flags.FlagHolder[Any] = flags.DEFINE_enum(
    "dtype",
    None,
    list(get_args(ComputeType)),
    "of matmuls in blocks and text encoder; default: float32 on a CPU, else bfloat16",
)
_WHAT = flags.DEFINE_list("what", ["train", "edit"], f"what to measure, of {', '.join(WHAT)}")
_MESH = flags.DEFINE_string("mesh", "data=-1", "sizes of the mesh's axes, as in fsdp=-1,tensor=4")
_REPEATS = flags.DEFINE_integer("repeats", 10, "timed calls of each program", lower_bound=1)
_JSON = command.DEFINE_path("json", "", "file for the figures")


def _run() -> RunConfig:
    """Returns a run of the preset with the changes of the flags. Raises UserError if they contradict each other."""
    model = program.preset_model(_PRESET.value, _PIXELS.value)
    try:
        text = config_lib.text_preset(_TEXT.value) if _TEXT.value else model.text
    except ValueError as error:
        raise UserError(str(error)) from error
    dtype: Any = _DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    transformer = dataclasses.replace(model.transformer, text_width=text.width, dtype=dtype, remat="named")
    model = dataclasses.replace(model, text=text, transformer=transformer)
    data = DataConfig(batch_size=1, text_tokens=transformer.unconditional_rows)
    return _FIELDS.override(RunConfig(name="benchmark", model=model, data=data, text_dtype=dtype))


def _about(run: RunConfig) -> Row:
    """Returns a description of the measured model."""
    pyramid, full = editor_pyramid(run.model), config_lib.preset(_PRESET.value).transformer.depth
    flops, depth = run_flops(run, pyramid), run.model.transformer.depth
    height, width = image_size(run.model, pyramid)
    return {
        "preset": _PRESET.value,
        "depth": depth,
        "full_depth": full,
        "pixels": [height, width],
        "tokens": flops.tokens,
        "text_tokens": run.data.text_tokens,
        "dtype": run.model.transformer.dtype,
        "features": run.data.features,
        "text_features": _TEXT_FEATURES.value,
        "accumulation": run.optimizer.accumulation,
        "tflop_per_example": flops.training / 1e12,
        "tflop_per_example_with_encoders": flops.training_with_encoders / 1e12,
        "convention": CONVENTION,
    }


def _say(about: Row, device: Row) -> None:
    reduced = "" if about["depth"] == about["full_depth"] else f" of {about['full_depth']} (REDUCED DEPTH)"
    print(
        f"{about['preset']}: depth {about['depth']}{reduced}, {about['pixels'][0]} x {about['pixels'][1]} px, "
        f"{about['tokens']} tokens, {about['text_tokens']} text tokens, {about['dtype']}, "
        f"{about['tflop_per_example']:.4g} TFLOP per example, "
        f"{about['tflop_per_example_with_encoders']:.4g} with encoders"
    )
    peak = device["peak_tflops_per_chip"]
    print(f"{device['devices']} x {device['device']}, jax {device['jax']}; peak {peak or 'unknown, so no MFU'}")
    print(f"convention: {CONVENTION}\n")
    print(
        "| what | batch | attention | remat | median s (min, quartiles) | examples/s | TFLOP/s per chip | MFU | GiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)


def _line(row: Row) -> str:
    """Returns a row as Markdown."""
    cells = [row["what"], row["batch"], row.get("attention", ""), row.get("remat", "")]
    if "again_of_forward" in row:
        cells[-1] += f", {row['again_of_forward']:.0%} of forward recomputed"
    if "note" in row:
        return f"| {' | '.join(map(str, cells))} | {row['note']} | | | | |"
    low, high = row["quartiles_s"]
    cells.append(f"{row['median_s']:.4g} ({row['min_s']:.4g}, {low:.4g} to {high:.4g})")
    if "processor_s" in row:
        cells[-1] += f", of processors {row['processor_s']:.4g}"
    cells.append(f"{row['examples_per_s']:.4g}")
    cells.append(f"{row['tflops_per_chip']:.4g}" if "tflops_per_chip" in row else "")
    cells.append(f"{row['mfu']:.1%}, with encoders {row['mfu_with_encoders']:.1%}" if "mfu" in row else "")
    memory = [f"{row['planned_gib']:.3g} planned"] if "planned_gib" in row else []
    if row.get("peak_gib") is not None:
        memory.append(f"{row['peak_gib']:.3g} peak")
    elif "peak_at_most_gib" in row:
        memory.append(f"peak at most {row['peak_at_most_gib']:.3g}")
    return f"| {' | '.join(map(str, cells))} | {', '.join(memory)} |"


def _stages(row: Row) -> str:
    """Returns the stages of an edit as a table in Markdown."""
    head = ("stage", "first call, s", "median ms (min, quartiles)", "TFLOP", "GB", "floor, ms", "of the floor", "GiB")
    lines = []
    for stage in row["stages"]:
        low, high = (1e3 * seconds for seconds in stage["quartiles_s"])
        floor = stage.get("floor_s")
        lines.append(
            [
                stage["stage"],
                f"{stage['first_s']:.3g}",
                f"{1e3 * stage['median_s']:.4g} ({1e3 * stage['min_s']:.4g}, {low:.4g} to {high:.4g})",
                f"{stage['floor_tflop']:.3g}",
                f"{stage['floor_gb']:.3g}",
                f"{1e3 * floor:.3g}" if floor is not None else "",
                f"{stage['median_s'] / floor:.2f}" if floor else "",
                f"{stage['planned_gib']:.3g}" if "planned_gib" in stage else "",
            ]
        )
    return (
        f"\nstages of an edit of {row['batch']}, waiting for each; weights {row['weights_gib']:.3g} GiB; TFLOP and GB "
        f"are what it takes at least, by formula\n\n{harness.table(head, lines)}\n"
    )


def main(argv: list[str]) -> None:
    """Measures, prints a table and writes the figures."""
    unknown = sorted(set(_WHAT.value) - set(WHAT))
    if unknown:
        raise UserError(f"--what={unknown[0]} is unknown; give some of {', '.join(WHAT)}")
    jax.config.update("jax_enable_compilation_cache", False)  # first calls are to be those of a new machine
    run = _run()
    mesh = make_mesh(parse_mesh(_MESH.value))
    check_batch(mesh, run.data.batch_size, run.optimizer.accumulation)
    if _TEXT_FEATURES.value and run.data.features != "precomputed":
        raise UserError(f"--text_features needs --features=precomputed, not {run.data.features}")
    bench = Benchmark(run=run, mesh=mesh, repeats=_REPEATS.value, text_features=_TEXT_FEATURES.value)
    about, device = _about(run), environment(mesh)
    _say(about, device)
    rows: list[Row] = []

    def measured(row: Row) -> None:
        rows.append(row)
        print(_line(row), flush=True)
        if _JSON.value:  # after every row, so that an interrupted run keeps its rows
            figures: dict[str, Any] = {"about": about, "device": device, "rows": rows}
            files.write_text(paths.resolve(_JSON.value), json.dumps(figures, indent=2) + "\n")

    if "train" in _WHAT.value:
        measured(bench.train())
    if "edit" in _WHAT.value:
        for batch in sorted({1, run.data.batch_size}):
            measured(bench.edit(batch))
            if "stages" in rows[-1]:
                print(_stages(rows[-1]), flush=True)
    for job in ("attention", "remat"):
        if job in _WHAT.value:
            for row in getattr(bench, job)():
                measured(row)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"\nmost memory of this process on its host: {resident / GIB:.3g} GiB")


if __name__ == "__main__":
    program.run(main)
