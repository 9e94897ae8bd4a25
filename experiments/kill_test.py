"""Kills a training run with SIGKILL at random times, repeatedly, and compares its end with an uninterrupted run.

    python -m experiments.kill_test --directory=/tmp/kill_test --output=results/kill_test.md

A real run (experiments.train on the smallest config) is killed while it starts, restores, trains, saves, and removes
old checkpoints. After each kill the newest checkpoint must be readable, and no older than the previous one. At the end
state, data iterator and metrics must equal those of the uninterrupted run, bit for bit; the exit code is 1 if not. The
same seed gives the same order of phases and the same delays; what a kill hits depends on the machine.
"""

import collections
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

from experiments import compare_runs, program
from experiments.benchmarks import harness
from varedit_jax import command
from varedit_jax.errors import UserError
from varedit_jax.storage.lock import LOCK_FILE
from varedit_jax.training import checksums
from varedit_jax.training.goodput import run_shares
from varedit_jax.training.metrics import read_metrics
from varedit_jax.weights import run_directory

_DIRECTORY = command.DEFINE_path("directory", None, "new directory to work in", local=True, required=True)
_KILLS = flags.DEFINE_integer("kills", 20, "number of kills", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 200, "of the run; it must not end before the last kill", lower_bound=10)
_SEED = flags.DEFINE_integer("seed", 0, "of phases and delays")
_OUTPUT = command.DEFINE_path("output", "", "Markdown file for the figures")

CONFIG = "experiments/configs/shapes.py:tiny"
SAVE_EVERY = 3


@dataclasses.dataclass
class Watched:
    """A training process, and the contents of its directory at the start."""

    workdir: pathlib.Path
    process: subprocess.Popen[bytes]
    steps_more: int  # logged steps after which it counts as stepping
    newest: int
    unfinished: set[str]
    lines: int

    def restores(self) -> bool:
        """Returns True if it has taken the lock, its last action before it restores."""
        try:
            return bool(json.loads((self.workdir / LOCK_FILE).read_text())["pid"] == self.process.pid)
        except (OSError, ValueError):
            return False

    def steps(self) -> bool:
        """Returns True if it has logged `steps_more` steps."""
        return metric_lines(self.workdir) >= self.lines + self.steps_more

    def saves(self) -> bool:
        """Returns True if it is writing a checkpoint."""
        return bool(unfinished(self.workdir) - self.unfinished)

    def removes(self) -> bool:
        """Returns True if it has completed a checkpoint, so that an old one is removed."""
        return compare_runs.newest(self.workdir) > self.newest


# Phase: its number of 20 kills, its beginning, and the longest delay from there to the kill in seconds.
PHASES: dict[str, tuple[int, Callable[[Watched], bool], float]] = {
    "starting": (2, lambda _: True, 4.0),
    "restoring": (5, Watched.restores, 0.5),
    "stepping": (5, Watched.steps, 0.3),
    "saving": (6, Watched.saves, 0.25),
    "removing": (2, Watched.removes, 0.02),
}
_PHASE = flags.DEFINE_multi_enum("phase", [], list(PHASES), "in which to kill, one per flag; all by default")


def metric_lines(workdir: pathlib.Path) -> int:
    """Returns the number of lines in a run's metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def unfinished(workdir: pathlib.Path) -> set[str]:
    """Returns the directories of incomplete saves."""
    directory = workdir / run_directory.CHECKPOINTS
    return {path.name for path in directory.iterdir() if not path.name.isdecimal()} if directory.exists() else set()


def start(workdir: pathlib.Path) -> subprocess.Popen[bytes]:
    """Starts the training program in `workdir`; its output goes to a file beside it."""
    command = [sys.executable, "-m", "experiments.train", f"--config={CONFIG}", f"--workdir={workdir}"]
    values = {
        "steps": _STEPS.value,
        "cadence.save_every": SAVE_EVERY,
        "cadence.keep_checkpoints": 2,
        "data.directory": workdir.parent / "data",
    }
    command += [f"--config.{name}={value}" for name, value in values.items()]
    with workdir.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def finish(workdir: pathlib.Path) -> None:
    """Starts or resumes the run to its end. Raises UserError if it fails."""
    if start(workdir).wait():
        raise UserError(f"the run failed; see {workdir.with_suffix('.log')}")


def kill(workdir: pathlib.Path, phase: str, rng: np.random.Generator) -> dict[str, Any]:
    """Starts the run, and kills it at a random time in `phase`; returns a row of the table."""
    _, reached, longest = PHASES[phase]
    before = compare_runs.newest(workdir)
    delay = float(rng.uniform(0, longest))
    more = int(rng.integers(1, 7))
    with start(workdir) as process:
        watched = Watched(workdir, process, more, before, unfinished(workdir), metric_lines(workdir))
        while process.poll() is None and not reached(watched):
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    if process.returncode != -signal.SIGKILL:
        raise UserError(f"the run ended before it was killed, with {process.returncode}; see {workdir}.log")
    after = compare_runs.newest(workdir)
    if after < before:
        raise UserError(f"a checkpoint was lost: {before} was there before the kill, and {after} is the newest now")
    unlisted = []
    if after:
        state, _ = compare_runs.read(workdir)
        if int(state.step) != after:
            raise UserError(f"the checkpoint of step {after} holds step {int(state.step)}")
        unlisted = checksums.unlisted(workdir / run_directory.CHECKPOINTS / str(after))
    logged = max((line["step"] + 1 for line in read_metrics(workdir)), default=0)
    left = len(unfinished(workdir))
    return {
        "phase": phase,
        "seconds after": round(delay, 3),
        "checkpoint": after,
        "steps": logged,
        "left": left,
        "no checksums": len(unlisted),
    }


def report(rows: list[dict[str, Any]], directory: pathlib.Path, seconds: dict[str, float]) -> str:
    """Returns the figures as Markdown."""
    shares = ", ".join(f"{kind} {share:.1%}" for kind, share in run_shares(directory / "killed").items() if share)
    left = sum(row["left"] > 0 for row in rows)
    counts = collections.Counter(row["phase"] for row in rows)
    phases = ", ".join(f"{counts[phase]} while {phase}" for phase in PHASES if counts[phase])
    early = sum(row["no checksums"] > 0 for row in rows)
    repeated = sum(row["steps"] - row["checkpoint"] for row in rows)
    head = ("kill", "phase", "seconds into it", "newest checkpoint", "steps logged", "unfinished saves", "no checksums")
    return harness.report(
        "Killed at random times",
        harness.command_line("experiments.kill_test", _DIRECTORY, _KILLS, _STEPS, _PHASE, _SEED, _OUTPUT),
        f"A run of `{CONFIG}` with {_STEPS.value} steps and a checkpoint every {SAVE_EVERY} steps got SIGKILL "
        f"{len(rows)} times, and was started again each time:\n{phases}.",
        f"After every kill the newest checkpoint could be read and was no older than the one before it; {left} kills "
        "left an\nunfinished save behind, which the next process removed, and "
        f"{early} a complete one without checksums of all its files,\nwhich was restored. At the end all arrays of the "
        f"state, the position of the data iterator and the metrics of all {_STEPS.value} steps\nare equal to those of "
        "the uninterrupted run, bit for bit.",
        f"{repeated} logged steps had to be repeated. The uninterrupted run took {seconds['whole']:.0f} s, with all "
        f"compilation;\nthe killed one took {seconds['killed']:.0f} s, of which {shares}.",
        harness.table(head, [(number + 1, *row.values()) for number, row in enumerate(rows)]),
    )


def main(argv: list[str]) -> None:
    """Runs, kills, compares and reports."""
    del argv
    directory = harness.new_directory(_DIRECTORY.value)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(directory / "cache"))
    whole, killed = directory / "whole", directory / "killed"
    seconds = {"whole": harness.timed(finish, whole)[0]}
    print(f"the uninterrupted run took {seconds['whole']:.0f} s")
    rng = np.random.default_rng(_SEED.value)
    aimed = _PHASE.value or list(PHASES)
    all_phases = [phase for phase, (count, _, _) in PHASES.items() for _ in range(count) if phase in aimed]
    phases = [phase for _ in range(-(-_KILLS.value // len(all_phases))) for phase in rng.permutation(all_phases)]
    rows = []
    begin = time.monotonic()
    for phase in phases[: _KILLS.value]:
        rows.append(kill(killed, str(phase), rng))
        print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    finish(killed)
    seconds["killed"] = time.monotonic() - begin
    compare_runs.check_equal(killed, whole)
    harness.publish(report(rows, directory, seconds), _OUTPUT.value)


if __name__ == "__main__":
    program.run(main)
