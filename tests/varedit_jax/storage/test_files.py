"""Files and directories appear complete or not at all, on every kind of storage."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from varedit_jax.errors import UserError
from varedit_jax.storage import files
from varedit_jax.storage.paths import child_names, is_remote


def test_a_file_is_replaced(directory: pathlib.Path) -> None:
    files.make_directory(directory)
    for value in ({"a": 1}, {"b": [2]}):
        files.write_json(directory / "x.json", value)
        assert json.loads((directory / "x.json").read_text()) == value
    assert child_names(directory) == ["x.json"]


def test_a_failure_leaves_the_old_file(directory: pathlib.Path) -> None:
    files.make_directory(directory)
    files.write_text(directory / "x", "old")
    with pytest.raises(ZeroDivisionError), files.replacing(directory / "x") as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert (directory / "x").read_text() == "old" and child_names(directory) == ["x"]


def test_a_directory_is_new(directory: pathlib.Path) -> None:
    target = directory / "target"
    with files.new_directory(target) as staging:
        (staging / "deep").mkdir()
        (staging / "deep" / "x").write_text("1")
        assert not files.exists(target)
    assert (target / "deep" / "x").read_text() == "1" and files.is_complete(target)
    assert child_names(target) == ["deep"]
    with (
        pytest.raises(UserError, match="target exists; give a new directory or remove it first"),
        files.new_directory(target),
    ):
        pass


def test_a_directory_that_failed_is_not_there(directory: pathlib.Path) -> None:
    with pytest.raises(ZeroDivisionError), files.new_directory(directory / "target") as staging:
        (staging / "x").write_text("1")
        raise ZeroDivisionError
    assert not files.exists(directory / "target") and child_names(directory) == []


def test_a_directory_can_be_made_in_several_attempts(directory: pathlib.Path) -> None:
    target = directory / "target"
    (files.begin(target) / "x").write_text("1")
    assert not files.exists(target)
    staging = files.begin(target)
    assert (staging / "x").read_text() == "1"
    files.commit(target)
    assert files.exists(target) and child_names(target) == ["x"]
    assert child_names(directory) == ["target"]


def test_directories_are_removed(directory: pathlib.Path) -> None:
    files.make_directory(directory / "a")
    (directory / "a" / "x").write_text("1")
    files.remove_directory(directory / "a")
    files.remove_directory(directory / "a")
    assert child_names(directory) == []


def test_a_directory_that_cannot_be_is_one_sentence(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="/file is a file, where a directory should be"):
        files.make_directory(tmp_path / "file" / "x")
    with pytest.raises(UserError, match="cannot create /proc/x"):
        files.make_directory(pathlib.Path("/proc/x"))


@pytest.mark.subprocess
def test_killed_while_writing_leaves_the_old_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x").write_text("old")
    code = """
import os, pathlib, sys
from varedit_jax.storage.files import replacing
with replacing(pathlib.Path(sys.argv[1]) / "x") as file:
    file.write(b"new" * 10**6)
    file.flush()
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "x").read_text() == "old"


def test_what_a_directory_holds_in_words(directory: pathlib.Path) -> None:
    assert files.listing(directory) == "nothing"
    files.make_directory(directory)
    for name in "abcdef":
        (directory / name).write_text("")
    assert files.listing(directory) == "a, b, c, d and 2 more"
    assert is_remote(directory) == str(directory).startswith(("gs://", "s3://"))
