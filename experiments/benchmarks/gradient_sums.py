"""Models the rounding of gradients that many devices sum in bfloat16, and in float32, and what the sums cost.

    python -m experiments.benchmarks.gradient_sums --output=results/gradient_sums.md

The parts are gradients of the shipped editor of `shapes`, one for each device, from examples of its own; and normal
numbers, alone and with a mean that all devices share. The reduce-scatters are those of varedit_jax/analysis/sums.py.
"""

import dataclasses
import json
import math
from collections.abc import Iterator

import jax
import numpy as np
from absl import flags

from data_pipelines import loader
from experiments import program
from experiments.benchmarks import harness
from experiments.configs import shapes
from varedit_jax import command, hardware
from varedit_jax.analysis import sums
from varedit_jax.config import RunConfig
from varedit_jax.parallel.compiler_options import jit_everywhere
from varedit_jax.sampling.editor import Editor
from varedit_jax.scales import editor_pyramid
from varedit_jax.storage import paths
from varedit_jax.text.vocabulary import Vocabulary
from varedit_jax.training.step import make_loss

_EXAMPLES = flags.DEFINE_integer("examples", 4, "of each device", lower_bound=1)
_VALUES = flags.DEFINE_integer("values", 50000, "of the gradient, drawn from all, that are summed", lower_bound=1)
_COMPILED = command.DEFINE_path(
    "compiled", "results/compile_ahead.jsonl", "steps that experiments.compile_configs compiled"
)
_CONFIG = flags.DEFINE_string("config", "varedit_8b_512", "whose layouts on TPUs the costs are of")
_OUTPUT = command.DEFINE_path("output", "", "Markdown file for the tables")
_CHOSEN = 0  # seed of the drawn values

# Devices: sides of the torus, as of v5p slices and of a v5e or v6e pod.
SIDES = {64: (4, 4, 4), 128: (4, 4, 8), 256: (16, 16)}
WAYS = ("single ring", "torus, side by side", "tree")


def _gradients(devices: int) -> np.ndarray:
    """Returns float32 [devices, values]: gradients of the kernels of the shipped editor's blocks."""
    editor = Editor.load(shapes.SHIPPED)
    run = shapes.get_config("full")
    assert isinstance(run, RunConfig)
    examples = _EXAMPLES.value
    data = dataclasses.replace(
        shapes.DATA, batch_size=examples, features="online", train_examples=1, eval_examples=devices * examples
    )
    run = dataclasses.replace(run, model=editor.config, data=data, train_text=False)
    gradient = jit_everywhere(jax.grad(make_loss(run, editor_pyramid(run.model), training=True), has_aux=True))
    batches = loader.evaluation_batches(data, Vocabulary.load(), loader.open_split(data, "test"))
    trained, frozen = {"transformer": editor.params["transformer"]}, editor.params
    draw, rows = np.random.default_rng(_CHOSEN), []
    chosen = None
    for device in range(devices):
        batch = jax.device_put(next(batches))
        found, _ = gradient(trained, frozen, batch, jax.random.key(device))
        blocks = found["transformer"]["blocks"]
        kernels = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(blocks) if leaf.ndim > 2]
        row = np.concatenate(kernels)
        if chosen is None:
            chosen = draw.choice(len(row), min(_VALUES.value, len(row)), replace=False)
        rows.append(row[chosen])
    return np.stack(rows)


def _kinds(most: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yields name and parts [most, values] of each kind of gradient."""
    yield "`shapes`, trained", _gradients(most)
    noise = np.random.default_rng(_CHOSEN).normal(size=(most, _VALUES.value)).astype(np.float32)
    yield "normal", noise
    yield "normal around 1", noise + np.float32(1)


def _sum(way: str, parts: np.ndarray, sent: sums.Round) -> np.ndarray:
    if way == "single ring":
        return sums.ring(parts, sent)
    return sums.tree(parts, sent) if way == "tree" else sums.torus(parts, SIDES[len(parts)], sent)


def _error_rows() -> Iterator[tuple[object, ...]]:
    for name, every in _kinds(max(SIDES)):
        for count in SIDES:
            parts = every[:count]
            exact = np.asarray(np.sum(parts, axis=0, dtype=np.float64))
            rounded = sums.bfloat16(parts)
            errors = [sums.relative_error(_sum(way, rounded, sums.bfloat16), exact) for way in WAYS]
            once = sums.relative_error(np.asarray(np.sum(rounded, axis=0, dtype=np.float64)), exact)
            full = sums.relative_error(_sum("single ring", parts, sums.float32), exact)
            yield name, count, *(f"{error:.2%}" for error in errors), f"{once:.2%}", f"{full:.1e}"


def _cost_rows() -> Iterator[tuple[object, ...]]:
    """Yields the reduce-scatters of the compiled steps, and the least seconds on the links, as of `link_seconds`."""
    for line in paths.resolve(_COMPILED.value).read_text().splitlines():
        row = json.loads(line)
        found = row.get("collectives", {}).get("by_purpose", {}).get("gradient reduce-scatters")
        chip = next((chip for chip in hardware.CHIPS.values() if chip.name == row.get("chip")), None)
        if not found or not chip or row["name"] != _CONFIG.value or row["layout"].endswith("h100_64"):
            continue
        shards = math.prod(row["mesh"][axis] for axis in ("data", "fsdp"))
        seconds = found["gib"] * hardware.GIB * (shards - 1) / shards / (chip.link_bandwidth / 2)
        gib = found["gib"]
        yield row["layout"], f"{gib:.0f}", f"{2 * gib:.0f}", f"{seconds:.2f}", f"{2 * seconds:.2f}"


def main(argv: list[str]) -> None:
    """Prints both tables."""
    del argv
    text = harness.report(
        "Gradients summed by many devices",
        harness.command_line("experiments.benchmarks.gradient_sums", _EXAMPLES, _VALUES, _OUTPUT),
        "Norm of the error over the norm of the sum in float64.",
        harness.table(
            (
                "gradients",
                "devices",
                *(f"{way}, bfloat16" for way in WAYS),
                "rounded once, bfloat16",
                "single ring, float32",
            ),
            list(_error_rows()),
        ),
        harness.table(("layout", "bfloat16, GiB", "float32, GiB", "bfloat16, s", "float32, s"), list(_cost_rows())),
    )
    harness.publish(text, _OUTPUT.value)


if __name__ == "__main__":
    program.run(main)
