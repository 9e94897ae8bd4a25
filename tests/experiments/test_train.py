"""The real training program: stopped and resumed equals uninterrupted, bit for bit; export; a user's mistakes."""

import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from data_pipelines.shapes.edits import KINDS
from tests.experiments.conftest import Answer
from varedit_jax.config import RunConfig, from_dict
from varedit_jax.conversion import convert
from varedit_jax.errors import TEMPORARY
from varedit_jax.training import setup
from varedit_jax.training.metrics import read_metrics
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.state import make_init
from varedit_jax.weights import names, run_directory
from varedit_jax.weights.export_source import open_source

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "experiments/configs/shapes.py:tiny"


def _train(*arguments: str, module: str = "experiments.train") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"--config.data.directory={tmp_path_factory.mktemp('data')}"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, data: str) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("runs")
    done = _train(
        f"--config={CONFIG}",
        data,
        f"--workdir={directory / 'run'}",
        f"--export={directory / 'weights'}",
        "--export_type=float32",
    )
    assert done.returncode == 0, done.stderr
    return directory


def test_stopped_and_resumed_equals_uninterrupted(uninterrupted: pathlib.Path, data: str) -> None:
    common = (
        f"--config={CONFIG}",
        data,
        f"--workdir={uninterrupted / 'resumed'}",
        f"--export={uninterrupted / 'resumed_weights'}",
        "--export_type=float32",
    )
    first = _train(*common, "--stop_after=2")
    assert first.returncode == 0, first.stderr
    assert not (uninterrupted / "resumed_weights").exists()
    second = _train(*common)
    assert second.returncode == 0, second.stderr
    for part in ("transformer", "text", "tokenizer"):
        one, other = (
            safetensors.numpy.load_file(uninterrupted / directory / f"{part}.safetensors")
            for directory in ("weights", "resumed_weights")
        )
        assert set(one) == set(other)
        assert all(np.array_equal(one[name], other[name]) for name in one)
    losses = [
        [(line["step"], line["loss"]) for line in read_metrics(uninterrupted / directory) if "loss" in line]
        for directory in ("run", "resumed")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) > 0


def test_a_run_evaluates_by_kind_and_samples_its_ema_too(tmp_path: pathlib.Path, data: str) -> None:
    """In microbatches; nothing happens at step 0."""
    done = _train(
        f"--config={CONFIG}",
        data,
        f"--workdir={tmp_path}",
        *("--config.steps=4", "--config.cadence.eval_every=2", "--config.cadence.sample_every=4"),
        *("--config.optimizer.ema_decay=0.5", "--config.optimizer.accumulation=2", "--config.stages=()"),
    )
    assert done.returncode == 0, done.stderr
    lines = {line["step"]: line for line in read_metrics(tmp_path) if "eval/loss" in line}
    assert sorted(lines) == [2, 4]
    for line in lines.values():
        assert line["eval/loss"] != line["eval_ema/loss"]
        for group in ("eval", "eval_ema"):
            names_of_kinds = [name.rpartition("/")[2] for name in line if name.startswith(f"{group}/loss_by_kind/")]
            losses = [line[f"{group}/loss_by_kind/{kind}"] for kind in names_of_kinds]
            assert set(names_of_kinds) <= set(KINDS) and len(names_of_kinds) > 1
            assert min(losses) <= line[f"{group}/loss"] <= max(losses)
            assert all(f"{group}/bit_accuracy_by_kind/{kind}" in line for kind in names_of_kinds)
    sheets = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert sheets == ["held_out_0000004.png", "held_out_ema_0000004.png"]


def test_exported_directory_names_its_model(uninterrupted: pathlib.Path) -> None:
    record = json.loads((uninterrupted / "weights" / "config.json").read_text())
    assert record["model"]["transformer"]["depth"] == 4
    assert record["sampling"]["greedy"] is True


def test_a_run_can_be_started_from_and_exported(uninterrupted: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A second stage starts from a run's directory; `convert` makes the same weights of it as --export."""
    directory = uninterrupted / "run"
    run = dataclasses.replace(from_dict(RunConfig, run_directory.read_config(directory)), init_from=str(directory))
    abstract = jax.eval_shape(make_init(run, make_optimizer(run.optimizer, run.steps)))
    state = setup.start(run, abstract, lambda: jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), abstract))
    convert.to_directory(open_source(directory), tmp_path / "shared", license="mit", quiet=True)
    assert convert.verify(tmp_path / "shared") > 0
    for part in ("transformer", "text"):
        exported = safetensors.numpy.load_file(uninterrupted / "weights" / f"{part}.safetensors")
        converted = safetensors.numpy.load_file(tmp_path / "shared" / f"{part}.safetensors")
        started = names.flat(state.params[part])
        assert set(exported) == set(converted) == set(started)
        for name, tensor in exported.items():
            np.testing.assert_array_equal(converted[name], tensor)
            np.testing.assert_array_equal(started[name], tensor)
    card = (tmp_path / "shared" / "README.md").read_text()
    assert f"| step | {run.steps} of {run.steps} |" in card and "license: mit" in card


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.tokenizer_weights=nowhere"], ["nowhere", "tokenizer"]),
        (["--config.optimizer.learning_rat=1"], ["learning_rat", "learning_rate"]),
        (["--config.model.transformer.depth=5"], ["depth", "4", "5"]),
        (["--config.stages=((2, 5),)"], ["((2, 5),)", "4 scales"]),
    ],
)
def test_a_mistake_is_one_sentence(
    uninterrupted: pathlib.Path, data: str, arguments: list[str], words: list[str]
) -> None:
    workdir = uninterrupted / ("run" if "depth" in arguments[0] else "fresh")
    failed = _train(f"--config={CONFIG}", data, f"--workdir={workdir}", *arguments)
    assert failed.returncode == 1
    lines = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, failed.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert "Traceback" not in failed.stderr


def test_tokenizer_program_trains_and_exports(tmp_path: pathlib.Path, data: str) -> None:
    done = _train(
        "--config=experiments/configs/shapes.py:tokenizer_tiny",
        data,
        f"--workdir={tmp_path / 'run'}",
        f"--export={tmp_path / 'weights'}",
        module="experiments.train_tokenizer",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "weights" / "tokenizer.safetensors").is_file()
    assert read_metrics(tmp_path / "run")[-1]["step"] == 3


def test_weights_that_do_not_come_end_the_run(
    tmp_path: pathlib.Path, run_program: Callable[..., dict[str, Answer]]
) -> None:
    """The watchdog covers the start, with the limit of what takes long; two hours pass by its clock alone."""
    setup = """
import threading, time, types
from varedit_jax.training import watchdog

def where_it_hangs(run):
    watchdog.time = types.SimpleNamespace(monotonic=lambda: time.monotonic() + 3 * 3600)
    threading.Event().wait()

module.loader.open_examples = lambda *_: None
module.MeshRun.load_frozen = where_it_hangs
"""
    flags = [f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", "--config.guard.hang_minutes=0.1"]
    code, out, err = run_program("train", {"hangs": flags}, setup)["hangs"]
    assert (code, out) == (TEMPORARY, "")
    (file,) = (tmp_path / "run").glob("hang_*.txt")
    for text in (err, file.read_text()):
        assert "minutes (guard.long_minutes is 120) while starting; the stacks of all threads are in" in text
        assert "in where_it_hangs" in text
