"""Files and directories appear complete or not at all, on every kind of storage."""

import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable

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


# --- links: what is written to one is written where it points, and the link stays


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> pathlib.Path:
    """Returns another directory than that of the links."""
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


@pytest.mark.parametrize("exists", [True, False])
def test_a_file_is_written_through_a_link(tmp_path: pathlib.Path, disk: pathlib.Path, exists: bool) -> None:
    """Atomically there: a failure leaves what was there, and no draft."""
    (tmp_path / "link").symlink_to("disk/x")
    if exists:
        (disk / "x").write_text("old")
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "link") as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert child_names(disk) == ["x"] * exists
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and not (disk / "x").is_symlink()
    assert (disk / "x").read_text() == "new" and child_names(disk) == ["x"]
    assert child_names(tmp_path) == ["disk", "link"]


def in_one_go(path: pathlib.Path) -> None:
    with files.new_directory(path) as staging:
        (staging / "x").touch()


def in_attempts(path: pathlib.Path) -> None:
    (files.begin(path) / "x").touch()
    files.commit(path)


def in_place(path: pathlib.Path) -> None:
    files.make_directory(path)
    (path / "x").touch()


@pytest.mark.parametrize("make", [in_one_go, in_attempts, in_place])
def test_a_directory_is_made_through_a_link(
    tmp_path: pathlib.Path, disk: pathlib.Path, make: Callable[[pathlib.Path], None]
) -> None:
    """Also through one to another; what is there already is as much in the way as without the link."""
    (tmp_path / "link").symlink_to(disk / "other")
    (disk / "other").symlink_to("target")
    assert files.staging_of(tmp_path / "link").parent == disk
    make(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (disk / "other").is_symlink()
    assert child_names(disk) == ["other", "target"] and child_names(disk / "target") == ["x"]
    assert child_names(tmp_path) == ["disk", "link"] and files.exists(tmp_path / "link")
    with pytest.raises(UserError, match="disk/target exists"), files.new_directory(tmp_path / "link"):
        pass


def test_links_that_lead_nowhere_are_one_sentence(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "gone").symlink_to("nothing/there")
    for write in (files.make_directory, files.begin, lambda path: files.write_text(path, "x")):
        with pytest.raises(UserError, match="/a is a link that leads back to itself; remove it"):
            write(tmp_path / "a")
    with pytest.raises(UserError, match="/gone is a link to nothing/there, which does not exist; create that"):
        files.make_directory(tmp_path / "gone" / "x")
    files.make_directory(tmp_path / "gone")
    assert (tmp_path / "nothing" / "there").is_dir()


# --- JSON as people save it


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_json_in_any_unicode(tmp_path: pathlib.Path, encoding: str) -> None:
    """As editors save it on Windows: with a byte order mark, or as "Unicode"."""
    value = {"name": "süß 画", "grids": [[1, 1], [2, 2]]}
    (tmp_path / "x.json").write_bytes(json.dumps(value, ensure_ascii=False).encode(encoding))
    assert files.read_json(tmp_path / "x.json") == value
    (tmp_path / "x.json").write_bytes("{".encode(encoding))
    with pytest.raises(ValueError):
        files.read_json(tmp_path / "x.json")


def test_json_that_a_download_did_not_bring(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="config.json is a Git LFS pointer"):
        files.read_json(tmp_path / "config.json")
