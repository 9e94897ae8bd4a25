"""Compiles a run's programs ahead of time, without the TPUs, and prints the requirements of each as a JSON line.

    python -m experiments.compile_ahead --config=experiments/configs/varedit_8b_512.py --topology=v5p:4x4x4 \\
        --global_batch=256 --mesh=fsdp=-1

The step takes images and token ids, and has the frozen encoders, forward and backward pass and the optimizer.
--what=evaluation and --what=sampling compile what else a run needs: the loss of a held-out batch, in the step's
microbatches, and the sampling of a sheet, one image on each device of data x fsdp at least. This runs on any CPU with
libtpu (pip install 'varedit-jax[tpu]'); 8B takes 23 to 42 minutes of two cores. --find_batch finds the largest batch
per chip that fits, and prints each attempt to standard error. Memory, collectives and `compiled_tflop_per_device` are
per device and step, other TFLOP of all devices. `fits` compares `needed_gib` with `hbm_gib`; a program that does not
fit gives a line, too.

`predicted` is the step's time by varedit_jax/analysis/predict.py, which standard error has in words; `collectives`
there are per chip, too. --program keeps the program's text, and --read_program predicts from such a file in seconds,
given the same flags otherwise. --max_moves and --max_exposed_gathers are bounds: a program beyond one still gives its
line, then a sentence and exit code 1. --memory_only ends a compilation before code is generated, which takes most of
its time: memory (without the code's) and collectives are there by then, `predicted` only for a GPU that the chips stand
in for (--stand_in_for).
"""

import dataclasses
import functools
import json
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # or JAX looks for the TPU that libtpu compiles for

import jax
from absl import flags

from experiments import program
from varedit_jax import command
from varedit_jax.analysis import predict
from varedit_jax.analysis.ahead import (
    StepFigures,
    compile_evaluation,
    compile_sampling,
    compile_step,
    find_batch,
    in_seconds,
    read_step,
)
from varedit_jax.analysis.jobs import Target
from varedit_jax.config import RunConfig
from varedit_jax.errors import UserError
from varedit_jax.parallel.mesh import parse_mesh
from varedit_jax.parallel.processes import say
from varedit_jax.storage import files, paths

_CONFIG = program.ConfigFlag(RunConfig)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "machine: VERSION:SIDES, such as v5p:4x4x4, v5e:16x16, v6e:16x16", required=True
)
_SLICES = flags.DEFINE_integer("slices", 1, "number of machines, joined by DCN along the data axis")
_FIELDS = program.FieldFlags(
    RunConfig,
    {
        "global_batch": "data.batch_size",
        "accumulation": "optimizer.accumulation",
        "text_tokens": "data.text_tokens",  # such as one of data.text_buckets
    },
)
_MESH = flags.DEFINE_string("mesh", "", "sizes of the mesh's axes, such as fsdp=-1,tensor=4; the config's by default")
_WHAT = flags.DEFINE_enum(
    "what", "step", ["step", "evaluation", "sampling", "all"], "what is compiled; all of them give a line each"
)
_IMAGES = flags.DEFINE_integer("images", 8, "of a sheet of samples", lower_bound=1)
_FIND_BATCH = flags.DEFINE_bool("find_batch", False, "find the largest batch per chip that fits")
_MEMORY_ONLY = flags.DEFINE_bool(
    "memory_only", False, "end before code is generated: memory and collectives without a TPU step's time, much sooner"
)
_PROGRAM = command.DEFINE_path("program", "", "file that the compiled program's text is written to")
_READ_PROGRAM = command.DEFINE_path("read_program", "", "file of --program to predict the step's time of, uncompiled")
_HBM_GIB = flags.DEFINE_float("hbm_gib", 0.0, "memory per chip, instead of the actual one", lower_bound=0.0)
_STAND_IN_FOR = flags.DEFINE_string(
    "stand_in_for", "", "GPU that the step's time is predicted for, by formula, such as 'NVIDIA H100 80GB HBM3'"
)
_MAX_MOVES = flags.DEFINE_float(
    "max_moves", None, "largest share of the predicted step that moves may take, such as 0.08", lower_bound=0.0
)
_MAX_EXPOSED_GATHERS = flags.DEFINE_float(
    "max_exposed_gathers", None, "largest share of gathered bytes that may not move under compute", lower_bound=0.0
)


def main(argv: list[str]) -> None:
    """Compiles and prints."""
    jax.config.update("jax_enable_compilation_cache", False)  # compiled programs could not run here
    data = dataclasses.replace(_CONFIG.value.data, text_buckets=())  # what is compiled has one length
    config = _FIELDS.override(dataclasses.replace(_CONFIG.value, data=data))
    if _FIND_BATCH.value:
        if _WHAT.value != "step":
            raise UserError(f"--find_batch is for the step, and --what is {_WHAT.value}; leave one of them out")
        data = dataclasses.replace(config.data, batch_size=config.optimizer.accumulation)
        config = dataclasses.replace(config, data=data)
    if _MEMORY_ONLY.value:
        _check_alone()
    if _MESH.value:
        config = dataclasses.replace(config, mesh=parse_mesh(_MESH.value))
    target = Target(
        topology=_TOPOLOGY.value, slices=_SLICES.value, hbm_gib=_HBM_GIB.value, stand_in_for=_STAND_IN_FOR.value
    )
    compilations = {
        "step": lambda: _step(config, target),
        "evaluation": lambda: compile_evaluation(config, target, _MEMORY_ONLY.value),
        "sampling": lambda: compile_sampling(config, target, _IMAGES.value, _MEMORY_ONLY.value),
    }
    rows = []
    for what, compiling in compilations.items():
        if _WHAT.value in (what, "all"):
            rows.append(compiling())
            for line in _lines(rows[-1]):
                say(line)
            print(json.dumps(rows[-1]), flush=True)
    for row in rows:
        if "predicted" in row:
            predict.check(row["predicted"], _MAX_MOVES.value, _MAX_EXPOSED_GATHERS.value)


def _check_alone() -> None:
    """Raises UserError if a flag needs what --memory_only leaves out."""
    others = (_PROGRAM, _READ_PROGRAM, _MAX_MOVES, _MAX_EXPOSED_GATHERS)
    for flag in others:
        if flag.value not in ("", None):
            raise UserError(f"--{flag.name} is about the step's time, which --memory_only leaves out; give one of them")


def _lines(row: StepFigures) -> list[str]:
    """What standard error says of a line."""
    lines = predict.lines(row["predicted"]) if "predicted" in row else []
    if row.get("compiled") == "memory":
        time = "" if lines else "its time needs the whole compilation, without --memory_only; "
        lines.append(
            f"{row['what']}: {in_seconds(row)}; {time}`needed_gib` lacks the code, and is what the compiler itself "
            "compares with the memory"
        )
    return lines


def _step(config: RunConfig, target: Target) -> StepFigures:
    """The line of the step, of one compilation, of several, or of a program that was kept."""
    if sum(map(bool, (_FIND_BATCH.value, _PROGRAM.value, _READ_PROGRAM.value))) > 1:
        raise UserError("--find_batch, --program and --read_program each exclude the others; give one of them")
    if _FIND_BATCH.value:
        return find_batch(config, target, say, functools.partial(compile_step, memory_only=_MEMORY_ONLY.value))
    if _READ_PROGRAM.value:
        return read_step(config, target, _read_program(_READ_PROGRAM.value))
    if _PROGRAM.value:
        place = paths.resolve(_PROGRAM.value)
        return compile_step(config, target, lambda text: files.write_text(place, text))
    return compile_step(config, target, memory_only=_MEMORY_ONLY.value)


def _read_program(text: str) -> str:
    """The program of a file. Raises UserError if it has none."""
    place = paths.resolve(text)
    if not place.is_file():
        raise UserError(f"--read_program={text} is no file; --program={text} writes it")
    program_text = place.read_text()
    if not program_text.startswith("HloModule") or "\nENTRY " not in program_text:
        raise UserError(f"--read_program={text} is no text of a compiled program; give a file that --program wrote")
    return program_text


if __name__ == "__main__":
    program.run(main)
