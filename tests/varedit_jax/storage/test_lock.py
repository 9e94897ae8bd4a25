"""One writer per directory, on every kind of storage."""

import errno
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from typing import Any

import pytest

from varedit_jax.errors import UserError
from varedit_jax.storage import lock
from varedit_jax.storage.lock import Lock
from varedit_jax.storage.paths import child_names, is_remote

ME = f"process {os.getpid()} on {socket.gethostname()}"


def test_a_second_one_is_refused_and_told_who(directory: pathlib.Path) -> None:
    with Lock(directory), pytest.raises(UserError, match=f"is in use by {ME}; wait for it, .* another --output"):
        Lock(directory, flag="--output").__enter__()
    with Lock(directory):
        pass
    assert child_names(directory) == ([] if is_remote(directory) else ["lock"])


def test_whoever_does_not_hold_it_takes_nothing(directory: pathlib.Path) -> None:
    with Lock(directory), Lock(directory, held=False):
        pass


@pytest.mark.subprocess
def test_a_killed_holder_gives_it_back(tmp_path: pathlib.Path) -> None:
    code = """
import os, sys
from varedit_jax.storage.lock import Lock
with Lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"is in use by process {holder.pid} on "):
            Lock(tmp_path).__enter__()
        holder.kill()
    with Lock(tmp_path):
        pass


@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_a_lease_expires_with_its_holder(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease of a dead holder expires; a live one renews it."""
    monkeypatch.setattr(os, "kill", lambda *_: None)  # of a machine so busy that renewals come too late
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(lock, "EXPIRY_SECONDS", 3.0)
    directory = lock.resolve(request.getfixturevalue(f"{kind}_bucket") + "/run")
    dead = {"host": "gone", "pid": 7, "id": "x", "renewed": time.time()}
    (directory / "lock").write_text(json.dumps(dead))
    with pytest.raises(UserError, match="is in use by process 7 on gone"):
        Lock(directory).__enter__()
    (directory / "lock").write_text(json.dumps(dead | {"renewed": time.time() - 4}))
    with Lock(directory):
        time.sleep(3.5)
        with pytest.raises(UserError, match=f"is in use by {ME}"):
            Lock(directory).__enter__()
        assert lock._read(directory / "lock")["pid"] == os.getpid()  # while it is renewed


def test_a_lease_is_read_while_it_is_renewed(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its object is replaced between any request that came before and the one that reads it."""
    import s3fs

    directory = lock.resolve(s3_bucket + "/run")
    old, new = ({"host": "far", "pid": pid, "id": "x", "renewed": time.time()} for pid in (7, 8))
    (directory / "lock").write_text(json.dumps(old))
    call = s3fs.S3FileSystem._call_s3

    async def renewed_before(self: s3fs.S3FileSystem, method: str, *arguments: Any, **options: Any) -> Any:
        if method == "get_object":
            place = {name: options[name] for name in ("Bucket", "Key")}
            await call(self, "put_object", **place, Body=json.dumps(new).encode())
        return await call(self, method, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", renewed_before)
    with pytest.raises(UserError, match="is in use by process 8 on far"):
        Lock(directory).__enter__()


def test_a_lost_lease_ends_the_holder(gs_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder that finds another owner stops, as by SIGTERM, before both write."""
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(os, "kill", lambda *arguments: killed.append(arguments))
    directory = lock.resolve(gs_bucket + "/run")
    with Lock(directory):
        (directory / "lock").write_text(json.dumps({"host": "h", "pid": 1, "id": "other", "renewed": time.time()}))
        deadline = time.monotonic() + 10
        while not killed and time.monotonic() < deadline:
            time.sleep(0.05)
    assert killed == [(os.getpid(), 15)]
    assert json.loads((directory / "lock").read_text())["id"] == "other"


def test_a_holder_that_does_not_say_who_it_is(tmp_path: pathlib.Path) -> None:
    with Lock(tmp_path):
        (tmp_path / "lock").write_text("")
        with pytest.raises(UserError, match="is in use by another run; wait"):
            Lock(tmp_path).__enter__()


def test_a_file_system_without_locks(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with Lock(tmp_path), Lock(tmp_path):
        pass


def test_a_lease_that_cannot_be_renewed_ends_the_holder(gs_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder that could not reach the store until its lease expired may have lost it."""
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "EXPIRY_SECONDS", 0.5)
    monkeypatch.setattr(os, "kill", lambda *arguments: killed.append(arguments))
    directory = lock.resolve(gs_bucket + "/run")
    with Lock(directory):
        monkeypatch.setattr(lock, "write_json", lambda *_, **__: 1 / 0)
        deadline = time.monotonic() + 10
        while not killed and time.monotonic() < deadline:
            time.sleep(0.05)
    assert killed == [(os.getpid(), 15)]


def test_a_lease_that_cannot_be_read_is_not_taken(gs_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may name a holder; the failure of the network is one sentence."""

    def refuse(*_: object) -> None:
        raise TimeoutError("timed out")

    directory = lock.resolve(gs_bucket + "/run")
    monkeypatch.setattr(lock, "read_whole", refuse)
    with pytest.raises(UserError, match="writing the lock failed in gs://.*: timed out; put that right"):
        Lock(directory).__enter__()
    monkeypatch.undo()
    assert child_names(directory) == []


def test_a_directory_that_cannot_be_locked(tmp_path: pathlib.Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*/lock: Is a directory"):
        Lock(tmp_path).__enter__()


def test_a_directory_on_a_link_has_one_writer(tmp_path: pathlib.Path) -> None:
    """A work directory on another disk, made by its first run, is the same directory under both names."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk/run")
    with (
        Lock(tmp_path / "run"),
        pytest.raises(UserError, match="is in use by process"),
        Lock(tmp_path / "disk" / "run"),
    ):
        pass
    assert (tmp_path / "run").is_symlink() and (tmp_path / "disk" / "run" / "lock").is_file()
