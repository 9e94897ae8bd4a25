"""The parity program on corrupted copies of a golden directory: exit code 1 and one sentence."""

import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy

from varedit_jax.weights.reader import read_state_dict

pytestmark = pytest.mark.subprocess

GOLDEN = pathlib.Path(__file__).parents[1] / "data" / "golden" / "mini_a"


def without_tensor(directory: pathlib.Path) -> None:
    tensors = safetensors.numpy.load_file(directory / "golden.safetensors")
    del tensors["infer_bits_03"]
    safetensors.numpy.save_file(tensors, directory / "golden.safetensors")


def without_weight(directory: pathlib.Path) -> None:
    state = {name: np.ascontiguousarray(x) for name, x in read_state_dict(directory / "transformer.pth").items()}
    del state["lvl_embed.weight"]
    (directory / "transformer.pth").unlink()
    safetensors.numpy.save_file(state, directory / "transformer.safetensors")


def cut_short(directory: pathlib.Path) -> None:
    data = (directory / "vae.pth").read_bytes()
    (directory / "vae.pth").write_bytes(data[: len(data) // 2])


def without_field(directory: pathlib.Path) -> None:
    values = json.loads((directory / "config.json").read_text())
    del values["ch_mult"]
    (directory / "config.json").write_text(json.dumps(values))


def without_file(directory: pathlib.Path) -> None:
    (directory / "vae.pth").unlink()


def beyond_tolerance(directory: pathlib.Path) -> None:
    tensors = safetensors.numpy.load_file(directory / "golden.safetensors")
    tensors["train_logits"].flat[17] += 1e-3
    safetensors.numpy.save_file(tensors, directory / "golden.safetensors")


SPOILT: dict[str, tuple[Callable[[pathlib.Path], None], str]] = {
    "missing tensor": (without_tensor, "golden.safetensors has no tensor infer_bits_03"),
    "missing weight": (without_weight, "it lacks (1): lvl_embed.weight"),
    "damaged file": (cut_short, "vae.pth is damaged, cut short"),
    "missing field": (without_field, "config.json has no field 'ch_mult'"),
    "missing file": (without_file, "holds neither vae.pth nor vae.safetensors"),
    "missing directory": (shutil.rmtree, "is not a golden directory: cannot read its config.json"),
    "beyond tolerance": (beyond_tolerance, "1 of 25 tensors are beyond tolerance: train_logits"),
}


@pytest.fixture(scope="module")
def answers(run_program, tmp_path_factory) -> dict[str, tuple[int, str, str]]:
    directory = tmp_path_factory.mktemp("golden")
    for name, (spoil, _) in SPOILT.items():
        shutil.copytree(GOLDEN, directory / name)
        spoil(directory / name)
    return run_program("check_parity", {name: [f"--golden={directory / name}"] for name in SPOILT})


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_directory(answers, name):
    code, _, err = answers[name]
    assert code == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert SPOILT[name][1] in err


def test_table(answers):
    """Every tensor has a line; only the corrupted one is marked."""
    header, *lines = answers["beyond tolerance"][1].splitlines()
    assert header.split() == ["tensor", "largest", "error", "tolerance"]
    assert len(lines) == 25
    marks = {line.split()[0]: line.split()[-1] for line in lines}
    assert [name for name, mark in marks.items() if mark != "ok"] == ["train_logits"]
    assert marks["train_logits"] == "BEYOND"
