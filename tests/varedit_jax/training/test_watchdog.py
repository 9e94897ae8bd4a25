"""A run that hangs is ended, with its stacks; a live one is not."""

import pathlib
import subprocess
import sys
import time

import pytest

from varedit_jax.config import GuardConfig
from varedit_jax.errors import TEMPORARY
from varedit_jax.training.watchdog import Watchdog

HANGING = """
import ctypes, sys, threading
from varedit_jax.config import GuardConfig
from varedit_jax.training.watchdog import Watchdog

def where_it_hangs():
    {hang}

with Watchdog(GuardConfig(hang_minutes=1 / 60), sys.argv[1]) as watchdog:
    watchdog.beat("step")
    threading.Thread(target=where_it_hangs if {in_thread} else print, daemon=True).start()
    where_it_hangs()
"""


def hang(directory: pathlib.Path, how: str, in_thread: bool = False) -> subprocess.CompletedProcess[str]:
    """A process that hangs."""
    return subprocess.run(
        [sys.executable, "-c", HANGING.format(hang=how, in_thread=in_thread), str(directory)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.subprocess
def test_a_hang_writes_the_stacks_of_all_threads_and_exits(tmp_path: pathlib.Path) -> None:
    done = hang(tmp_path, "threading.Event().wait()", in_thread=True)
    assert done.returncode == TEMPORARY
    (file,) = tmp_path.glob("hang_*.txt")
    for text in (done.stderr, file.read_text()):
        assert "minutes (guard.hang_minutes is 0.0166667) while step; the stacks of all threads are in" in text
        assert text.count("in where_it_hangs") == 2


@pytest.mark.subprocess
def test_a_hang_that_holds_the_interpreter(tmp_path: pathlib.Path) -> None:
    """C code that never releases the interpreter stops the watchdog's thread, too, here just after a long phase."""
    done = hang(tmp_path, "ctypes.PyDLL(None).sleep(60)")
    assert done.returncode == 1
    assert "in where_it_hangs" in done.stderr


def test_a_run_that_lives_is_left_alone(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[int] = []
    monkeypatch.setattr("os._exit", ends.append)
    with Watchdog(GuardConfig(hang_minutes=0.3 / 60, long_minutes=0.0), tmp_path) as watchdog:
        for _ in range(8):
            time.sleep(0.1)
            watchdog.beat()
    assert ends == [] and list(tmp_path.iterdir()) == []
    with Watchdog(GuardConfig(), tmp_path):
        assert list(tmp_path.iterdir()) == []
