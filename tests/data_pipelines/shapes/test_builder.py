"""The TFDS data set `shapes`: what is stored, where, and how it depends on the seed and the sizes."""

import hashlib
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines.shapes import builder as builder_lib
from data_pipelines.shapes import edits
from data_pipelines.shapes.builder import Shapes, example_edit
from data_pipelines.shapes.scene import Scene, render
from varedit_jax.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Shapes:
    builder = Shapes(data_dir=tmp_path_factory.mktemp("shapes"), train_examples=24, test_examples=10)
    builder.download_and_prepare()
    return builder


def test_examples_are_those_that_the_shipped_editor_learned_and_was_judged_on() -> None:
    """Words, scenes and their order; another wording would be another data set, and its scores no longer comparable."""
    digest = hashlib.sha256()
    for edit in (example_edit(0, split, index) for split in ("train", "test") for index in range(400)):
        digest.update(f"{edit.kind}|{edit.instruction}|{edit.source.encode()}|{edit.target.encode()}\n".encode())
    assert digest.hexdigest().startswith("a36d23997bbe1345")


@pytest.mark.parametrize(("split", "count"), [("train", 24), ("test", 10)])
def test_stored_examples_are_the_edits_in_their_order(prepared: Shapes, split: str, count: int) -> None:
    source = prepared.as_data_source(split)
    assert len(source) == count
    for index, record in enumerate(source):
        edit = example_edit(0, split, index)
        assert set(record) == set(prepared.info.features)
        assert record["instruction"].decode() == edit.instruction
        assert record["kind"].decode() == edit.kind
        assert record["example_id"].decode() == f"{split}-0-{index}"
        assert record["novelty"].decode() == edits.novelty_of(edit)
        for side, scene in (("source", edit.source), ("target", edit.target)):
            assert Scene.decode(record[f"{side}_scene"].decode()) == scene
            np.testing.assert_array_equal(record[side], render(scene))


def test_the_test_split_is_held_out_scenes_and_a_tenth_combinations() -> None:
    novelties = [edits.novelty_of(example_edit(0, "test", index)) for index in range(20)]
    assert novelties == (["scene"] * 9 + ["combination"]) * 2
    assert {edits.novelty_of(example_edit(0, "train", index)) for index in range(50)} == {"train"}


def test_an_example_depends_on_seed_split_and_index_alone() -> None:
    assert example_edit(0, "train", 7) == example_edit(0, "train", 7)
    others = [example_edit(1, "train", 7), example_edit(0, "train", 8), example_edit(0, "test", 7)]
    assert example_edit(0, "train", 7) not in others


def test_sizes_and_seed_have_their_own_directories(prepared: Shapes, tmp_path: pathlib.Path) -> None:
    directories = {
        Shapes(data_dir=tmp_path, train_examples=train, test_examples=test, seed=seed).data_dir
        for train, test, seed in ((24, 10, 0), (25, 10, 0), (24, 11, 0), (24, 10, 1))
    }
    assert len(directories) == 4
    modified = pathlib.Path(prepared.data_dir).stat().st_mtime_ns
    prepared.download_and_prepare()
    assert pathlib.Path(prepared.data_dir).stat().st_mtime_ns == modified  # prepared once


@pytest.mark.parametrize("sizes", [{"train_examples": 0}, {"test_examples": -1}, {"seed": -1}])
def test_impossible_sizes_are_refused(tmp_path: pathlib.Path, sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match="cannot be made"):
        Shapes(data_dir=tmp_path, **sizes)


@pytest.mark.subprocess
def test_preparing_and_reading_need_no_tensorflow(tmp_path: pathlib.Path) -> None:
    program = f"""
import sys
from data_pipelines.shapes.builder import Shapes
builder = Shapes(data_dir={str(tmp_path)!r}, train_examples=2, test_examples=2)
builder.download_and_prepare()
assert builder.as_data_source("train")[1]["source"].shape == (32, 32, 3)
assert "tensorflow" not in sys.modules
"""
    root = pathlib.Path(builder_lib.__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root, capture_output=True, timeout=120)
