"""Compilations that end where the memory is assigned: the assignment, and the process in all the ways it may go.

tests/experiments/test_compile_ahead.py compiles a step this way, and compares it with the whole compilation.
"""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import pytest

from varedit_jax.analysis import passes
from varedit_jax.analysis.jobs import Job, Target
from varedit_jax.config import DataConfig, RunConfig, preset
from varedit_jax.errors import UserError

pytestmark = pytest.mark.subprocess

# As libtpu 0.0.42.1 wrote it for v5e, of a sorted product: a donated argument, another output, constants, VMEM.
ASSIGNMENT = (pathlib.Path(__file__).parents[2] / "data" / "hlo" / "assignment.txt").read_text()
PROGRAM = (
    "HloModule jit_f\n\n%body (p: f32[]) -> f32[] {\n}\n\nENTRY %main (p: f32[]) -> f32[] {\n  ROOT %p = f32[]\n}\n\n"
)
# What is done in place of compiling: `write` leaves a file of an attempt as libtpu does.
CHILD = """
import json, os, sys, time
job = json.loads(sys.stdin.readline())
with open(job["log"], "w") as file:
    file.write(str(os.getpid()))
def write(attempt, program, assignment):
    start = os.path.join(job["options"]["xla_dump_to"], f"module_{attempt:04}.jit_f.cl_1.after_optimizations")
    with open(start + "-buffer-assignment.txt", "w") as file:
        file.write(assignment)
    file = open(start + "_after_buffer_assignment.txt", "w")
    for part in program:
        file.write(part)
        file.flush()
        time.sleep(0.7)
"""


def test_bytes_are_those_of_the_executable():
    """Arguments, outputs and donated ones as `memory_analysis` of the same program; all, as its report of memory."""
    assert passes.assigned_bytes(ASSIGNMENT) == (67125248, 18944, 16384, 201401344)


@pytest.mark.parametrize("text", [PROGRAM[:-4], PROGRAM.partition("ENTRY")[0], ""])
def test_a_part_of_a_program_is_not_complete(text):
    assert passes.complete(PROGRAM) and not passes.complete(text)


@pytest.fixture
def run(tmp_path):
    """Runs `passes.run` on a process that does as the text says; `pid()` is its process, None if it is gone."""

    class Run:
        log = tmp_path / "pid"

        def __call__(self, text: str) -> passes.Assigned:
            return passes.run({"log": str(self.log)}, [sys.executable, "-c", CHILD + textwrap.dedent(text)])

        def gone(self) -> bool:
            try:
                os.kill(int(self.log.read_text()), 0)
            except ProcessLookupError:
                return True
            return False

    return Run()


def test_the_process_is_ended_when_the_last_attempt_is_written(run):
    """Not while its text is a part, which rests for longer than two looks; the first attempt is another program."""
    halves = [PROGRAM[: len(PROGRAM) // 2], PROGRAM[len(PROGRAM) // 2 :]]
    found = run(
        f"""
        write(3, {halves!r}, {ASSIGNMENT!r})
        time.sleep(600)  # generates code
        """
    )
    assert found == passes.Assigned(PROGRAM, 67125248, 18944, 16384, 201401344) and run.gone()


def test_what_a_process_left_that_has_ended(run):
    """A small program has its code before anybody looks; of two attempts the last one counts."""
    found = run(f"write(1, {['HloModule']!r}, ''); write(3, {[PROGRAM]!r}, {ASSIGNMENT!r})")
    assert found.text == PROGRAM and found.total == 201401344


@pytest.mark.parametrize("kind", [UserError, jax.errors.JaxRuntimeError])
def test_what_it_raises_is_raised(run, kind):
    line = passes.failure(kind("RESOURCE_EXHAUSTED: Used 41.17G of 31.25G hbm\nmore"))
    with pytest.raises(kind, match=r"Used 41.17G of 31.25G hbm\nmore"):
        run(f"print({line!r})")


def test_a_process_that_dies_is_no_mistake_of_the_user(run):
    with pytest.raises(RuntimeError, match=r"compiling process ended with 3: out of everything"):
        run("sys.stderr.write('out of everything'); sys.exit(3)")
    with pytest.raises(RuntimeError, match=r"compiling process ended with 1: .*no_such_module"):
        passes.run({"long": "x" * 2**20}, [sys.executable, "-m", "no_such_module"])  # ends before it reads


def test_a_compiler_that_writes_nothing_is_a_sentence(run):
    with pytest.raises(UserError, match=r"did not write down the program .* without --memory_only"):
        run("pass")


def test_ctrl_c_ends_the_process(run, monkeypatch):
    def interrupted(seconds: float) -> None:
        if run.log.exists() and run.log.read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr(passes.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("signal = __import__('signal'); signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)")
    assert run.gone()


@pytest.mark.tpu
def test_the_compiling_process_ends_with_who_started_it():
    """Its standard input is closed by the kernel, whatever ended the other; a mistake is said on standard output."""
    config = RunConfig(name="test", model=preset("tiny"), data=DataConfig(batch_size=3, text_tokens=16))
    job = Job("step", config, Target(topology="v5e:2x2"))  # its batch does not divide over the devices
    child = subprocess.Popen(passes.COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin and child.stdout
    child.stdin.write(json.dumps(job.to_dict() | {"options": {}}) + "\n")
    child.stdin.flush()
    failure = json.loads(child.stdout.readline())
    assert failure["kind"] == "UserError" and "data.batch_size 3" in failure["message"]
    child.stdin.close()
    assert child.wait(60) == 0
    child.stdout.close()


@pytest.mark.tpu
def test_nothing_stays_behind_who_was_killed(tmp_path):
    """The directory that was to be read is removed by the process that writes it, when nobody can read it any more."""
    config = RunConfig(name="test", model=preset("tiny"), data=DataConfig(batch_size=4, text_tokens=16))
    directory = tmp_path / "written"
    directory.mkdir()
    (directory / "module_0001.txt").write_text("HloModule")
    job = Job("step", config, Target(topology="v5e:2x2")).to_dict() | {"options": {passes.DUMP: str(directory)}}
    child = subprocess.Popen(passes.COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    said, _ = child.communicate(json.dumps(job) + "\n", timeout=60)  # closes its standard input
    assert (child.returncode, said) == (0, "") and not directory.exists()


def test_a_job_comes_back_as_it_was():
    config = RunConfig(name="test", model=preset("tiny"), data=DataConfig(batch_size=4, text_tokens=16))
    job = Job("sampling", config, Target(topology="v5e:2x2", hbm_gib=3.5), 5)
    assert Job.from_dict(json.loads(json.dumps(job.to_dict()))) == job
