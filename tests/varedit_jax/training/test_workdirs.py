"""Runs in an object store: killed and resumed, they equal a run on the local disk, bit for bit."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from tests.emulators import gs_bucket, gs_server, s3_bucket, s3_server
from tests.varedit_jax.training.runs import Outcome, Run, assert_same, assert_same_outcome, every, outcome
from varedit_jax.errors import UserError
from varedit_jax.storage.paths import child_names, files_below, resolve, size
from varedit_jax.training.goodput import read_goodput
from varedit_jax.training.metrics import read_metrics
from varedit_jax.training.replay import read_inputs
from varedit_jax.weights.run_directory import checkpoint_steps, read_config

__all__ = ["gs_bucket", "gs_server", "s3_bucket", "s3_server"]

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]

KILLED = """
import os, sys, time
import jax
from tests.varedit_jax.training.runs import Run, step_fn
from varedit_jax.weights.run_directory import checkpoint_steps

def killed(state, batch, key):
    if int(jax.device_get(state.step)) == 8:
        while not checkpoint_steps(sys.argv[1]):  # written in the background
            time.sleep(0.1)
        os.kill(os.getpid(), 9)
    return step_fn(state, batch, key)

Run(sys.argv[1], step_fn=killed)()
"""


@pytest.fixture(params=["gs", "s3"])
def bucket(request: pytest.FixtureRequest) -> str:
    """URL of an empty bucket of each kind."""
    return str(request.getfixturevalue(f"{request.param}_bucket"))


def test_killed_and_resumed_equals_a_run_on_this_disk(
    whole: Outcome, bucket: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = f"{bucket}/runs/8b 50%#1"
    done = subprocess.run([sys.executable, "-c", KILLED, workdir], check=False, capture_output=True, cwd=os.getcwd())
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert checkpoint_steps(workdir) == [5]
    with pytest.raises(UserError, match=r"is in use by process \d+ on "):
        Run(workdir)()  # its lease has not expired
    lease = resolve(workdir) / "lock"
    lease.write_text(json.dumps(json.loads(lease.read_text()) | {"renewed": 0.0}))  # as if long ago
    monkeypatch.chdir(tmp_path)
    run = Run(workdir)
    assert_same_outcome(outcome(run, *run()), whole)
    assert checkpoint_steps(workdir) == [10, 12]
    assert read_config(workdir)["model"] == {"width": 300}
    assert [moment.step for moment in read_goodput(workdir)][-1] == 12
    names = child_names(resolve(workdir))
    assert {"checkpoints", "config.json", "goodput.jsonl", "metrics.jsonl", "saved.json"} < set(names)
    assert len([name for name in names if name.startswith("events.")]) == 2 and "lock" not in names
    assert list(tmp_path.iterdir()) == []  # no directory named gs: or s3:


def test_what_a_run_leaves_beside_its_checkpoints(gs_bucket: str) -> None:
    """Samples, a profile, a dumped step, and checkpoints by the retention settings."""
    workdir = f"{gs_bucket}/run"
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    run = Run(workdir, steps=4, cadence=every(log_every=1, sample_every=2, save_every=1, keep_checkpoints=2))
    state, _ = run(sample=lambda *_: {"sheet": image}, profile_steps=(1, 2), dump_step=3)
    assert checkpoint_steps(workdir) == [3, 4]
    assert_same(run.latest(), state)
    samples = resolve(workdir) / "samples"
    assert child_names(samples) == [f"sheet_{step:07d}.png" for step in (0, 2, 4)]
    with (samples / "sheet_0000002.png").open("rb") as file:
        np.testing.assert_array_equal(np.asarray(PIL.Image.open(file)), image)
    step, batch, _ = read_inputs(resolve(workdir) / "replay" / "step_3")
    assert step == 3 and batch["x"].shape == (8, 300)
    assert child_names(resolve(workdir) / "profile")
    assert [line["step"] for line in read_metrics(workdir) if "loss" in line] == [0, 1, 2, 3]
    assert json.loads((resolve(workdir) / "saved.json").read_text())["step"] == 4


@pytest.mark.parametrize("name", ["runs [v2]/8b", "[x]"])
def test_a_directory_whose_checkpoints_could_not_be_read_is_refused_before_the_first_step(
    name: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(UserError, match=r"has a \[ in its name, and checkpoints there could not be read"):
        Run(tmp_path / name)()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["run#1", "50%20off", "what?", "100%", "a|b", "画 é", "a*b"])
def test_odd_names_work_to_the_end(name: str, tmp_path: pathlib.Path) -> None:
    run = Run(tmp_path / name, steps=3, cadence=every(log_every=1, save_every=2))
    run(stop_after=2)
    state, _ = run()
    assert_same(run.latest(), state)


@pytest.mark.parametrize("name", ["n" * 256, os.fsdecode(b"\xff"), "a\0b"])
def test_names_that_cannot_be_are_one_sentence(name: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError) as refused:
        Run(f"{tmp_path}/{name}")()
    assert "\n" not in str(refused.value) and list(tmp_path.iterdir()) == []


def test_relative_work_directories_are_those_of_the_start(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    Run("../run", steps=2, cadence=every(save_every=1))()
    assert checkpoint_steps(tmp_path / "run") == [1, 2] and checkpoint_steps("../run") == [1, 2]


def test_a_damaged_checkpoint_in_a_bucket(gs_bucket: str) -> None:
    """It is kept, whole, under another name, and the run goes back to the one before."""
    run = Run(f"{gs_bucket}/damaged", steps=4, cadence=every(save_every=2))
    run()
    root = resolve(run.workdir)
    files = [path for path in files_below(root / "checkpoints" / "4" / "state") if "/d/" in str(path)]
    path = max(files, key=size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    there = len(list(files_below(root / "checkpoints" / "4")))
    run(stop_after=1)
    assert checkpoint_steps(run.workdir) == [2, 3]
    assert len(list(files_below(root / "damaged" / "4"))) == there
