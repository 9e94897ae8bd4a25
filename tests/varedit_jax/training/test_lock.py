"""A run's directory is for one run at a time."""

import errno
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from varedit_jax.errors import UserError
from varedit_jax.training.lock import Lock

HOLD = """
import sys, time
from varedit_jax.training.lock import Lock
with Lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.subprocess
def test_another_process_has_it_until_it_is_killed(tmp_path: pathlib.Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        words = f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()}; wait for it, end it, or use"
        with pytest.raises(UserError, match=words), Lock(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=20)
    with Lock(tmp_path), pytest.raises(UserError, match=f"in use by process {os.getpid()} on"), Lock(tmp_path):
        pass
    with Lock(tmp_path):
        pass


def test_one_that_does_not_say_who_it_is(tmp_path: pathlib.Path) -> None:
    with Lock(tmp_path):
        (tmp_path / "lock").write_text("")
        with pytest.raises(UserError, match="is in use by another run; wait"), Lock(tmp_path):
            pass


def test_a_file_system_without_locks(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with Lock(tmp_path), Lock(tmp_path):
        pass


def test_only_the_first_process_takes_it(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lock(tmp_path):
        monkeypatch.setattr("jax.process_index", lambda: 1)
        with Lock(tmp_path):
            pass


def test_a_directory_that_cannot_be_made(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"/file is a file, where the directory of a run should be"),
        Lock(tmp_path / "file"),
    ):
        pass
    (tmp_path / "lock").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*/lock: Is a directory"), Lock(tmp_path):
        pass
