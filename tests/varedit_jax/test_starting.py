"""How a program ends while it imports, and when nobody reads what it prints."""

import configparser
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from varedit_jax import starting

pytestmark = pytest.mark.subprocess

ROOT = pathlib.Path(__file__).parents[2]
PROGRAMS = {
    "__init__": "from varedit_jax import starting\nstarting.guard_imports()",
    # Libraries that are imported catch exceptions, and so would lose Ctrl-C.
    "slow": "print('importing', flush=True)\ntry:\n    import time; time.sleep(60)\nexcept BaseException:\n    pass",
    "extra": "import pyarrow.parquet",
    "other": "import no_such_package",
    "defect": "1 / 0",
    "defect_of_main": "from varedit_jax import command\ncommand.run(lambda argv: 1 / 0)",
    "late": "from varedit_jax import command\ndef main(argv):\n    import apache_beam.io\ncommand.run(main)",
    "prints": "from varedit_jax import command\ncommand.run(lambda argv: print('x' * 100_000))",
    "prints_little": "from varedit_jax import command\ncommand.run(lambda argv: print('x'))",
    "explains": """
from varedit_jax import command
from varedit_jax.errors import UserError
def main(argv):
    try:
        print("x", flush=True)
    except OSError as error:
        raise UserError("writing failed") from error
command.run(main)
""",
    "pipe_of_its_own": "from varedit_jax import command\ndef main(argv):\n    raise BrokenPipeError('of a worker')\n"
    "command.run(main)",
    # JAX, too, has a callback that the garbage collector runs, often.
    "collects": """
import gc, time
from varedit_jax import command
def collected(phase, info):
    if not seen:
        seen.append(print("main", flush=True))
        time.sleep(60)
seen = []
def main(argv):
    gc.callbacks.append(collected)
    gc.collect()
    time.sleep(60)
command.run(main)
""",
    "waits": """
import time
from varedit_jax import command
def main(argv):
    print("main", flush=True)
    time.sleep(60)
command.run(main)
""",
}

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Starts `python -m programs.NAME` in an environment that has no extras."""
    directory = tmp_path_factory.mktemp("programs")
    (directory / "programs").mkdir()
    for name, text in PROGRAMS.items():
        (directory / "programs" / f"{name}.py").write_text(text)
    for package in ("pyarrow", "apache_beam"):
        (directory / package).mkdir()
        (directory / package / "__init__.py").write_text(
            f"raise ModuleNotFoundError('No module named {package}', name={package!r})"
        )

    def run(name: str, *arguments: str, stdout: int = subprocess.PIPE) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", f"programs.{name}", *arguments],
            cwd=directory,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def ended(program: "subprocess.Popen[str]") -> tuple[int, str]:
    """Returns exit code and standard error."""
    _, err = program.communicate(timeout=60)
    return program.returncode, err


@pytest.mark.parametrize("name", ["slow", "waits", "collects"])
def test_ctrl_c_ends_a_program_without_a_stack_trace(start: Start, name: str) -> None:
    program = start(name)
    assert program.stdout and program.stdout.readline() in ("importing\n", "main\n")
    time.sleep(0.1)
    program.send_signal(signal.SIGINT)
    assert ended(program) == (130, "error: interrupted\n")


@pytest.mark.parametrize(("name", "module"), [("extra", "pyarrow"), ("late", "apache_beam")])
def test_a_missing_extra_is_one_sentence(start: Start, name: str, module: str) -> None:
    sentence = f"error: this needs the package {module}; install it with pip install 'varedit-jax[prepare]'\n"
    assert ended(start(name)) == (1, sentence)


@pytest.mark.parametrize(("name", "error"), [("other", "ModuleNotFoundError"), ("defect", "ZeroDivisionError")])
def test_a_defect_keeps_its_stack_trace(start: Start, name: str, error: str) -> None:
    code, said = ended(start(name))
    assert code == 1 and "Traceback" in said and error in said


@pytest.mark.parametrize("case", ["prints", "prints_little", "explains", "prints --help"])
def test_a_pipe_without_a_reader_ends_a_program_quietly(start: Start, case: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    program = start(*case.split(), stdout=writer)
    os.close(writer)
    assert ended(program) == (141, "")


def test_another_broken_pipe_is_an_error(start: Start) -> None:
    code, said = ended(start("pipe_of_its_own"))
    again = "this may pass by itself; try the same command again (exit code 75)\n"
    assert code == 75 and "Traceback" in said and said.endswith(f"BrokenPipeError: of a worker\n{again}")


def test_a_defect_of_a_running_program_has_a_code_of_its_own(start: Start) -> None:
    code, said = ended(start("defect_of_main"))
    assert code == 70 and said.startswith("Traceback") and said.endswith("ZeroDivisionError: division by zero\n")


def test_importing_a_package_with_programs_changes_nothing() -> None:
    """As in a notebook, or in these tests."""
    code = "import sys, signal, experiments; print(sys.excepthook is sys.__excepthook__, signal.getsignal(2))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("True <built-in function default_int_handler>")


def test_every_extra_is_known() -> None:
    """By the module of each package that setup.cfg names there; those of JAX are its own."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    extras = dict(settings["options.extras_require"])
    found = {
        (re.split(r"[^\w-]", line)[0].replace("-", "_"), extra)
        for extra in set(extras) - {"test"}
        for line in extras[extra].split("\n")
        if line and not line.startswith(("#", "jax["))
    }
    found.add(("libtpu", "tpu"))
    assert set(starting.EXTRAS.items()) <= found  # a package may be in several extras
    assert set(starting.EXTRAS) == {module for module, _ in found}
