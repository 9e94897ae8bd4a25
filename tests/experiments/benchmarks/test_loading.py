"""The benchmark of loading: what it says of a directory of weights, and the published files that it makes."""

import re

import numpy as np
import pytest

from experiments.benchmarks import harness
from experiments.configs import shapes
from varedit_jax.config import TextConfig, preset
from varedit_jax.conversion import convert
from varedit_jax.weights.reader import open_weights

pytestmark = pytest.mark.subprocess


def test_a_report_says_bytes_by_part_and_type_and_memory(run_program, tmp_path):
    lines = {
        "good": [f"--checkpoint={shapes.SHIPPED}", "--dtype=bfloat16", f"--output={tmp_path / 'loading.md'}"],
        "type": [f"--checkpoint={shapes.SHIPPED}", "--dtype=float8"],
    }
    answers = run_program("benchmarks.loading", lines)
    assert answers["type"] == (1, "", "error: weights cannot be loaded as 'float8'; give float32, bfloat16 or int8\n")
    assert answers["good"][0] == 0
    text = (tmp_path / "loading.md").read_text()
    for row in (
        "| text | bfloat16 | 0.003 |",
        "| transformer | float32 | 0.001 |",
        "| transformer | bfloat16 | 0.002 |",
    ):
        assert row in text
    assert re.search(r"\| 8b \| bfloat16 \| 0\.326 \| 2\.447 \| 17\.061 \| 19\.835 \|", text)
    held, before, most, above = (
        float(re.search(rf"\| {name} \| ([\d.-]+) \|", text)[1])
        for name in (
            "arrays of parameters",
            "resident before",
            "peak of resident memory, above before",
            "peak less the arrays",
        )
    )
    assert held == pytest.approx(0.009, abs=2e-3) and before > 0.1
    assert above == pytest.approx(most - held, abs=2e-3)


def test_published_files_are_made_with_every_name_and_random_values(tmp_path):
    config = preset("2b")
    small = TextConfig(width=config.text.width, layers=1, heads=2, head_size=8, mlp_width=16, vocabulary_size=40)
    config = type(config)(text=small)
    size = harness.make_published(tmp_path / "text.pth", config, "text")
    file = open_weights(tmp_path / "text.pth")
    wanted = convert.mapping_of(config, ["text"])
    assert {name: tensor.shape for name, tensor in file.items()} == {m.link.name: m.link.shape for m in wanted}
    assert size == sum(4 * int(np.prod(m.link.shape)) for m in wanted)
    assert all(np.std(tensor.load()) > 0.5 for tensor in file.values() if np.prod(tensor.shape) > 64)
