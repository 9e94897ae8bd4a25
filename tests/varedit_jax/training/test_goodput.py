"""The time of a run by kind, over restarts."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from varedit_jax.errors import UserError
from varedit_jax.training.goodput import (
    GOODPUT_FILE,
    KINDS,
    Goodput,
    Stopwatch,
    read_goodput,
    run_seconds,
    run_shares,
)


class Process:
    """A simulated process of a run: a clock that only moves when told, and what the loop would time."""

    files: list = []  # what a killed one leaves open

    def __init__(self, workdir, start, first_step, *, startup=5.0, restore=0.0):
        self.time, self.clock, self.step = start, Stopwatch(), first_step
        self.spend("restore", restore)
        self.time += startup
        self.goodput = Goodput(workdir, self.clock, first_step, start=start, now=lambda: self.time)
        Process.files.append(self.goodput._lines)

    def spend(self, part, seconds):
        self.time += seconds
        self.clock.seconds[part] = self.clock.seconds.get(part, 0.0) + seconds

    def steps(self, count, data=0.5, log_every=10):
        """So many steps of a second, and half a second of waiting for data; a line every ten."""
        for _ in range(count):
            self.spend("data", data)
            self.spend("step", 1.0)
            self.step += 1
            if self.step % log_every == 0:
                self.shares = self.goodput.record(self.step)


@pytest.fixture(autouse=True)
def _close_files():
    yield
    while Process.files:
        Process.files.pop().close()


def check(seconds, total, **expected):
    """Every kind is as expected, 0 if not named, and together they are the whole time."""
    assert seconds == pytest.approx({kind: expected.get(kind, 0.0) for kind in KINDS}, abs=0.01)
    assert sum(seconds.values()) == pytest.approx(total, abs=0.01)


def test_one_process(tmp_path):
    process = Process(tmp_path, 1000.0, 0)
    process.spend("compile", 20.0)
    process.steps(20)
    process.spend("evaluate", 3.0)
    process.spend("sample", 2.0)
    process.spend("save", 4.0)
    process.time += 1.0  # between the parts
    process.goodput.close()
    expected = dict(startup=5, compile=20, productive=20, data=10, evaluate=5, checkpoint=4, other=1)
    check(run_seconds(tmp_path), 65.0, **expected)
    assert run_shares(tmp_path)["productive"] == pytest.approx(20 / 65, abs=1e-3)
    assert sum(process.shares.values()) == pytest.approx(1)
    assert process.shares["productive"] == pytest.approx(20 / 55)  # at its last step, before the evaluation
    check(process.goodput._before, 0.0)


def test_killed_and_resumed(tmp_path):
    """Repeated steps are lost, and so is the time until the next process starts."""
    first = Process(tmp_path, 0.0, 0)
    first.spend("compile", 20.0)
    first.steps(27)  # killed here: its last line is of step 20, and its checkpoint of step 15
    assert read_goodput(tmp_path)[-1].step == 20
    second = Process(tmp_path, 100.0, 15, startup=4.0, restore=6.0)
    second.spend("compile", 10.0)
    second.steps(25)
    second.goodput.close()
    # The first: 5 + 20 + 15 steps of 1.5 s; 5 repeated steps, 7.5 s; and 45 s from its last line, at 55 s, to 100 s.
    expected = dict(startup=5 + 4, compile=20 + 10, productive=15 + 25, data=7.5 + 12.5, checkpoint=6, lost=7.5 + 45)
    check(run_seconds(tmp_path), 157.5, **expected)
    assert second.shares == pytest.approx({kind: expected.get(kind, 0.0) / 157.5 for kind in KINDS})


def test_resuming_from_an_earlier_step_costs_all_earlier_processes(tmp_path):
    """The third process resumes from an earlier step than the second: both lose everything after it."""
    for start, first_step, steps in ((0.0, 0, 40), (100.0, 30, 20), (200.0, 10, 40)):
        process = Process(tmp_path, start, first_step, startup=0.0)
        process.steps(steps, data=0.0)
        process.goodput.close()
    seconds = run_seconds(tmp_path)
    assert seconds["productive"] == pytest.approx(10 + 0 + 40)
    assert seconds["lost"] == pytest.approx(30 + 60 + 20 + 80)
    assert process.shares["lost"] == pytest.approx(190 / 240)


def test_a_process_that_dies_before_its_first_step(tmp_path):
    """It leaves a line all the same: its start-up, and the gap behind it."""
    Process(tmp_path, 0.0, 0, startup=7.0)
    second = Process(tmp_path, 10.0, 0, startup=1.0)
    second.steps(10, data=0.0)
    check(run_seconds(tmp_path), 21.0, startup=8, lost=3, productive=10)


def test_lines_that_a_kill_cut_short(tmp_path):
    """They are passed over, and the next line starts on a line of its own."""
    first = Process(tmp_path, 0.0, 0, startup=0.0)
    first.steps(20, data=0.0)
    path = tmp_path / GOODPUT_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    second = Process(tmp_path, 30.0, 10, startup=0.0)
    second.steps(10, data=0.0)
    lines = path.read_bytes().splitlines()
    assert lines[:2] == whole.splitlines()[:2] and lines[2] == whole.splitlines()[2][:-39]
    assert [moment.step for moment in read_goodput(tmp_path)] == [0, 10, 10, 20]
    check(run_seconds(tmp_path), 40.0, productive=20, lost=20)
    for torn in (b"5\n", b'{"process": "x"}\n', b"\xff\xfe\n"):
        path.write_bytes(torn + whole)
        assert len(read_goodput(tmp_path)) == 3


def test_a_clock_that_is_set_back(tmp_path):
    """Kinds still sum to the time of the line, and nothing is negative."""
    process = Process(tmp_path, 1000.0, 0)
    process.time -= 500
    process.steps(10, data=0.0)
    later = Process(tmp_path, 700.0, 10)
    assert min(later.goodput.record(10).values()) >= 0
    assert sum(run_shares(tmp_path).values()) == pytest.approx(1)
    assert run_seconds(tmp_path)["productive"] == pytest.approx(10)


def test_twice_in_one_process(tmp_path):
    """The second time starts where the first ended, not where the process did."""
    for first_step, startup in ((0, 5.0), (10, 110.0)):
        process = Process(tmp_path, 0.0, first_step, startup=startup)
        process.steps(10, data=0.0)
        process.goodput.close()
    assert read_goodput(tmp_path)[-1].start == 15.0
    check(run_seconds(tmp_path), 120.0, startup=5 + 95, productive=20)


def test_a_run_without_lines(tmp_path):
    assert read_goodput(tmp_path) == [] and set(run_shares(tmp_path).values()) == {0.0}


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with contextlib.closing(Goodput(tmp_path, Stopwatch(), 0)) as goodput:
        assert goodput.record(1) == {}
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence(tmp_path):
    """/dev/full replaces a full disk."""
    process = Process(tmp_path, 0.0, 0)
    process.goodput._lines.close()
    with open("/dev/full", "wb", buffering=0) as full:
        process.goodput._lines._file = full
        with pytest.raises(UserError, match=r"writing the goodput.jsonl failed in .*: No space left on device"):
            process.goodput.record(1)
        process.goodput.close()
        assert full.closed


LOOP = """
import sys, time
from varedit_jax.training.goodput import Goodput
from varedit_jax.training.goodput import Stopwatch
clock = Stopwatch()
goodput = Goodput(sys.argv[1], clock, int(sys.argv[2]))
for step in range(int(sys.argv[2]), 10**9):
    with clock.time("step"):
        time.sleep(0.0005)
    goodput.record(step + 1)
"""


@pytest.mark.subprocess
def test_sigkill(tmp_path):
    """Two real processes, killed while they write: every line but a torn last one is whole; no time is missing."""
    began = time.time()
    for first_step in (0, 3):
        process = subprocess.Popen([sys.executable, "-c", LOOP, str(tmp_path), str(first_step)])
        deadline = time.time() + 60
        while not [m for m in read_goodput(tmp_path) if m.first_step == first_step and m.step > first_step + 20]:
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    lines = (tmp_path / GOODPUT_FILE).read_bytes().split(b"\n")
    assert all(json.loads(line) for line in lines[:-1])
    seconds = run_seconds(tmp_path)
    assert sum(seconds.values()) == pytest.approx(time.time() - began, abs=3)
    assert seconds["startup"] > 0.5, "importing JAX twice takes longer, and is of the processes' time"
    assert seconds["lost"] > 0 and seconds["productive"] > 0.01
