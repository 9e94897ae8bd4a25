"""The editing program from end to end on a tiny directory of random weights, and its answers to mistakes."""

import pathlib
import shutil
from collections.abc import Mapping

import jax
import numpy as np
import pytest
from PIL import Image

from tests.emulators import create_bucket, gs_server
from varedit_jax.config import SamplingConfig, preset
from varedit_jax.images import read_image
from varedit_jax.parameters import abstract_params
from varedit_jax.storage import files
from varedit_jax.storage.paths import resolve
from varedit_jax.weights.directory import PARTS, save_weights

__all__ = ["gs_server"]

pytestmark = pytest.mark.subprocess

# What is left out of a case is as here; names are in one directory.
USUAL = {"checkpoint": "tiny", "image": "in.png", "instruction": "add a red circle", "output": "x.png"}

EDITS = {
    "plain": {"output": "plain.png"},
    "same seed": {"output": "same.png", "seed": "0"},
    "other seed": {"output": "other.jpg", "seed": "1"},
    "greedy": {"output": "greedy.webp", "greedy": "true"},
    "by scale": {"output": "scales.png", "guidance": "1.5,1.5,1", "temperature": "1,0.5", "dtype": "bfloat16"},
    "parent": {"checkpoint": "none/../tiny", "image": "tiny/../in.png", "output": "tiny/../parent.png"},
}

MISTAKES = {
    "no image": ({"image": "none.png"}, "there is no image"),
    "not an image": ({"image": "text.png"}, "text.png is not an image of a known kind"),
    "kind of output": ({"output": "x.docx"}, "cannot tell the kind of image from the name"),
    "scheme of output": ({"output": "hdfs://x.png"}, "'hdfs://x.png' has the scheme hdfs://"),
    "name of output": ({"output": f"{'x' * 256}.png"}, "the path has a name of 260 bytes"),
    "directory of output": ({"output": "none/x.png"}, "does not exist; create it first"),
    "no instruction": ({"instruction": " "}, "the instruction ' ' is empty"),
    "flag left out": ({"instruction": None}, "--instruction is missing; see --help"),
    "no checkpoint": ({"checkpoint": "none"}, "none is not the directory of a run"),
    "damaged checkpoint": ({"checkpoint": "damaged"}, "transformer.safetensors is damaged"),
    "seed": ({"seed": "-1"}, "flag --seed=-1"),
    "temperature": ({"temperature": "0"}, "sampling.temperature is 0; it must be above 0"),
    "nothing to verify by": ({"verify": "true"}, "tiny has no manifest.json: there is nothing to verify it by"),
    "guidance": ({"guidance": "nan"}, "--guidance is 'nan'; it must be a number or"),
    "guidance of too many scales": ({"guidance": "4,3,2,1"}, "(4, 3, 2, 1) is not a list of 1 to 3 finite numbers"),
    "aspect": ({"aspect": "wide"}, "the aspect 'wide' is none; give square, auto, or one of 1.0, 1.25"),
    "type": ({"dtype": "float8"}, "flag --dtype=float8"),
    "EMA of a directory": ({"weights": "ema"}, "tiny holds no EMA of its parameters"),
    "step of a directory": ({"step": "3"}, "tiny is a directory of weights, which has no checkpoint of step 3"),
}


def line(directory: pathlib.Path, changes: Mapping[str, str | None]) -> list[str]:
    values = USUAL | changes
    paths = {
        name: values[name] if "://" in values[name] else directory / values[name]
        for name in ("checkpoint", "image", "output")
    }
    return [f"--{name}={value}" for name, value in (values | paths).items() if value is not None]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> pathlib.Path:
    """Weights, an image, and things that are neither."""
    directory, tiny, draw = tmp_path_factory.mktemp("edit"), preset("tiny"), np.random.default_rng(0)
    params = {
        part: jax.tree.map(lambda x: 0.3 * draw.normal(size=x.shape), abstract_params(tiny, part)) for part in PARTS
    }
    save_weights(directory / "tiny", tiny, params, sampling=SamplingConfig(guidance=1.0))
    shutil.copytree(directory / "tiny", directory / "damaged")
    weights = directory / "damaged" / "transformer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    Image.fromarray(draw.integers(0, 256, (16, 24, 3), np.uint8)).save(directory / "in.png")
    (directory / "text.png").write_text("hello")
    return directory


@pytest.fixture(scope="module")
def bucket(directory, gs_server) -> str:
    """The weights and the image."""
    bucket = create_bucket("gs")
    files.upload(directory / "tiny", resolve(f"{bucket}/tiny"))
    files.copy(directory / "in.png", resolve(f"{bucket}/in.png"))
    return bucket


@pytest.fixture(scope="module")
def answers(directory, bucket, run_program) -> dict[str, tuple[int, str, str]]:
    cases = EDITS | {name: changes for name, (changes, _) in MISTAKES.items()}
    cases["bucket"] = {name: f"{bucket}/{USUAL[name]}" for name in ("checkpoint", "image", "output")}
    return run_program("edit", {name: line(directory, changes) for name, changes in cases.items()})


def output(directory: pathlib.Path, name: str) -> np.ndarray:
    with Image.open(directory / EDITS[name]["output"]) as image:
        return np.array(image)


@pytest.mark.parametrize("name", EDITS)
def test_writes_an_image_of_the_size_of_its_source(answers, directory, name):
    assert answers[name] == (0, f"{directory / EDITS[name]['output']}: 24 x 16 px\n", "")
    assert output(directory, name).shape == (16, 24, 3)


def test_seed_and_sampling_decide_the_result(answers, directory):
    plain = output(directory, "plain").astype(int)
    np.testing.assert_array_equal(output(directory, "same seed"), plain)
    for name in ("other seed", "greedy"):  # beyond what JPEG and WebP change
        assert np.abs(output(directory, name) - plain).mean() > 10


def test_weights_and_images_in_a_bucket(answers, directory, bucket):
    """The same result as from this disk."""
    assert answers["bucket"] == (0, f"{bucket}/x.png: 24 x 16 px\n", "")
    np.testing.assert_array_equal(read_image(f"{bucket}/x.png"), output(directory, "plain"))
    np.testing.assert_array_equal(output(directory, "parent"), output(directory, "plain"))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(answers, directory, name):
    code, out, err = answers[name]
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert MISTAKES[name][1] in err
    assert not list(directory.rglob("x.*"))
