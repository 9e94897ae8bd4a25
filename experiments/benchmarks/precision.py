"""Measures the effect of cheaper matmuls in the frozen encoders.

    python -m experiments.benchmarks.precision --golden=tests/data/golden/mini_a,tests/data/golden/mini_b

The first row is the shipped editor of `shapes`, the only trained one, on held-out images. Prints a table for
`tokenizer_precision` (share of bits that change, by scale) and one for `text_dtype` (relative error of the features,
and the held-out loss with them).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from data_pipelines import loader
from experiments import program
from experiments.benchmarks import harness
from experiments.configs import shapes
from varedit_jax import command
from varedit_jax.analysis import parity
from varedit_jax.analysis.precision import bits_at, changed_bits
from varedit_jax.config import ComputeType, DataConfig, EditorConfig, RunConfig
from varedit_jax.parallel.compiler_options import jit_everywhere
from varedit_jax.sampling.editor import Editor
from varedit_jax.scales import Pyramid, editor_pyramid
from varedit_jax.text.t5 import T5Encoder
from varedit_jax.text.vocabulary import Vocabulary
from varedit_jax.training.setup import make_evaluate

_GOLDEN = flags.DEFINE_list("golden", [], "directories of further, golden models")
_EXAMPLES = flags.DEFINE_integer("examples", 64, "held-out images of shapes", lower_bound=1)
_OUTPUT = command.DEFINE_path("output", "", "Markdown file for the tables")


def _tokenizers(editor: Editor, images: jax.Array) -> Iterator[tuple[str, Any, jax.Array, EditorConfig, Pyramid]]:
    """Yields name, weights, images, configuration and pyramid of every tokenizer."""
    yield "shapes, shipped", editor.params["tokenizer"], images, editor.config, editor_pyramid(editor.config)
    for directory in _GOLDEN.value:
        golden = parity.read_golden(directory)
        golden_images = np.moveaxis(golden.tensors["tgt_image_uint8"], 1, -1)
        yield directory, golden.tokenizer, jax.device_put(golden_images), golden.config, golden.pyramid


def _tokenizer_rows(editor: Editor, images: jax.Array) -> Iterator[tuple[object, ...]]:
    for name, params, shown, config, pyramid in _tokenizers(editor, images):
        exact = bits_at("highest", params, shown, config, pyramid)
        bits = sum(scale.size for scale in exact)
        for precision in ("high", "default"):
            *scales, every = changed_bits(exact, bits_at(precision, params, shown, config, pyramid))
            by_scale = ", ".join(f"{100 * share:.2g}" for share in scales)
            yield name, bits, precision, f"{100 * every:.2g}", by_scale


def _text_rows(editor: Editor, data: DataConfig, batch: dict[str, jax.Array]) -> Iterator[tuple[object, ...]]:
    exact_BTE = None
    dtypes: tuple[ComputeType, ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        run = RunConfig(name="precision", model=editor.config, data=data, text_dtype=dtype)
        text = optax.tree.cast(editor.params["text"], dtype)
        encoder = T5Encoder(editor.config.text, jnp.dtype(dtype))
        features_BTE = jit_everywhere(encoder.apply)({"params": text}, batch["text_ids"], batch["text_length"])
        exact_BTE = features_BTE if exact_BTE is None else exact_BTE
        error = float(jnp.linalg.norm(features_BTE - exact_BTE) / jnp.linalg.norm(exact_BTE))
        evaluate = jit_everywhere(make_evaluate(run, editor_pyramid(editor.config)))
        loss = float(evaluate(editor.params, {**editor.params, "text": text}, batch)["loss"])
        yield "shapes", dtype, f"{error:.2g}", f"{loss:.5f}"


def main(argv: list[str]) -> None:
    """Prints both tables."""
    del argv
    editor = Editor.load(shapes.SHIPPED)
    data = dataclasses.replace(shapes.DATA, batch_size=_EXAMPLES.value, train_examples=1)
    held_out = loader.open_split(data, "test")
    batch = jax.device_put(next(loader.evaluation_batches(data, Vocabulary.load(), held_out)))
    text = harness.report(
        "Precision of the frozen encoders",
        harness.command_line("experiments.benchmarks.precision", _GOLDEN, _EXAMPLES, _OUTPUT),
        f"{_EXAMPLES.value} held-out images of shapes; weights of golden directories are random.",
        harness.table(
            ("tokenizer", "bits", "tokenizer_precision", "changed, %", "by scale"),
            list(_tokenizer_rows(editor, batch["target"])),
        ),
        harness.table(
            ("text encoder", "text_dtype", "relative error of features", "held-out loss"),
            list(_text_rows(editor, data, batch)),
        ),
    )
    harness.publish(text, _OUTPUT.value)


if __name__ == "__main__":
    program.run(main)
