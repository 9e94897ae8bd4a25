"""Conversions from and to every kind of storage: equal to local ones, resumed, and never half there."""

import errno
import importlib.util
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.emulators import gs_bucket, gs_server, s3_bucket, s3_server
from tests.varedit_jax.storage.test_paths import ODD_NAMES
from varedit_jax.conversion import convert
from varedit_jax.errors import UserError
from varedit_jax.sampling.editor import Editor
from varedit_jax.storage import files
from varedit_jax.storage.paths import child_names, files_below, resolve
from varedit_jax.weights import native
from varedit_jax.weights.export_source import open_source
from varedit_jax.weights.reader import StateDict

__all__ = ["gs_bucket", "gs_server", "s3_bucket", "s3_server"]

Write = Callable[..., pathlib.Path]
Ask = Callable[..., convert.Published]
Start = Callable[[Any, Any], int]  # input, output

STARTS: dict[str, Start] = {
    "pth": lambda source, output: convert.to_torch(open_source(source), output, quiet=True),
    "safetensors": lambda source, output: convert.to_torch(
        open_source(source), output, "safetensors", shard_bytes=10**6, quiet=True
    ),
    "directory": lambda source, output: convert.to_directory(open_source(source), output, quiet=True),
}


@pytest.fixture
def path(states: dict[str, StateDict], tmp_path: pathlib.Path, write_pth: Write) -> pathlib.Path:
    return write_pth(tmp_path / "in.pth", states["transformer"])


def contents(directory: Any) -> dict[str, bytes]:
    """Files by relative path; times that Orbax notes aside."""
    root = resolve(directory)
    return {
        found.relative_to(root).as_posix(): found.read_bytes()
        for found in files_below(root)
        if found.name not in ("_CHECKPOINT_METADATA", "commit_success.txt")
    }


def interrupted(monkeypatch: pytest.MonkeyPatch, start: Callable[[], object], after: int) -> None:
    """Ends a conversion by Ctrl-C before the checksum of the last of so many tensors is known."""
    made: list[object] = []

    def ends(tensor: np.ndarray) -> str:
        made.append(tensor)
        if len(made) == after:
            raise KeyboardInterrupt
        return checksum(tensor)

    checksum = convert.sha256
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(convert, "sha256", ends)
        start()


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_to_a_bucket_and_back(
    request: pytest.FixtureRequest,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    path: pathlib.Path,
    published: Ask,
    scheme: str,
) -> None:
    """A published file in a bucket -> ours -> each form of export: interrupted, refused to readers, resumed, equal."""
    bucket = request.getfixturevalue(f"{scheme}_bucket")
    files.copy(path, resolve(f"{bucket}/in.pth"))
    convert.to_jax(published("transformer", path), tmp_path / "ours", quiet=True)
    output = f"{bucket}/weights/ours"
    start = lambda: convert.to_jax(published("transformer", f"{bucket}/in.pth"), output)  # noqa: E731
    interrupted(monkeypatch, start, 20)
    for read in (open_source, Editor.load, convert.verify):
        with pytest.raises(UserError, match="weights/ours is incomplete: it is still being written"):
            read(output)
    capsys.readouterr()
    start()
    assert "of 64 tensors were done by an earlier attempt" in capsys.readouterr().out
    assert contents(output) == contents(tmp_path / "ours")
    assert child_names(resolve(bucket) / "weights") == ["ours"]
    with pytest.raises(UserError, match="weights/ours exists; give a new directory"):
        start()
    for name, export in STARTS.items():
        export(tmp_path / "ours", tmp_path / name)
        interrupted(monkeypatch, lambda export=export, name=name: export(output, f"{bucket}/{name}"), 10)
        export(output, f"{bucket}/{name}")
        assert contents(f"{bucket}/{name}") == contents(tmp_path / name)
        assert convert.verify(f"{bucket}/{name}") == convert.verify(tmp_path / name)


def test_pieces_that_were_joined_are_not_needed_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, gs_bucket: str, path: pathlib.Path, published: Ask
) -> None:
    """A kill while they are removed leaves a directory that is completed by the same command."""
    convert.to_jax(published("transformer", path), tmp_path / "ours", quiet=True)
    remove = files.remove_directory

    def ends(directory: pathlib.Path) -> None:
        if directory.name.endswith(".pieces"):
            next(files_below(directory)).unlink()
            raise KeyboardInterrupt
        remove(directory)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "remove_directory", ends)
        STARTS["pth"](tmp_path / "ours", f"{gs_bucket}/out")
    STARTS["pth"](tmp_path / "ours", f"{gs_bucket}/out")
    STARTS["pth"](tmp_path / "ours", tmp_path / "out")
    assert contents(f"{gs_bucket}/out") == contents(tmp_path / "out")


def test_another_input_is_converted_anew(
    states: dict[str, StateDict],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    gs_bucket: str,
    path: pathlib.Path,
    published: Ask,
    write_pth: Write,
) -> None:
    interrupted(monkeypatch, lambda: convert.to_jax(published("transformer", path), f"{gs_bucket}/o", quiet=True), 20)
    twice = {name: x if x.dtype.kind == "i" else x * np.float32(2) for name, x in states["transformer"].items()}
    other = write_pth(tmp_path / "other.pth", twice)
    for output in (f"{gs_bucket}/o", tmp_path / "o"):
        convert.to_jax(published("transformer", other), output, quiet=True)
    assert contents(f"{gs_bucket}/o") == contents(tmp_path / "o")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_directories_of_any_name(tmp_path: pathlib.Path, path: pathlib.Path, published: Ask, name: str) -> None:
    source = path.rename(tmp_path / f"{name}.pth")
    convert.to_jax(published("transformer", source), tmp_path / name / name, quiet=True)
    STARTS["directory"](tmp_path / name / name, tmp_path / f"{name} 2")
    assert convert.verify(tmp_path / name / name) == 64 and convert.verify(tmp_path / f"{name} 2") > 20


def test_paths_relative_to_the_parent(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, path: pathlib.Path, published: Ask
) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    convert.to_jax(published("transformer", "../in.pth"), "../ours", quiet=True)
    STARTS["pth"]("../ours", "../in/../out")
    assert convert.verify("../ours") == convert.verify(tmp_path / "out") == 64
    assert not list((tmp_path / "in").iterdir())


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("x" * 256, "a name of 256 bytes"),
        ("x" * 250, "a name of 259 bytes"),
        (os.fsdecode(b"a\xff"), "is not valid UTF-8"),
        ("/proc/x", "cannot create /proc"),
        ("gs://bucket/x", r"install it with pip install 'varedit-jax\[gcs\]'"),
        ("s3://bucket/x", r"install it with pip install 'varedit-jax\[s3\]'"),
    ],
)
def test_outputs_that_cannot_be(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    path: pathlib.Path,
    published: Ask,
    output: str,
    sentence: str,
) -> None:
    """One sentence, and nothing is created: no directory gs: either."""
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in ("gcsfs", "s3fs") else find(name, *rest)
    )
    with pytest.raises(UserError, match=sentence) as refused:
        convert.to_jax(published("transformer", path), output, quiet=True)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES])
def test_what_the_system_cannot_read_is_not_called_damaged(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, path: pathlib.Path, published: Ask, number: int
) -> None:
    """Neither while it is converted nor while it is verified; and what was done stays for the next attempt."""
    convert.to_jax(published("transformer", path), tmp_path / "ours", quiet=True)
    calls: list[object] = []

    def failing(self: native.Leaf, index: Any = None) -> np.ndarray:
        calls.append(self)
        if len(calls) > 10:
            raise UserError(f"cannot read {self.name}: {os.strerror(number)}") from OSError(number, "")
        return read(self, index)

    read = native.Leaf.read
    with monkeypatch.context() as patch:
        patch.setattr(native.Leaf, "read", failing)
        for work in (convert.verify, lambda source: STARTS["pth"](source, tmp_path / "out")):
            calls.clear()
            with pytest.raises(UserError, match=f"cannot read .*: {os.strerror(number)}$"):
                work(tmp_path / "ours")
    assert (tmp_path / ".out.partial" / "journal.jsonl").exists()
    STARTS["pth"](tmp_path / "ours", tmp_path / "out")
    assert convert.verify(tmp_path / "out") == 64
