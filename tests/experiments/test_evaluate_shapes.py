"""The evaluation program with a tiny random editor: scores, sheet and table; a mistake is one sentence, and early."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from varedit_jax.config import EditorConfig, SamplingConfig, preset
from varedit_jax.parameters import abstract_params
from varedit_jax.weights.directory import PARTS, save_weights

pytestmark = pytest.mark.subprocess

Answer = tuple[int, str, str]
HELD_OUT = 8
# The program on a data set of a few examples, and prepared in no time.
SETUP = f"""
import dataclasses
module.shapes.DATA = dataclasses.replace(module.shapes.DATA, train_examples=8, eval_examples={HELD_OUT})
"""


def save_random(directory: pathlib.Path, grids: tuple[tuple[int, int], ...]) -> None:
    tiny, draw = preset("tiny"), np.random.default_rng(0)
    transformer = dataclasses.replace(tiny.transformer, depth=2)
    config: EditorConfig = dataclasses.replace(tiny, transformer=transformer, grids=grids)
    params = {part: filled(abstract_params(config, part), draw) for part in PARTS}
    save_weights(directory, config, params, sampling=SamplingConfig(guidance=1.0, greedy=True))


def filled(tree: dict[str, Any], draw: np.random.Generator) -> dict[str, Any]:
    return {
        name: filled(x, draw) if isinstance(x, dict) else draw.normal(0, 0.2, x.shape).astype(np.float32)
        for name, x in tree.items()
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("evaluate")
    save_random(directory / "weights", ((1, 1), (8, 8)))
    save_random(directory / "small", ((1, 1), (2, 2)))
    return directory


@pytest.fixture(scope="module")
def answers(run_program: Callable, directory: pathlib.Path) -> dict[str, Answer]:
    def line(**changes: object) -> list[str]:
        flags = {"checkpoint": directory / "weights", "data": directory / "data"} | changes
        return [f"--{name}={value}" for name, value in flags.items()]

    return run_program(
        "evaluate_shapes",
        {
            "scored": line(examples=4, output=directory / "scores.json", sheet=directory / "sheet.png"),
            "too many": line(examples=HELD_OUT + 1),
            "none": line(examples=0),
            "no number": line(examples="all"),
            "no weights": line(checkpoint=directory / "nowhere"),
            "other size": line(checkpoint=directory / "small", examples=4),
            "no directory": line(output=directory / "nowhere" / "scores.json"),
            "no kind": line(sheet=directory / "sheet.doc"),
        },
        SETUP,
    )


def test_scores_sheet_and_table(answers: dict[str, Answer], directory: pathlib.Path) -> None:
    """A random editor makes no exact edits; its edits are counted by group, beside the baselines."""
    code, out, err = answers["scored"]
    assert code == 0, err
    header = next(line for line in out.splitlines() if line.startswith("edits"))  # TFDS may speak first
    assert header.split() == ["edits", "n", "copy", "oracle", "editor", "done", "kept"]
    scores = json.loads((directory / "scores.json").read_text())
    assert set(scores) == {"copy", "oracle", "editor"}
    assert scores["editor"]["all"] == {"edits": 4, "done": 0.0, "kept": 0.0, "exact": 0.0}
    assert scores["copy"]["all"]["kept"] == 1.0 and scores["copy"]["all"]["exact"] == 0.0
    kinds = [group for name, group in scores["editor"].items() if name != "all" and not name.startswith("unseen")]
    assert sum(group["edits"] for group in kinds) == 4
    with Image.open(directory / "sheet.png") as sheet:
        assert min(sheet.size) > 100


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("too many", f"--examples={HELD_OUT + 1}, but only {HELD_OUT} edits are held out"),
        ("none", "examples"),
        ("no number", "examples"),
        ("no weights", "nowhere is not the directory of a run: it has no config.json"),
        ("other size", "is for images of (8, 8), but those of shapes are (32, 32)"),
        ("no directory", "nowhere of "),
        ("no kind", "cannot tell the kind of image from the name"),
    ],
)
def test_a_mistake_is_one_sentence(answers: dict[str, Answer], case: str, sentence: str) -> None:
    code, out, err = answers[case]
    assert (code, out) == (1, "")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and sentence in lines[0], err
    assert "Traceback" not in err
