"""What a search leaves out is said when a job starts, and stands in its report."""

import json
import pathlib

import pytest

from data_pipelines.preparation.pipeline import prepare
from data_pipelines.preparation.settings import Settings
from tests.data_pipelines.preparation.corpus import jpeg, photo
from tests.data_pipelines.sources.layouts import table
from varedit_jax.errors import UserError
from varedit_jax.storage.jsonl import read_lines


def _download(directory: pathlib.Path) -> None:
    """Two of three training tables, one for validation, and one that is a Git LFS pointer."""
    for number, name in enumerate(("train-00000-of-00003", "train-00001-of-00003", "dev-00000-of-00001")):
        images = {side: jpeg(photo(2 * number + i)) for i, side in enumerate(("source", "target"))}
        table(directory / f"{name}.parquet", [images | {"instruction": ("make it foggy", "add a 图")[number % 2]}])
    (directory / "b.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 44\n")


def _prepare(directory: pathlib.Path, name: str, *splits: str) -> tuple[list[str], dict, dict[str, str]]:
    said: list[str] = []
    settings, output = Settings(validation=0.0), directory / name
    prepare("table", [str(directory / "in")], output, settings, splits=splits, say=said.append)
    [counts] = json.loads((output / "report" / "report.json").read_text()).values()
    left = {line["id"]: line["reason"] for line in read_lines(output / "report" / "quarantine.jsonl")}
    return [sentence for sentence in said if sentence.startswith("left out")], counts, left


def test_what_is_left_out_is_said_and_counted(tmp_path: pathlib.Path) -> None:
    _download(tmp_path / "in")
    said, counts, left = _prepare(tmp_path, "out", "train")
    assert said == [
        "left out, another split: dev-00000-of-00001.parquet (validation; --splits=train,validation takes it)",
        "left out, file not there: train-*-of-00003.parquet (1 of 3 files are missing: 00002; download them), "
        "b.parquet (is a Git LFS pointer, not the file: run git lfs pull)",
    ]
    assert counts == {
        "read": 5, "train": 2, "validation": 0, "partly unknown instruction": 1,
        "left": {"file not there": 2, "another split": 1},
    }  # fmt: skip
    assert left.keys() == {"dev-00000-of-00001.parquet", "train-*-of-00003.parquet", "b.parquet"}
    assert "1 have a partly unknown instruction" in (tmp_path / "out" / "report" / "report.md").read_text()


def test_splits_that_are_asked_for_are_taken(tmp_path: pathlib.Path) -> None:
    _download(tmp_path / "in")
    assert _prepare(tmp_path, "dev", "validation")[1] == {
        "read": 4, "train": 1, "validation": 0, "left": {"file not there": 1, "another split": 2}
    }  # fmt: skip
    said, counts, _ = _prepare(tmp_path, "all", "all")
    assert counts["train"] == 3 and len(said) == 1
    with pytest.raises(UserError, match="there is no split 'tset'"):
        _prepare(tmp_path, "none", "tset")
