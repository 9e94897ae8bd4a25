"""From files on disk to a trained editor: prepare and train, on batches of several aspects with damage in them."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_pipelines.bad_records import check_split
from varedit_jax.config import EditorConfig
from varedit_jax.scales import editor_pyramid
from varedit_jax.storage.jsonl import read_lines
from varedit_jax.training.flops import example_flops
from varedit_jax.training.goodput import read_goodput
from varedit_jax.training.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]

ROOT = pathlib.Path(__file__).parents[2]
SIZES = ((128, 128), (128, 86))  # pixels, width and height: of templates 1.0 and 0.666
MODEL = EditorConfig(pixel_budget="0.06M")
COUNT = 24
BAD = 5  # its target ends early


def _run(module: str, *arguments: str, code: int = 0) -> str:
    """Runs a program without compiler optimizations, which ends with `code`; returns its output."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Prepares a data set from a list of images by the users' program, without inspecting every image."""
    directory = tmp_path_factory.mktemp("files")
    draw = np.random.default_rng(0)
    lines = []
    for number in range(COUNT):
        line = {"id": str(number), "instruction": f"make it number {number}"}
        for side in ("source", "target"):
            path = directory / f"{number}_{side}.jpg"
            few = Image.fromarray(draw.integers(0, 256, (4, 4, 3), np.uint8))
            few.resize(SIZES[number % 2]).save(path, quality=95)
            line[side] = path.name
        lines.append(json.dumps(line))
    (directory / "list.jsonl").write_text("\n".join(lines))
    bad = directory / f"{BAD}_target.jpg"
    bad.write_bytes(bad.read_bytes()[:-600])
    output = directory / "data" / "mine"
    _run(
        "data_pipelines.prepare",
        *("--source=manifest", f"--input={directory / 'list.jsonl'}", f"--output={output}"),
        *("--validation=0.2", "--nodecode"),
    )
    return output


def _training(prepared: pathlib.Path, workdir: pathlib.Path, steps: int) -> tuple[str, ...]:
    """The command that trains on a data set."""
    return (
        "experiments.train",
        "--config=experiments/configs/varedit_2b_256.py:tiny",
        f"--workdir={workdir}",
        "--config.data.name=records",
        f"--config.data.directory={prepared.parent}",
        f'--config.data.mixture=(("{prepared.name}",1.0),)',
        '--config.data.aspects=("1.0","0.666")',
        "--config.data.batch_size=4",
        *("--config.model.grids=()", "--config.model.position_scale=1", "--config.model.pixel_budget=0.06M"),
        f"--config.steps={steps}",
        *("--config.cadence.log_every=1", "--config.cadence.eval_every=0", "--config.cadence.sample_every=0"),
    )


def test_records_train_an_editor_of_several_aspects(prepared: pathlib.Path, tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "run"
    _run(*_training(prepared, workdir, steps=6), "--config.data.bad_share=0.1")
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(6))
    assert all(np.isfinite(line["loss"]) for line in lines)
    tokens = {round(line["time/tokens_per_second"] / line["time/examples_per_second"]) for line in lines}
    assert tokens == {example_flops(MODEL, editor_pyramid(MODEL, aspect), 32).tokens for aspect in ("1.0", "0.666")}
    assert lines[-1]["data/bad/cut_short"] == 1
    bad = workdir / "quarantine" / "process_0.jsonl"
    assert [line["id"] for line in read_lines(bad)] == [str(BAD)]
    assert read_goodput(workdir)[-1].step == 6


def test_what_a_check_finds_is_applied_to_a_running_run(prepared: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """It is refused without the flag, and recorded with it; workers and the tolerated share change on the way."""
    data, workdir = tmp_path / "data" / prepared.name, tmp_path / "run"
    shutil.copytree(prepared, data)
    command = _training(data, workdir, steps=2)
    _run(*command, "--stop_after=1", "--config.data.bad_share=0.1")
    assert check_split(data, "train") == {"cut short": 1}
    command = (*command, "--config.data.bad_share=0", "--config.data.workers=1")
    refused = _run(*command, code=1)
    assert "error: 1 examples of the split 'train'" in refused and "--apply_bad_records" in refused
    done = _run(*command, "--apply_bad_records")
    assert "from step 1 on, 1 more and 0 fewer examples of the split 'train' are left out" in done
    record = json.loads((workdir / "left_out.json").read_text())
    assert [line["from_step"] for line in record["train"]] == [0, 1] and len(record["test"]) == 1
    assert read_metrics(workdir)[-1]["step"] == 1
