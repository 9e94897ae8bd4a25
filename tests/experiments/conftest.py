"""Runs command lines of the programs; held-out edits."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import pytest

from data_pipelines.shapes.builder import example_edit, example_novelty
from data_pipelines.shapes.scene import render
from experiments.shapes_scoring import BATCH

Answer = tuple[int, str, str]  # exit code, standard output, standard error

# Each command line runs in a child that forks off after the imports, which take longer than most of them.
PROGRAM = """
import importlib, json, os, sys, tempfile, traceback
from experiments import program

name, lines, setup = json.load(sys.stdin)
module = importlib.import_module("experiments." + name)
exec(setup)
answers = {}
for case, arguments in lines.items():
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv = [name, *arguments]
            code = 1
            try:
                program.run(module.main)
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)  # without taking the imports down one by one
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        answers[case] = (code, out.read(), err.read())
sys.stdout.write(json.dumps(answers))
"""


@pytest.fixture(scope="session")
def run_program() -> Callable[..., dict[str, Answer]]:
    """Runs a program of `experiments` with several command lines: `(name, {case: arguments}, ...) -> {case: answer}`.

    `setup` is Python text that runs once before them, with the program as `module`; `directory` is the working
    directory; `leave_out` names environment variables that the program does not get.
    """

    root = pathlib.Path(__file__).parents[2]

    def run(
        name: str,
        lines: Mapping[str, Sequence[str]],
        setup: str = "",
        directory: pathlib.Path = root,
        leave_out: Sequence[str] = (),
    ) -> dict[str, Answer]:
        environment = {variable: value for variable, value in os.environ.items() if variable not in leave_out}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            input=json.dumps([name, {case: list(map(str, arguments)) for case, arguments in lines.items()}, setup]),
            capture_output=True,
            text=True,
            cwd=directory,
            timeout=1200,  # seconds; for a machine with much else to do
            env=environment | {"PYTHONPATH": str(root)},
        )
        assert done.returncode == 0, done.stderr
        return {case: (code, out, err) for case, (code, out, err) in json.loads(done.stdout).items()}

    return run


@pytest.fixture(scope="session")
def records() -> list[dict]:
    """One batch of held-out edits of `shapes` as the loader gives them."""
    edits = [example_edit(0, "test", index) for index in range(BATCH)]
    return [
        {
            "source": render(edit.source),
            "target": render(edit.target),
            "source_scene": edit.source.encode(),
            "target_scene": edit.target.encode(),
            "instruction": edit.instruction,
            "kind": edit.kind,
            "novelty": example_novelty("test", index),
        }
        for index, edit in enumerate(edits)
    ]
