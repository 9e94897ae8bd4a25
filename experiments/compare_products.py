"""Compares products of the blocks in bfloat16 with those in eight bits on `shapes`: the same seed, the same examples.

    python -m experiments.compare_products --output=results/products.md --curves=results/products.png

Every run is experiments.train with overrides. Finished runs are not repeated: the same command resumes an interrupted
comparison.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import program
from experiments.benchmarks import harness
from varedit_jax import command
from varedit_jax.errors import UserError
from varedit_jax.evaluation.curves import Panel, Point, curve_sheet
from varedit_jax.images import write_image
from varedit_jax.storage import paths
from varedit_jax.training.metrics import read_metrics

# Name: products, products_backward, seed. The last one says what a seed makes of the loss.
RUNS = {
    "plain": ("plain", False, 0),
    "int8": ("int8", False, 0),
    "int8_backward": ("int8", True, 0),
    "fp8_backward": ("fp8", True, 0),
    "plain, other seed": ("plain", False, 1),
}

_RUNS = flags.DEFINE_list("runs", list(RUNS), "runs to compare; plain is one of them")
_STEPS = flags.DEFINE_integer("steps", 500, "of each run", lower_bound=280)
_DIRECTORY = command.DEFINE_path("directory", "runs/products", "directory of the runs", local=True)
_OUTPUT = command.DEFINE_path("output", "", "Markdown file for the table")
_CURVES = command.DEFINE_path("curves", "", "PNG file for the curves")
_CONFIG = "experiments/configs/shapes.py:compare"
_WINDOW = 10  # lines of metrics.jsonl, one per ten steps, that a point of the curves averages


def _metrics(name: str) -> Sequence[dict[str, Any]]:
    """Trains one run, unless it has been; returns its metrics."""
    products, backward, seed = RUNS[name]
    workdir = paths.local(_DIRECTORY.value, "--directory") / f"{name.split(',')[0]}-{seed}"
    if not any(line["step"] >= _STEPS.value for line in read_metrics(workdir)):
        overrides = {
            "stages": "()",
            "steps": _STEPS.value,
            "seed": seed,
            "data.train_examples": 8000,
            "cadence.log_every": 10,
            "cadence.eval_every": _STEPS.value // 2,
            "cadence.save_every": _STEPS.value,
            "model.transformer.dtype": "bfloat16",
            "model.transformer.products": products,
            "model.transformer.products_backward": backward,
        }
        given = [f"--config.{field}={value}" for field, value in overrides.items()]
        harness.run_program("experiments.train", f"--config={_CONFIG}", f"--workdir={workdir}", *given)
    return read_metrics(workdir)


def _points(lines: Sequence[dict[str, Any]], metric: str) -> list[Point]:
    known = [(line["step"], line[metric]) for line in lines if metric in line]
    return [
        (known[last][0], float(np.mean([value for _, value in known[max(last - _WINDOW + 1, 0) : last + 1]])))
        for last in range(len(known))
    ]


def main(argv: list[str]) -> None:
    """Runs the comparison; prints the table and draws the curves."""
    del argv
    unknown = [name for name in _RUNS.value if name not in RUNS]
    if unknown or "plain" not in _RUNS.value:
        raise UserError(f"--runs={','.join(_RUNS.value)}: give plain and others of {', '.join(RUNS)}")
    found = {name: _metrics(name) for name in _RUNS.value}
    losses = {name: _points(lines, "loss") for name, lines in found.items()}
    base = dict(losses["plain"])
    apart = {name: [(step, loss - base[step]) for step, loss in points] for name, points in losses.items()}
    rows = []
    for name, lines in found.items():
        held_out = next(line for line in reversed(lines) if "eval/loss" in line)
        largest = max(abs(difference) for step, difference in apart[name] if step >= _STEPS.value // 2)
        rows.append(
            (
                name,
                f"{losses[name][-1][1]:.4f}",
                f"{held_out['eval/loss']:.4f}",
                f"{held_out['eval/bit_accuracy']:.2%}",
                f"{largest:.4f}",
            )
        )
    head = ("products", "loss, last 100 steps", "held-out loss", "held-out bit accuracy", "largest distance, 2nd half")
    text = harness.report(
        "Products in eight bits, compared on `shapes`",
        harness.command_line("experiments.compare_products", _RUNS, _STEPS, _DIRECTORY, _OUTPUT, _CURVES),
        f"{_STEPS.value} steps of all scales of the config {_CONFIG} in bfloat16, one seed. Losses are "
        "means of ten logged steps, every tenth; distance: of that mean from the one of `plain`.",
        harness.table(head, rows),
    )
    if _CURVES.value:
        panels = [
            Panel(title="loss, mean of 100 steps", lines=losses),
            Panel(title="loss minus that of plain", lines=apart),
        ]
        write_image(_CURVES.value, np.asarray(curve_sheet(panels, heading="Products in eight bits")))
    harness.publish(text, _OUTPUT.value)


if __name__ == "__main__":
    program.run(main)
