"""The training program on a mesh: a run that resumes on another mesh, with its data iterator; a repeated step."""

import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from varedit_jax.training.checkpoint import data_place
from varedit_jax.training.metrics import read_metrics
from varedit_jax.weights.run_directory import checkpoint_steps

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]

ROOT = pathlib.Path(__file__).parents[2]
# Two scales alone, which compile quickly.
COMMON = ("--config=experiments/configs/shapes.py:tiny", "--config.stages=((5, 2),)", "--config.cadence.save_every=2")
MESH = ("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
FOUR = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"


def train(directory: pathlib.Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the program, which must succeed."""
    command = [sys.executable, "-m", "experiments.train", *COMMON, f"--config.data.directory={directory / 'data'}"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory with a run of four steps on one device, `alone`."""
    directory = tmp_path_factory.mktemp("runs")
    train(directory, f"--workdir={directory / 'alone'}", "--stop_after=4", "--dump_step=2")
    return directory


def test_a_run_changes_its_mesh(alone: pathlib.Path) -> None:
    """Three steps on fsdp 2 x tensor 2, the fourth on one device: the losses of a run on one, to float32 rounding."""
    moved = alone / "moved"
    train(alone, f"--workdir={moved}", *MESH, "--stop_after=3", "--resume=no", XLA_FLAGS=FOUR)
    resumed = train(alone, f"--workdir={moved}", "--stop_after=1", "--resume=yes")
    assert "resuming from the checkpoint of step 3" in resumed.stderr
    assert checkpoint_steps(moved)[-1] == checkpoint_steps(alone / "alone")[-1] == 4
    ours, whole = ([line["loss"] for line in read_metrics(run)] for run in (moved, alone / "alone"))
    assert len(ours) == len(whole) == 4
    np.testing.assert_allclose(ours, whole, rtol=2e-5)
    assert data_place(moved, 4) == data_place(alone / "alone", 4)


def test_what_a_run_says_of_its_speed(alone: pathlib.Path) -> None:
    for line in read_metrics(alone / "alone"):
        assert line["time/tflops_per_chip"] > 0 and line["time/tokens_per_second"] > 0


def test_a_repeated_step_has_the_metrics_of_the_run(alone: pathlib.Path) -> None:
    run = alone / "alone"
    done = train(alone, f"--workdir={run}", f"--replay={run / 'replay/step_2'}")
    assert "replaying step 2 from the state before it" in done.stderr and "its examples are " in done.stderr
    again = json.loads(done.stdout)
    [line] = [line for line in read_metrics(run) if line["step"] == 2]
    assert all(line[name] == value for name, value in again.items())
    assert math.isfinite(again["loss"]) and again["skipped"] == 0
