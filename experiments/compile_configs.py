"""Compiles every layout of the published configs ahead of time, one process each, and tabulates their requirements.

    python -m experiments.compile_configs --rows=results/compile_ahead.jsonl --table=/tmp/table.md --only=8b_512

A layout took 14 to 42 minutes, two at a time on two cores with other work: 2B about 15, 8B 23 to 42. Its line goes to
--rows at once; a layout with a line is not compiled again, so that an interrupted program resumes: remove lines to
recompile them. Layouts for GPUs cannot be compiled without one: they are compiled for as many v5p chips with the GPU's
memory, and marked as a stand-in; the prediction of their step is by formula (varedit_jax/analysis/predict_gpu.py).
Lines of before there were predictions have empty cells for them. --memory_only ends each compilation before code is
generated (compile_ahead), within one to seven minutes; a line from it says so, has no prediction except for a GPU, and
does not keep the layout from being compiled as a whole later.
"""

import contextlib
import json
import subprocess
import sys
from typing import Any

from absl import flags

from experiments import program
from experiments.benchmarks import harness
from experiments.configs.published import LAYOUTS, MACHINES
from varedit_jax import command, hardware
from varedit_jax.errors import UserError
from varedit_jax.parallel.processes import say
from varedit_jax.progress import Progress
from varedit_jax.storage import files, jsonl, paths

_ROWS = command.DEFINE_path("rows", "results/compile_ahead.jsonl", "JSONL file of the lines")
_TABLE = command.DEFINE_path("table", "", "Markdown file for the table; standard output by default")
_ONLY = flags.DEFINE_list("only", [], "parts of CONFIG:MACHINE, any of which must match; everything by default")
_MEMORY_ONLY = flags.DEFINE_bool("memory_only", False, "memory and collectives alone, without a TPU step's time")

STAND_IN = "v5p:4x4x4"  # 64 devices, as h100_64
GPU = "NVIDIA H100 80GB HBM3"
GPU_SHARE = 0.92  # of a GPU's memory for the program: XLA_PYTHON_CLIENT_MEM_FRACTION of experiments/launch/slurm.sbatch

HEAD = (
    "config:machine", "mesh", "batch (microbatches x per device)", "needed of HBM, GiB", "arguments + temporaries",
    "recomputed", "parameters gathered, GiB (count)", "gradients scattered + reduced", "over `tensor`",
    "activations gathered", "links, s at least", "predicted step, s", "MFU with encoders",
    "moves", "exposed collectives, s", "compiled, s (or up to memory alone)",
)  # fmt: skip


def compile_layout(config: str, machine: str, memory_only: bool) -> dict[str, Any]:
    """Returns the row of one layout. Raises UserError with the output of compile_ahead if that fails."""
    command = [sys.executable, "-m", "experiments.compile_ahead"]
    command += [f"--config=experiments/configs/{config}.py:{machine}"]
    topology = MACHINES[machine].topology
    command += [f"--topology={topology or STAND_IN}"]
    if not topology:
        gpu = hardware.chip(GPU)
        assert gpu is not None
        command += [f"--hbm_gib={GPU_SHARE * gpu.hbm_bytes / hardware.GIB:.2f}", f"--stand_in_for={GPU}"]
    if memory_only:
        command += ["--memory_only"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command[1:])} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return {"layout": f"{config}:{machine}", **json.loads(done.stdout.splitlines()[-1])}


def table_row(row: dict[str, Any]) -> list[str]:
    """Returns the cells of a line of the table."""
    mesh = {axis: size for axis, size in row["mesh"].items() if size > 1}
    shards = row["mesh"]["data"] * row["mesh"]["fsdp"]
    per_device = row["global_batch"] // (shards * row["accumulation"])
    stand_in = "" if MACHINES[row["layout"].split(":")[1]].topology else f" (as {row['topology']})"
    memory = row["memory"]
    needed = "more" if memory["needed_gib"] is None else f"{memory['needed_gib']:.1f}"
    again = f"{100 * row['again_of_forward']:.1f} %"
    cells = [
        row["layout"] + stand_in,
        ", ".join(f"{axis} {size}" for axis, size in mesh.items()),
        f"{row['global_batch']} ({row['accumulation']} x {per_device})",
        f"{needed} of {memory['hbm_gib']:.1f}" + ("" if row["fits"] else ": **does not fit**"),
    ]
    if "collectives" in row:
        purposes = row["collectives"]["by_purpose"]

        def gib(*names: str) -> str:
            found = [purposes[name] for name in names if name in purposes]
            return f"{sum(x['gib'] for x in found):.1f} ({sum(x['count'] for x in found)})" if found else "0"

        cells += [
            f"{memory['arguments_gib']:.1f} + {memory['temporaries_gib']:.1f}",
            again,
            gib("parameter all-gathers"),
            gib("gradient reduce-scatters", "gradient all-reduces"),
            gib("tensor axis"),
            str(row["collectives"]["activation_sized_all_gathers"]),
            f"{row['link_seconds_at_least']:.2f}",
        ]
    else:
        cells += ["", again, *[""] * 5]
    seconds = f"memory alone: {row['memory_seconds']:.0f}" if _is_memory(row) else f"{row['compile_seconds']:.0f}"
    return [*cells, *_predicted_cells(row.get("predicted")), seconds]


def _is_memory(row: dict[str, Any]) -> bool:
    """Returns True for a line of --memory_only."""
    return row.get("compiled") == "memory"


def _predicted_cells(predicted: dict[str, Any] | None) -> list[str]:
    """The prediction: seconds and MFU with their ranges; empty for lines that have none."""
    if predicted is None:
        return [""] * 4
    low, high = predicted["seconds_range"]
    worst, best = (100 * share for share in predicted["mfu_with_encoders_range"])
    return [
        f"{predicted['seconds']:.1f} ({low:.1f} .. {high:.1f})",
        f"{100 * predicted['mfu_with_encoders']:.1f} % ({worst:.1f} .. {best:.1f})",
        f"{100 * predicted['moves_share']:.1f} %",
        f"{predicted['seconds_by_kind']['exposed collectives']:.2f}",
    ]


def main(argv: list[str]) -> None:
    """Compiles layouts without a line, writes lines and the table."""
    del argv
    wanted = [
        (config, machine)
        for config, machines in LAYOUTS.items()
        for machine in machines
        if not _ONLY.value or any(part in f"{config}:{machine}" for part in _ONLY.value)
    ]
    if not wanted:
        raise UserError(f"--only={','.join(_ONLY.value)} matches no layout; configs are {', '.join(LAYOUTS)}")
    path = paths.resolve(_ROWS.value)
    rows = {row["layout"]: row for row in jsonl.read_lines(path)}
    for config, machine in Progress(wanted, desc="layouts", unit="layout"):
        known = rows.get(f"{config}:{machine}")
        if known and (_MEMORY_ONLY.value or not _is_memory(known)):
            continue
        row = rows[f"{config}:{machine}"] = compile_layout(config, machine, _MEMORY_ONLY.value)
        with contextlib.closing(jsonl.LineWriter(path)) as lines:
            lines.append(row)
        say(f"{row['layout']}: {'fits' if row['fits'] else 'does not fit'}")
    order = [f"{config}:{machine}" for config, machines in LAYOUTS.items() for machine in machines]
    text = harness.table(HEAD, [table_row(rows[layout]) for layout in order if layout in rows])
    if _TABLE.value:
        files.write_text(paths.resolve(_TABLE.value), f"{text}\n")
    else:
        print(text)


if __name__ == "__main__":
    program.run(main)
