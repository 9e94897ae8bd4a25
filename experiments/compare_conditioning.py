"""Compares the three ways of showing the source to the transformer, at equal steps, on `shapes`.

    python -m experiments.compare_conditioning --seeds=2 --output=results/conditioning.md

Every run is experiments.train with overrides, scored by experiments.evaluate_shapes; runs that are finished are not
made again, so an interrupted comparison goes on where it was.
"""

import json
import pathlib
import subprocess
import sys
import typing

import numpy as np
from absl import flags

from experiments import program
from experiments.configs import shapes
from varedit_jax.config import RunConfig
from varedit_jax.errors import UserError
from varedit_jax.training.metrics import read_metrics

_SEEDS = flags.DEFINE_integer("seeds", 2, "runs of each conditioning", lower_bound=1)
_EXAMPLES = flags.DEFINE_integer("examples", 200, "held-out edits to judge", lower_bound=1)
_DIRECTORY = flags.DEFINE_string("directory", "runs/conditioning", "directory of the runs")
_OUTPUT = flags.DEFINE_string("output", "", "Markdown file for the table")
_CONFIG = "experiments/configs/shapes.py:compare"
_RUN = typing.cast(RunConfig, shapes.get_config("compare"))

CONDITIONINGS = ("sar", "finest", "full")


def _program(module: str, *arguments: str) -> None:
    code = subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode
    if code:
        raise UserError(f"{module} {' '.join(arguments)} ended with exit code {code}; what it said is above")


def _result(conditioning: str, seed: int) -> dict[str, float]:
    """Trains and scores one run: held-out loss and bit accuracy, share of exact edits, seconds a step."""
    workdir = pathlib.Path(_DIRECTORY.value) / f"{conditioning}-{seed}"
    scores = workdir / f"scores-{_EXAMPLES.value}.json"
    if not scores.exists():
        _program(
            "experiments.train",
            f"--config={_CONFIG}",
            f"--workdir={workdir}",
            f"--config.model.transformer.conditioning={conditioning}",
            f"--config.seed={seed}",
        )
        _program(
            "experiments.evaluate_shapes",
            f"--checkpoint={workdir}",
            f"--examples={_EXAMPLES.value}",
            f"--output={scores}",
        )
    lines = read_metrics(workdir)
    held_out = next(line for line in reversed(lines) if "eval/loss" in line)
    whole = (
        sum(steps for steps, _ in _RUN.stages) + _RUN.cadence.log_every
    )  # the first report after the stages compiles
    seconds = [line["time/step_seconds"] for line in lines if "time/step_seconds" in line and line["step"] > whole]
    return {
        "loss": held_out["eval/loss"],
        "bits": held_out["eval/bit_accuracy"],
        "exact": json.loads(scores.read_text())["editor"]["all"]["exact"],
        "seconds": float(np.median(seconds)),
    }


def _table(results: dict[str, list[dict[str, float]]]) -> str:
    """Mean and range over seeds of every conditioning, as Markdown; step time relative to `sar`."""
    lines = [
        "| conditioning | held-out loss | held-out bit accuracy | exact edits | step time / sar |",
        "|---|---|---|---|---|",
    ]
    base = np.mean([run["seconds"] for run in results["sar"]])
    for name, runs in results.items():
        cells = []
        for metric, form in (("loss", "{:.4f}"), ("bits", "{:.2%}"), ("exact", "{:.1%}")):
            values = [run[metric] for run in runs]
            low, high = form.format(min(values)), form.format(max(values))
            cells.append(f"{form.format(np.mean(values))} ({low} to {high})")
        ratio = np.mean([run["seconds"] for run in runs]) / base
        lines.append(f"| {name} | {' | '.join(cells)} | {ratio:.2f} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Runs the comparison and prints the table."""
    del argv
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CONDITIONINGS}
    for seed in range(_SEEDS.value):
        for name, runs in results.items():
            runs.append(_result(name, seed))
    table = _table(results)
    print(table)
    if _OUTPUT.value:
        command = (
            f"python -m experiments.compare_conditioning --seeds={_SEEDS.value} --examples={_EXAMPLES.value} "
            f"--output={_OUTPUT.value}"
        )
        pathlib.Path(_OUTPUT.value).write_text(
            f"# Conditioning, compared on `shapes`\n\n    {command}\n\n"
            f"{_RUN.steps} steps of the config {_CONFIG} (stages {_RUN.stages}, then all scales), {_SEEDS.value} "
            f"seeds, {_EXAMPLES.value} held-out edits. Mean (lowest to highest) over seeds; time of a step of all "
            f"scales.\n\n{table}\n"
        )


if __name__ == "__main__":
    program.run(main)
