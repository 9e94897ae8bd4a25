"""Shared parts of programs that measure: a work directory, child programs with time and peak memory, and the report."""

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import psutil
from absl import flags

from varedit_jax.errors import UserError
from varedit_jax.storage import files, paths

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Measured(NamedTuple):
    """A program that ended well."""

    seconds: float
    peak_bytes: int  # largest resident memory of the process with all that it started


def run_program(module: str, *arguments: str, title: str = "") -> Measured:
    """Runs `python -m module` to its end; with a `title`, prints that, the command and the seconds.

    Raises UserError with the exit code if it fails.
    """
    if title:
        print(f"\n=== {title}\n$ python -m {module} {shlex.join(arguments)}", flush=True)
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", module, *arguments])
    with _sampled_memory(child.pid) as samples:
        code = child.wait()
    if code:
        raise UserError(f"{module} ended with exit code {code}; its output is above")
    seconds = time.perf_counter() - start
    if title:
        print(f"--- {seconds:.0f} s", flush=True)
    return Measured(seconds, max(samples, default=0))


@contextlib.contextmanager
def _sampled_memory(pid: int) -> Iterator[list[int]]:
    """Bytes that a process and its descendants hold, ten times a second, until the block ends.

    Not `ru_maxrss`, which starts from the memory of the process that started it.
    """
    samples: list[int] = []
    end = threading.Event()

    def watch() -> None:
        while not end.wait(0.1):
            samples.append(sum(map(_resident_bytes, family(pid))))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        end.set()
        thread.join()


def family(pid: int) -> list[psutil.Process]:
    """A process and its descendants; empty if it has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # it has ended since
        return 0


def timed(
    function: Callable[Parameters, Result], *arguments: Parameters.args, **named: Parameters.kwargs
) -> tuple[float, Result]:
    """Seconds of a call, and its result."""
    start = time.perf_counter()
    result = function(*arguments, **named)
    return time.perf_counter() - start, result


def new_directory(path: str) -> pathlib.Path:
    """Creates a local directory. Raises UserError if it exists, or is in an object store."""
    directory = paths.local(path, "--directory")
    try:
        directory.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(f"{directory} exists; give a new directory") from error
    return directory


@contextlib.contextmanager
def scratch_directory(path: str) -> Iterator[pathlib.Path]:
    """As `new_directory`, and removes it at the end."""
    directory = new_directory(path)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def command_line(module: str, *given: flags.FlagHolder[Any]) -> str:
    """The command of a report: those of the flags that are on the command line, without paths of this machine."""
    shown = [flag.serialize() for flag in given if flag.present]
    hidden = [re.sub(r"^--(directory|output|peer_python)=.*", r"--\1=...", text) for text in shown]
    return " ".join([f"python -m {module}", *hidden])


def machine() -> str:
    """Cores, processor and versions."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = next(iter(names), platform.machine())
    jax = importlib.metadata.version("jax")
    return f"{os.cpu_count()} cores, {processor}; Python {platform.python_version()}, jax {jax}"


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def report(title: str, command: str, about: str, *blocks: str) -> str:
    """Markdown: title, command, date and machine with what was measured, and blocks of text."""
    head = f"# {title}\n\n    {command}\n\n{time.strftime('%Y-%m-%d')}, {machine()}. {about}"
    return "\n\n".join([head, *filter(None, blocks)]) + "\n"


def publish(text: str, output: str) -> None:
    """Prints a report, and writes it to the file `output`, if one is given."""
    print(f"\n{text}", end="", flush=True)
    if output:
        files.write_text(paths.resolve(output), text)
