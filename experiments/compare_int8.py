"""Compares weights in int8 with float32 and bfloat16: bits that change, scale by scale, and the score on `shapes`.

    python -m experiments.compare_int8 --output=results/int8.md

Bits are the likelier ones where every scale is given the coarser ones of the target, so that a changed bit changes no
other. Models are those of the golden data, and the shipped editor on held-out `shapes`, whose edits are then judged.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from data_pipelines import loader
from experiments import program
from experiments import shapes_scoring as scoring
from experiments.benchmarks import harness
from experiments.configs import shapes
from varedit_jax import command
from varedit_jax.analysis import parity
from varedit_jax.config import ComputeType, EditorConfig
from varedit_jax.parallel.compiler_options import jit_everywhere
from varedit_jax.parameters import bytes_by_type, quantized_params
from varedit_jax.progress import Progress
from varedit_jax.sampling.editor import Editor
from varedit_jax.scales import Pyramid, editor_pyramid
from varedit_jax.text.t5 import T5Encoder
from varedit_jax.tokenizer import tokens as tokens_lib
from varedit_jax.transformer.model import Transformer
from varedit_jax.types import Params

_GOLDEN = flags.DEFINE_list("golden", ["tests/data/golden/mini_a", "tests/data/golden/mini_b"], "golden directories")
_FORCED = flags.DEFINE_integer("forced", 100, "held-out edits of `shapes` whose bits are compared", lower_bound=1)
_EXAMPLES = flags.DEFINE_integer("examples", 200, "held-out edits of `shapes` to judge", lower_bound=1)
_DATA = command.DEFINE_path("data", "", "directory of the prepared data; data/ by default", local=True)
_OUTPUT = command.DEFINE_path("output", "", "Markdown file for the tables")


class Variant(NamedTuple):
    """Types that weights are kept in and compute in."""

    int8: bool  # large matrices; others are float32
    dtype: ComputeType  # that blocks compute in


VARIANTS = {
    "float32": Variant(False, "float32"),
    "bfloat16": Variant(False, "bfloat16"),
    "int8, computes in float32": Variant(True, "float32"),
    "int8, computes in bfloat16": Variant(True, "bfloat16"),
}


def _typed(config: EditorConfig, variant: Variant) -> EditorConfig:
    return dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, dtype=variant.dtype))


class Forced(NamedTuple):
    """What a model is given, and is to predict."""

    source_BSN: jax.Array
    inputs_BLN: jax.Array
    text_of: Callable[[Variant], Any]  # features of the text, [B, T, E]
    length_B: np.ndarray


def _margins(config: EditorConfig, pyramid: Pyramid, params: Params, forced: Forced, variant: Variant) -> np.ndarray:
    """Log-odds of every bit, [B, L, N]."""
    model = Transformer(_typed(config, variant).transformer, pyramid)
    kept = quantized_params({"transformer": params})["transformer"] if variant.int8 else params
    logits = jit_everywhere(model.apply)(
        {"params": kept}, forced.source_BSN, forced.inputs_BLN, forced.text_of(variant), forced.length_B
    )
    return np.asarray(logits[..., 1] - logits[..., 0])


def _changed(config: EditorConfig, pyramid: Pyramid, params: Params, forced: Forced) -> str:
    """The table of a model: changed bits of every scale."""
    exact = _margins(config, pyramid, params, forced, VARIANTS["float32"])
    table: list[Sequence[str]] = []
    for name, variant in VARIANTS.items():
        margins = _margins(config, pyramid, params, forced, variant)
        changed = (margins > 0) != (exact > 0)
        shares = [f"{changed[:, tokens].mean():.3%}" for tokens in pyramid.slices()]
        table.append((name, *shares, f"{changed.mean():.3%}", f"{np.abs(margins - exact).mean() / exact.std():.3%}"))
    scales = [f"{rows} x {columns}" for rows, columns in pyramid.grids]
    return harness.table(("weights", *scales, "all scales", "change of log-odds"), table)


def _golden(directory: str) -> str:
    golden = parity.read_golden(directory)
    source_BSN, inputs_BLN, text_BTE, length_B = parity.forced_inputs(golden)
    forced = Forced(source_BSN, inputs_BLN, lambda variant: text_BTE, length_B)
    return _changed(golden.config, golden.pyramid, golden.transformer, forced)


def main(argv: list[str]) -> None:
    """Prints the report."""
    del argv
    tables = [f"## {name}\n\n{_golden(name)}" for name in _GOLDEN.value]
    editor = Editor.load(shapes.SHIPPED)
    config, pyramid = editor.config, editor_pyramid(editor.config)
    source = loader.open_split(dataclasses.replace(shapes.DATA, directory=_DATA.value, train_examples=1), "test")
    spread = np.linspace(0, len(source) - 1, max(_EXAMPLES.value, _FORCED.value)).round().astype(int)
    records = [source[int(index)] for index in spread]
    tables.append(f"## The shipped editor, {_FORCED.value} held-out edits\n\n{_shapes_bits(editor, pyramid, records)}")
    rows: list[Sequence[str]] = []
    host = jax.device_get(editor.params)
    with Progress(total=len(VARIANTS) * _EXAMPLES.value, desc="edits", unit="edit") as progress:
        for name, variant in VARIANTS.items():
            params = quantized_params(host) if variant.int8 else host
            typed = Editor(_typed(config, variant), params, editor.sampling, editor.editing, editor.vocabulary)
            judged = records[: _EXAMPLES.value]
            images = scoring.edit_records(typed, judged, on_batch=progress.update)[-1]
            score = scoring.by_group(scoring.judge_records(images, judged), judged)["all"]
            size = sum(bytes_by_type(params[part]).get("int8", 0) for part in ("transformer", "text"))
            rows.append((name, f"{score.exact:.1%}", f"{score.done:.1%}", f"{score.kept:.1%}", f"{size / 1e6:.2f} MB"))
    table = harness.table(("weights", "exact", "done", "kept", "of them in int8"), rows)
    tables.append(f"## Score on `shapes`, {_EXAMPLES.value} held-out edits\n\n{table}")
    text = harness.report(
        "Weights in int8",
        harness.command_line("experiments.compare_int8", _GOLDEN, _FORCED, _EXAMPLES, _OUTPUT),
        "Shares of bits that differ from those of float32 weights, by scale, where every scale is given the coarser "
        "bits of the target; the change of the log-odds of a bit is its mean, over their standard deviation.",
        "\n\n".join(tables),
    )
    harness.publish(text, _OUTPUT.value)


def _shapes_bits(editor: Editor, pyramid: Pyramid, records: Sequence[Any]) -> str:
    config, few = editor.config, records[: _FORCED.value]
    encode = jit_everywhere(lambda params, images: tokens_lib.encode_images(params, images, config))
    source, target = (
        encode(editor.params["tokenizer"], np.stack([record[side] for record in few])) for side in ("source", "target")
    )
    made = tokens_lib.make_tokens(source, target, config, pyramid)
    ids_BT, length_B = editor.vocabulary.encode([record["instruction"] for record in few], config.text.max_tokens)
    ids_BT = ids_BT[:, : int(length_B.max())]
    host = jax.device_get(editor.params)

    def features(variant: Variant) -> Any:
        params = quantized_params({"text": host["text"]})["text"] if variant.int8 else host["text"]
        return jit_everywhere(T5Encoder(config.text).apply)({"params": params}, ids_BT, length_B)

    return _changed(config, pyramid, host["transformer"], Forced(made.source_BSN, made.inputs_BLN, features, length_B))


if __name__ == "__main__":
    program.run(main)
