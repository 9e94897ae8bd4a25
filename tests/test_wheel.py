"""The wheel has all that the programs need, in any directory: they run from it in an empty one."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from varedit_jax.images import read_image

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("varedit_jax", "data_pipelines", "experiments")
# What libraries would say in the first minute: TFDS's log and bars, libtpu without a TPU, advice to install OpenCV.
NOISE = re.compile(r"(dataset_\w+|writer|image_feature)\.py:|INVALID_ARGUMENT|TPU_|OpenCV|Shuffling|Generating|\d%\|")


class Installed(NamedTuple):
    """The wheel, unpacked in a directory of its own."""

    names: list[str]
    packages: pathlib.Path

    def environment(self) -> dict[str, str]:
        return os.environ | {"PYTHONPATH": str(self.packages)}

    def run(self, directory: pathlib.Path, *command: str) -> str:
        """Returns the output of `python -m ...`, which must succeed."""
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=directory,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout
        assert not NOISE.search(done.stdout), done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    source, built, packages = (tmp_path_factory.mktemp(name) for name in ("source", "built", "packages"))
    for package in PACKAGES:  # a copy, because building leaves files beside the source
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={built}", str(source)], check=True
    )
    [path] = built.iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--no-index", f"--target={packages}", str(path)], check=True)
    return Installed(zipfile.ZipFile(path).namelist(), packages)


def test_it_has_every_file_of_the_packages(wheel: Installed) -> None:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    names = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    assert len(names) > 200
    assert names <= set(wheel.names)
    assert not [name for name in wheel.names if name.startswith("tests/")]


def test_a_data_set_is_prepared(wheel: Installed, tmp_path: pathlib.Path) -> None:
    lines = []
    for index in range(4):
        for side in ("source", "target"):
            noise = np.random.default_rng([index, side == "target"]).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / f"{index}_{side}.png")
        lines.append({"source": f"{index}_source.png", "target": f"{index}_target.png", "instruction": f"draw {index}"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--source=manifest", "--input=pairs.jsonl", "--output=mine", "--validation=0", "--workers=2")
    said = wheel.run(tmp_path, "data_pipelines.prepare", *flags)
    assert "mine: 4 for train" in said
    assert (tmp_path / "mine" / "report" / "report.md").is_file()


def test_an_editor_is_trained_and_edits(wheel: Installed, tmp_path: pathlib.Path) -> None:
    """By a config and weights that come with the wheel; the run names them as any directory understands it."""
    config = (
        "--config=experiments/configs/shapes.py:tiny",
        "--config.stages=((5, 2),)",
        "--config.data.directory=data",
    )
    said = wheel.run(tmp_path, "experiments.train", *config, "--workdir=run", "--stop_after=2")
    assert "making the data set shapes" in said and "features: 128 of 128" in said
    assert json.loads((tmp_path / "run" / "config.json").read_text())["tokenizer_weights"] == "varedit_jax/data/shapes"
    Image.new("RGB", (32, 32), "white").save(tmp_path / "image.png")
    edit = ("--image=image.png", "--instruction=make it dark", "--output=edited.png")
    assert "edited.png: 32 x 32 px" in wheel.run(tmp_path, "experiments.edit", *edit)
    assert read_image(tmp_path / "edited.png").shape == (32, 32, 3)


def test_the_demo_begins_calmly_and_is_interrupted(wheel: Installed, tmp_path: pathlib.Path) -> None:
    """Ctrl-C on a terminal goes to the demo and to the program that it runs."""
    with (tmp_path / "log").open("w") as log:
        demo = subprocess.Popen(
            [sys.executable, "-m", "experiments.demo"],
            cwd=tmp_path,
            env={name: value for name, value in wheel.environment().items() if name != "JAX_PLATFORMS"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        end = time.monotonic() + 300
        while "making the data set" not in (said := (tmp_path / "log").read_text()) and time.monotonic() < end:
            assert demo.poll() is None, said
            time.sleep(0.2)
        os.killpg(demo.pid, signal.SIGINT)
        code = demo.wait(60)
        with pytest.raises(ProcessLookupError):  # the program that it ran has ended, too
            for _ in range(100):
                os.killpg(demo.pid, 0)
                time.sleep(0.1)
            os.killpg(demo.pid, signal.SIGKILL)
    said = (tmp_path / "log").read_text()
    assert code == 130, said
    assert not NOISE.search(said) and "Traceback" not in said, said
    assert "1 of 4: makes the data and trains" in said and "minutes" in said
    assert said.rstrip().endswith("error: interrupted")
