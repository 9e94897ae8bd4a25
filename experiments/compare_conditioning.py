"""Compares the transformer's three conditionings on the source image on `shapes`, with the same number of steps.

    python -m experiments.compare_conditioning --seeds=2 --output=results/conditioning.md

Every run is experiments.train with overrides, scored by experiments.evaluate_shapes. Finished runs are not repeated:
the same command resumes an interrupted comparison.
"""

import json
import typing

import numpy as np
from absl import flags

from experiments import program
from experiments.benchmarks import harness
from experiments.configs import shapes
from varedit_jax import command
from varedit_jax.config import Conditioning, RunConfig
from varedit_jax.storage import paths
from varedit_jax.training.metrics import read_metrics

_SEEDS = flags.DEFINE_integer("seeds", 2, "runs of each conditioning", lower_bound=1)
_EXAMPLES = flags.DEFINE_integer("examples", 200, "held-out edits to judge", lower_bound=1)
_DIRECTORY = command.DEFINE_path("directory", "runs/conditioning", "directory of the runs", local=True)
_OUTPUT = command.DEFINE_path("output", "", "Markdown file for the table")
_CONFIG = "experiments/configs/shapes.py:compare"
_RUN = typing.cast(RunConfig, shapes.get_config("compare"))

CONDITIONINGS = typing.get_args(Conditioning)


def _result(conditioning: str, seed: int) -> dict[str, float]:
    """Trains one run; returns held-out loss and bit accuracy, share of exact edits, and seconds per step."""
    workdir = paths.local(_DIRECTORY.value, "--directory") / f"{conditioning}-{seed}"
    scores = workdir / f"scores-{_EXAMPLES.value}.json"
    if not scores.exists():
        harness.run_program(
            "experiments.train",
            f"--config={_CONFIG}",
            f"--workdir={workdir}",
            f"--config.model.transformer.conditioning={conditioning}",
            f"--config.seed={seed}",
        )
        harness.run_program(
            "experiments.evaluate_shapes",
            f"--checkpoint={workdir}",
            f"--examples={_EXAMPLES.value}",
            f"--output={scores}",
        )
    lines = read_metrics(workdir)
    held_out = next(line for line in reversed(lines) if "eval/loss" in line)
    # The first logged window after the stages includes compilation.
    whole = sum(steps for steps, _ in _RUN.stages) + _RUN.cadence.log_every
    seconds = [line["time/step_seconds"] for line in lines if "time/step_seconds" in line and line["step"] > whole]
    return {
        "loss": held_out["eval/loss"],
        "bits": held_out["eval/bit_accuracy"],
        "exact": json.loads(scores.read_text())["editor"]["all"]["exact"],
        "seconds": float(np.median(seconds)),
    }


def _rows(results: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """Returns mean and range over seeds for every conditioning; step time relative to `sar`."""
    rows = []
    base = np.mean([run["seconds"] for run in results["sar"]])
    for name, runs in results.items():
        cells = [name]
        for metric, form in (("loss", "{:.4f}"), ("bits", "{:.2%}"), ("exact", "{:.1%}")):
            values = [run[metric] for run in runs]
            low, high = form.format(min(values)), form.format(max(values))
            cells.append(f"{form.format(np.mean(values))} ({low} to {high})")
        rows.append([*cells, f"{np.mean([run['seconds'] for run in runs]) / base:.2f}"])
    return rows


def main(argv: list[str]) -> None:
    """Runs the comparison and prints the table."""
    del argv
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CONDITIONINGS}
    for seed in range(_SEEDS.value):
        for name, runs in results.items():
            runs.append(_result(name, seed))
    head = ("conditioning", "held-out loss", "held-out bit accuracy", "exact edits", "step time / sar")
    text = harness.report(
        "Conditioning, compared on `shapes`",
        harness.command_line("experiments.compare_conditioning", _SEEDS, _EXAMPLES, _DIRECTORY, _OUTPUT),
        f"{_RUN.steps} steps of the config {_CONFIG} (stages {_RUN.stages}, then all scales), {_SEEDS.value} seeds, "
        f"{_EXAMPLES.value} held-out edits.\nMean (lowest to highest) over seeds; time of a step of all scales.",
        harness.table(head, _rows(results)),
    )
    harness.publish(text, _OUTPUT.value)


if __name__ == "__main__":
    program.run(main)
