"""The editing program from end to end on a tiny folder of random weights, and its answers to mistakes."""

import pathlib
import shutil
from collections.abc import Mapping

import jax
import numpy as np
import pytest
from PIL import Image

from varedit_jax.config import SamplingConfig, preset
from varedit_jax.parameters import abstract_params
from varedit_jax.weights.directory import PARTS, save_folder

# What is left out of a case is as here; names are in one folder.
USUAL = {"checkpoint": "tiny", "image": "in.png", "instruction": "add a red circle", "output": "x.png"}

EDITS = {
    "plain": {"output": "plain.png"},
    "same seed": {"output": "same.png", "seed": "0"},
    "other seed": {"output": "other.jpg", "seed": "1"},
    "greedy": {"output": "greedy.webp", "greedy": "true"},
}

MISTAKES = {
    "no picture": ({"image": "none.png"}, "there is no picture"),
    "not a picture": ({"image": "text.png"}, "text.png is not a picture of a known kind"),
    "kind of output": ({"output": "x.docx"}, "cannot tell the kind of picture from the name"),
    "folder of output": ({"output": "none/x.png"}, "does not exist; create it first"),
    "no instruction": ({"instruction": " "}, "the instruction ' ' is empty"),
    "flag left out": ({"instruction": None}, "--instruction is missing; see --help"),
    "no checkpoint": ({"checkpoint": "none"}, "none is not the folder of a run"),
    "damaged checkpoint": ({"checkpoint": "damaged"}, "transformer.safetensors is damaged"),
    "seed": ({"seed": "-1"}, "flag --seed=-1"),
    "temperature": ({"temperature": "0"}, "flag --temperature=0"),
    "nothing to verify by": ({"verify": "true"}, "tiny has no manifest.json: there is nothing to verify it by"),
    "guidance": ({"guidance": "nan"}, "nan is not a list of 1 to 3 finite numbers"),
}


def line(folder: pathlib.Path, changes: Mapping[str, str | None]) -> list[str]:
    values = USUAL | changes
    paths = {name: folder / values[name] for name in ("checkpoint", "image", "output")}
    return [f"--{name}={value}" for name, value in (values | paths).items() if value is not None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Weights, a picture, and things that are neither."""
    folder, tiny, draw = tmp_path_factory.mktemp("edit"), preset("tiny"), np.random.default_rng(0)
    params = {
        part: jax.tree.map(lambda x: 0.3 * draw.normal(size=x.shape), abstract_params(tiny, part)) for part in PARTS
    }
    save_folder(folder / "tiny", tiny, params, sampling=SamplingConfig(guidance=1.0))
    shutil.copytree(folder / "tiny", folder / "damaged")
    weights = folder / "damaged" / "transformer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    Image.fromarray(draw.integers(0, 256, (16, 24, 3), np.uint8)).save(folder / "in.png")
    (folder / "text.png").write_text("hello")
    return folder


@pytest.fixture(scope="module")
def answers(folder, run_program) -> dict[str, tuple[int, str, str]]:
    cases = EDITS | {name: changes for name, (changes, _) in MISTAKES.items()}
    return run_program("edit", {name: line(folder, changes) for name, changes in cases.items()})


def output(folder: pathlib.Path, name: str) -> np.ndarray:
    with Image.open(folder / EDITS[name]["output"]) as picture:
        return np.array(picture)


@pytest.mark.parametrize("name", EDITS)
def test_writes_a_picture_of_the_size_of_its_source(answers, folder, name):
    assert answers[name] == (0, f"{folder / EDITS[name]['output']}: 24 x 16 px\n", "")
    assert output(folder, name).shape == (16, 24, 3)


def test_seed_and_sampling_decide_the_result(answers, folder):
    plain = output(folder, "plain").astype(int)
    np.testing.assert_array_equal(output(folder, "same seed"), plain)
    for name in ("other seed", "greedy"):  # beyond what JPEG and WebP change
        assert np.abs(output(folder, name) - plain).mean() > 10


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(answers, folder, name):
    code, out, err = answers[name]
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert MISTAKES[name][1] in err
    assert not list(folder.rglob("x.*"))
