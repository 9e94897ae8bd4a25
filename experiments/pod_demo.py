"""Trains an editor in four processes, kills one of them, resumes, and compares the end with an uninterrupted run.

    make pod-demo

Each process has one device of a mesh of fsdp 2 x tensor 2, on this machine's CPU: it holds a quarter of the state, and
reads half of every batch. The run starts from the shipped editor of `shapes`. First it is not interrupted; then the
same run gets SIGKILL in one process, during a step. At the end all arrays of the state, the position in the data and
the metrics of every step must be equal, bit for bit; the exit code is 1 if not.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from absl import flags

from experiments import compare_runs, program
from experiments.benchmarks import harness
from experiments.configs import shapes
from varedit_jax import command
from varedit_jax.errors import UserError
from varedit_jax.progress import Progress
from varedit_jax.storage import files, paths
from varedit_jax.training.metrics import duration

_DIRECTORY = command.DEFINE_path("directory", "runs/pod_demo", "directory of the runs; emptied first", local=True)
_STEPS = flags.DEFINE_integer("steps", 24, "of the run", lower_bound=8)
_VICTIM = flags.DEFINE_integer("victim", 2, "the process that is killed", lower_bound=0, upper_bound=3)
_OUTPUT = command.DEFINE_path("output", "", "Markdown file for the figures")

CONFIG = "experiments/configs/shapes.py:tiny"
PROCESSES = 4
SAVE_EVERY = 4
XLA_FLAGS = "--xla_backend_optimization_level=0"  # halves the compilation time of every process
_GRACE_SECONDS = 30  # for the others to notice that one is gone, before they are killed

Process = subprocess.Popen[bytes]


def settings(directory: pathlib.Path, steps: int) -> dict[str, object]:
    """Returns the fields of the config that this run overrides."""
    return {
        "mesh.data": 1,
        "mesh.fsdp": 2,
        "mesh.tensor": 2,
        "init_from": shapes.SHIPPED,
        "stages": "()",
        "optimizer.learning_rate": 1e-4,
        "data.batch_size": 16,
        "data.directory": directory / "data",
        "cadence.eval_every": 0,
        "cadence.sample_every": 0,
        "steps": steps,
        "cadence.save_every": SAVE_EVERY,
        "cadence.keep_checkpoints": 2,
        "guard.hang_minutes": 20.0,
    }


@contextlib.contextmanager
def started(workdir: pathlib.Path, values: dict[str, object], processes: int = PROCESSES) -> Iterator[list[Process]]:
    """Runs the training program in several processes of one device each; their output goes to files beside `workdir`.

    None of them outlives the block.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "experiments.train", f"--config={CONFIG}", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in values.items()]
    command += [f"--coordinator=127.0.0.1:{port}", f"--process_count={processes}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS, "TF_CPP_MIN_LOG_LEVEL": "3"}
    running: list[Process] = []
    with contextlib.ExitStack() as stack:
        for index in range(processes):
            log = stack.enter_context(workdir.with_name(f"{workdir.name}_{index}.log").open("ab"))
            running.append(
                subprocess.Popen([*command, f"--process_index={index}"], env=environment, stdout=log, stderr=log)
            )
        try:
            yield running
        finally:
            for process in running:
                process.kill()
                process.wait()


def follow(running: Sequence[Process], workdir: pathlib.Path, steps: int, until: Callable[[], bool]) -> None:
    """Shows progress until `until` returns True, all processes have ended, or one has failed."""
    with Progress(total=steps, desc=workdir.name, unit="step") as bar:

        def show() -> None:
            if (made := len(compare_runs.metrics(workdir))) > bar.n:
                bar.update(made - bar.n)

        while any(process.poll() is None for process in running) and not any(process.poll() for process in running):
            show()
            if until():
                break
            time.sleep(0.05)
        show()


def finish(workdir: pathlib.Path, values: dict[str, object], steps: int) -> None:
    """Starts or resumes the run to its end. Raises UserError if a process fails."""
    with started(workdir, values) as running:
        follow(running, workdir, steps, lambda: False)
        codes = gone(running)
    if any(codes):
        raise UserError(f"the processes ended with {codes}; see {workdir}_*.log")


def gone(running: Sequence[Process]) -> list[int | None]:
    """Returns the exit codes of the processes after a grace period at most; None for running ones."""
    end = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < end and any(process.poll() is None for process in running):
        time.sleep(0.05)
    return [process.poll() for process in running]


def kill(workdir: pathlib.Path, values: dict[str, object], steps: int, victim: int) -> str:
    """Starts the run and kills one of its processes past the middle, between two checkpoints; returns a summary."""
    middle = steps // 2 // SAVE_EVERY * SAVE_EVERY + SAVE_EVERY // 2
    with started(workdir, values) as running:
        follow(running, workdir, steps, lambda: len(compare_runs.metrics(workdir)) > middle)
        if any(process.poll() is not None for process in running):
            raise UserError(f"a process ended before one was killed; see {workdir}_*.log")
        running[victim].send_signal(signal.SIGKILL)
        seconds, codes = harness.timed(gone, running)
    made, saved = len(compare_runs.metrics(workdir)), compare_runs.newest(workdir)
    others = [code for index, code in enumerate(codes) if index != victim]
    alone = sum(code is not None for code in others)
    ended = f"{alone} of the other {len(others)} ended by themselves" if alone < len(others) else "the others ended"
    return (
        f"process {victim} got SIGKILL after {made} of {steps} steps, when the checkpoint of step {saved} was "
        f"complete; {ended} within {seconds:.0f} s"
    )


def report(seconds: dict[str, float], story: str, steps: int) -> str:
    """Returns the figures as Markdown."""
    titles = {
        "whole": "the uninterrupted run, with compilation",
        "killed": "until the kill, and until all processes were gone",
        "resumed": "started again, to the end",
        "all": "everything, with data and comparison",
    }
    return harness.report(
        "Four processes, one of them killed",
        harness.command_line("experiments.pod_demo", _STEPS, _VICTIM, _OUTPUT),
        f"{PROCESSES} processes with one CPU device each, on a mesh of fsdp 2 x tensor 2, start from the shipped "
        f"editor of `shapes`,\nfor {steps} steps of 16 examples, with a checkpoint every {SAVE_EVERY} steps.",
        f"{story[0].upper()}{story[1:]}. All were started again by the same command, and resumed from the checkpoint.",
        "At the end all arrays of the state (parameters, moments, step), the position of the data iterator and the "
        f"metrics of all\n{steps} steps are equal to those of the uninterrupted run, bit for bit.",
        harness.table(("", "seconds"), [(titles[name], f"{value:.0f}") for name, value in seconds.items()]),
    )


def main(argv: list[str]) -> None:
    """Trains twice, kills once, compares."""
    del argv
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # runs the cleanup of `started`
    begin = time.monotonic()
    shutil.rmtree(paths.local(_DIRECTORY.value, "--directory"), ignore_errors=True)
    directory, steps = harness.new_directory(_DIRECTORY.value), _STEPS.value
    values = settings(directory, steps)
    whole, killed = directory / "whole", directory / "killed"
    print(f"{PROCESSES} processes train {CONFIG} for {steps} steps; the first time they compile, which takes minutes")
    seconds = {"whole": harness.timed(finish, whole, values, steps)[0]}
    seconds["killed"], story = harness.timed(kill, killed, values, steps, _VICTIM.value)
    print(f"{story}; all start again")
    seconds["resumed"], _ = harness.timed(finish, killed, values, steps)
    compare_runs.check_equal(killed, whole)
    seconds["all"] = time.monotonic() - begin
    if _OUTPUT.value:
        files.write_text(paths.resolve(_OUTPUT.value), report(seconds, story, steps))
    print(
        f"EQUAL, bit for bit, after {steps} steps: parameters, moments, position in the data and metrics of the killed "
        f"run and of the uninterrupted one; {duration(seconds['all'])} in all"
    )


if __name__ == "__main__":
    program.run(main)
