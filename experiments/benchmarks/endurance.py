"""Edits many times in one process, and reports its memory and the time of an edit along the way.

    python -m experiments.benchmarks.endurance --edits=1000 --output=results/endurance.md

Every edit has another seed, image, guidance and temperature, and one to four pictures.
"""

import numpy as np
from absl import flags

from experiments import program
from experiments.benchmarks import harness
from experiments.configs import shapes
from varedit_jax import command
from varedit_jax.config import SamplingConfig
from varedit_jax.progress import Progress
from varedit_jax.sampling.editor import Editor

_CHECKPOINT = command.DEFINE_path("checkpoint", shapes.SHIPPED, "directory of weights, or of a training run")
_EDITS = flags.DEFINE_integer("edits", 1000, "calls of the editor", lower_bound=10)
_OUTPUT = command.DEFINE_path("output", "", "Markdown file for the table")

_INSTRUCTIONS = ("add a red circle at the top left", "remove the square", "make the circle blue", "turn it green")
_ROWS = 10


def main(argv: list[str]) -> None:
    """Edits, and writes a row for each tenth of the edits."""
    del argv
    editor, draw = Editor.load(_CHECKPOINT.value), np.random.default_rng(0)
    count, rows, seconds = _EDITS.value, [], 0.0
    for index in Progress(range(count), desc="edits", unit="edit"):
        pictures = int(draw.integers(1, 5))
        images = [draw.integers(0, 256, (*draw.integers(20, 90, 2), 3), np.uint8) for _ in range(pictures)]
        instructions = [_INSTRUCTIONS[place % 4] for place in range(index, index + pictures)]
        sampling = SamplingConfig(guidance=float(draw.uniform(1.5, 6)), temperature=float(draw.uniform(0.3, 1)))
        took, _ = harness.timed(editor.edit, images, instructions, [index] * pictures, sampling, "square")
        seconds += took
        if (index + 1) * _ROWS % count < _ROWS:
            rows.append((str(index + 1), f"{harness.own_memory().now / 2**20:.1f}", f"{seconds:.2f}"))
            seconds = 0.0
    text = harness.report(
        "Many edits in one process",
        harness.command_line("experiments.benchmarks.endurance", _CHECKPOINT, _EDITS),
        "One to four pictures an edit, each edit with another seed, guidance and temperature. The first row has all "
        "compilations in it.",
        harness.table(["edits", "resident memory, MiB", "seconds of these edits"], rows),
    )
    harness.publish(text, _OUTPUT.value)


if __name__ == "__main__":
    program.run(main)
