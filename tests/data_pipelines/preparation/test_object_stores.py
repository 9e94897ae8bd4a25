"""Preparing from and to object stores: the same bytes as on a disk, complete or not there, and resumed."""

import importlib.util
import pathlib

import pytest

from data_pipelines.preparation.pipeline import prepare
from data_pipelines.preparation.settings import Settings
from tests.data_pipelines.preparation.corpus import SETTINGS, write_corpus
from varedit_jax.errors import UserError
from varedit_jax.storage import files
from varedit_jax.storage.paths import files_below, resolve

OPTIONS = {"dataset": "made"}


@pytest.fixture
def inputs(gs_bucket: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lists in a bucket, which are also below the working directory."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "in", lists=2)
    files.upload(tmp_path / "in", resolve(f"{gs_bucket}/in"))
    return [f"{gs_bucket}/in"]


def _contents(directory: pathlib.Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files_below(directory)}


def test_a_bucket_gives_and_gets_the_same_bytes_as_a_disk(
    inputs: list[str], gs_bucket: str, tmp_path: pathlib.Path
) -> None:
    output = f"{gs_bucket}/deep/er/../data"
    counts = prepare("manifest", inputs, output, SETTINGS, source_options=OPTIONS)
    expected = prepare("manifest", ["in"], "sub/../out", SETTINGS, source_options=OPTIONS)
    assert counts == expected
    assert _contents(resolve(f"{gs_bucket}/deep/data")) == _contents(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]  # neither staging nor "gs:"
    with pytest.raises(UserError, match=r"gs://.*/deep/data exists; give a new directory"):
        prepare("manifest", inputs, output, SETTINGS, source_options=OPTIONS)


def test_an_upload_that_was_ended_is_not_there_and_resumes(
    inputs: list[str], gs_bucket: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []
    copy_file, limit = files.copy, 5

    def copy(source: pathlib.Path, target: pathlib.Path) -> None:
        if len(copied) == limit:
            raise ConnectionResetError(104, "Connection reset by peer")
        copy_file(source, target)
        copied.append(str(target))

    monkeypatch.setattr(files, "copy", copy)
    output = resolve(f"{gs_bucket}/data")
    with pytest.raises(UserError, match="writing the data set failed in gs://.*: Connection reset by peer; put that"):
        prepare("manifest", inputs, output, SETTINGS, source_options=OPTIONS)
    assert not files.exists(output) and len(copied) == 5
    limit = -1
    prepare("manifest", inputs, output, SETTINGS, source_options=OPTIONS)
    prepare("manifest", inputs, "out", SETTINGS, source_options=OPTIONS)
    assert files.exists(output) and _contents(output) == _contents(tmp_path / "out")
    assert len(copied) == len(set(copied)) == len(_contents(output))  # nothing was uploaded twice


def test_without_the_extra_a_bucket_is_one_sentence_and_no_directory(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "in", lists=1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^gs://b/out needs the package gcsfs; install it with pip install "):
        prepare("manifest", ["in"], "gs://b/out", SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_staging_directory_can_be_chosen_and_is_local(
    inputs: list[str], gs_bucket: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="the staging directory is gs://.*, but it has to be on a local disk"):
        prepare("manifest", inputs, "out", SETTINGS, staging_directory=f"{gs_bucket}/staging")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match="nothing is left"):
        prepare("manifest", inputs, f"{gs_bucket}/data", Settings(min_side=1000), staging_directory="~/staging")
    assert (tmp_path / "home" / "staging" / "job.json").exists()
