"""Trains an editor on this machine, scores it and draws its edits; then scores and draws the shipped one.

    make demo         about seven minutes on two cores
    make demo-full    retrains the shipped tokenizer and editor: hours

It runs the programs that a user would, each in its own process, and prints the commands. Images and scores go to
runs/demo (runs/demo-full).
"""

import json
import pathlib
import time

import numpy as np
from absl import flags

from experiments import program
from experiments.benchmarks import harness
from experiments.configs import shapes
from varedit_jax import command
from varedit_jax.errors import UserError
from varedit_jax.evaluation.curves import Panel, curve_sheet
from varedit_jax.images import write_image
from varedit_jax.storage import paths
from varedit_jax.training.metrics import read_metrics

_FULL = flags.DEFINE_bool("full", False, "retrain the shipped tokenizer and editor, and score 1000 edits")
_DIRECTORY = command.DEFINE_path(
    "directory", "", "directory of the runs, images and scores; runs/demo or runs/demo-full by default", local=True
)
_CONFIG = "experiments/configs/shapes.py"
# On two cores, compilation included: shares of the whole, 7.0 minutes (results/shapes.md). Every phase prints its own.
_MINUTES = {
    "all": "about seven minutes",
    "begin": "about three and a half minutes",
    "resume": "about three minutes",
    "judge": "less than half a minute",
}
_STOP_AFTER = 1000  # steps after which the demo stops its training, to show that it resumes

GOAL_TRAINED, GOAL_SHIPPED = 0.75, 0.95  # shares of 200 held-out edits that are exact


def _evaluate(title: str, checkpoint: str, name: str, directory: pathlib.Path, examples: int) -> float:
    """Scores an editor; returns the share of exact edits."""
    scores = directory / f"{name}.json"
    harness.run_program(
        "experiments.evaluate_shapes",
        f"--checkpoint={checkpoint}",
        f"--examples={examples}",
        f"--sheet={directory / f'{name}.png'}",
        f"--output={scores}",
        title=title,
    )
    return float(json.loads(scores.read_text())["editor"]["all"]["exact"])


def _curves(workdir: pathlib.Path, path: pathlib.Path) -> None:
    """Draws loss and accuracy over steps."""
    lines = read_metrics(workdir)

    def series(name: str) -> list[tuple[float, float]]:
        return [(line["step"], line[name]) for line in lines if name in line]

    metrics = (("loss (nats per bit)", "loss", True), ("bit accuracy", "bit_accuracy", False))
    panels = [
        Panel(title=title, lines={"training": series(name), "held out": series(f"eval/{name}")}, log_y=log_y)
        for title, name, log_y in metrics
    ]
    scales = {f"scale {k}": series(f"eval/scale_token_accuracy/scale_{k}") for k in range(len(shapes.MODEL.grids))}
    panels.append(Panel(title="tokens right, held out", lines=scales))
    write_image(path, np.asarray(curve_sheet(panels, heading="shapes: training")))


def _train_editor(variant: str, workdir: pathlib.Path, titles: tuple[str, str], *arguments: str) -> None:
    """Trains, stops once after `_STOP_AFTER` steps and resumes by the same command; each has a title."""
    common = [f"--config={_CONFIG}:{variant}", f"--workdir={workdir}", *arguments]
    if not (workdir / "checkpoints").exists():
        harness.run_program("experiments.train", *common, f"--stop_after={_STOP_AFTER}", title=titles[0])
    harness.run_program("experiments.train", *common, title=titles[1])


def _demo(directory: pathlib.Path) -> None:
    start = time.perf_counter()
    workdir = directory / "editor"
    print(f"Trains an editor of small images and scores it: {_MINUTES['all']} on two cores. All is in {directory}.")
    titles = (
        f"1 of 4: makes the data and trains, until it is stopped at step {_STOP_AFTER} ({_MINUTES['begin']})",
        f"2 of 4: the same command again, so it resumes and trains to the end ({_MINUTES['resume']})",
    )
    _train_editor("demo", workdir, titles)
    _curves(workdir, directory / "training.png")
    title = f"3 of 4: judges 200 held-out edits of the editor just trained ({_MINUTES['judge']})"
    trained = _evaluate(title, str(workdir), "trained", directory, 200)
    title = f"4 of 4: judges the same edits of the shipped editor ({_MINUTES['judge']})"
    shipped = _evaluate(title, shapes.SHIPPED, "shipped", directory, 200)
    print(
        f"\ntrained here: {trained:.1%} of 200 held-out edits exact (goal {GOAL_TRAINED:.0%}); "
        f"shipped: {shipped:.1%} (goal {GOAL_SHIPPED:.0%}); {(time.perf_counter() - start) / 60:.1f} minutes"
    )
    images = [directory / name for name in ("trained.png", "shipped.png", "training.png")]
    print(f"look at {', '.join(map(str, images))} and {workdir / 'samples'}")
    if trained < GOAL_TRAINED or shipped < GOAL_SHIPPED:
        raise UserError("a goal was missed; see the tables above")


def _full(directory: pathlib.Path) -> None:
    stages = (("tokenizer", "images"), ("coarse", "coarse_once"), ("coarse", "coarse_twice"))
    tokenizer, editor = directory / "coarse_twice_weights", directory / "editor_weights"
    print(f"Trains the shipped tokenizer, in three runs, and editor: hours on two cores. All is in {directory}.")
    before = None
    for variant, name in stages:
        weights = directory / f"{name}_weights"
        if not weights.exists():
            harness.run_program(
                "experiments.train_tokenizer",
                f"--config={_CONFIG}:{variant}",
                f"--workdir={directory / name}",
                f"--export={weights}",
                *([f"--config.init_from={before}"] if before else []),
                title=f"tokenizer: {name.replace('_', ' ')}",
            )
        before = weights
    if not editor.exists():
        titles = (f"editor: until it is stopped at step {_STOP_AFTER}", "editor: the same command again resumes it")
        new = (f"--config.tokenizer_weights={tokenizer}", f"--export={editor}")
        _train_editor("full", directory / "editor", titles, *new)
    _curves(directory / "editor", directory / "training.png")
    _evaluate("1000 held-out edits", str(editor), "full", directory, 1000)
    print(f"the weights are in {editor}; they can replace {shapes.SHIPPED}")


def main(argv: list[str]) -> None:
    """Runs the demo."""
    del argv
    directory = paths.local(_DIRECTORY.value or ("runs/demo-full" if _FULL.value else "runs/demo"), "--directory")
    directory.mkdir(parents=True, exist_ok=True)
    (_full if _FULL.value else _demo)(directory)


if __name__ == "__main__":
    program.run(main)
