"""Shared parts of benchmarks: a work directory, child programs with time and peak memory, and the report."""

import contextlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import PIL
import psutil
from absl import flags

from varedit_jax.config import EditorConfig
from varedit_jax.conversion import convert
from varedit_jax.conversion.writer import Planned, PthFile
from varedit_jax.errors import UserError
from varedit_jax.progress import Progress
from varedit_jax.storage import files, paths
from varedit_jax.storage.jsonl import LineWriter
from varedit_jax.weights.names import BUFFERS

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Measured(NamedTuple):
    """Time and memory of a program that succeeded."""

    seconds: float
    peak_bytes: int  # largest resident memory of the process and its descendants


def run_program(module: str, *arguments: str, title: str = "") -> Measured:
    """Runs `python -m module` to its end; with a `title`, prints it, the command and the seconds.

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
    """Yields a list that grows by the resident bytes of a process and its descendants, ten times per second.

    `ru_maxrss` would start from the memory of the parent process.
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


class OwnMemory(NamedTuple):
    """Resident bytes of this process."""

    now: int
    most: int  # since it started


def own_memory() -> OwnMemory:
    """Returns the memory of this process. Raises UserError where the system does not tell."""
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        raise UserError("this system has no /proc, so memory cannot be measured; use Linux")
    sizes = {name: int(value) * 1024 for name, value in re.findall(r"(VmRSS|VmHWM):\s*(\d+) kB", status.read_text())}
    return OwnMemory(sizes["VmRSS"], sizes["VmHWM"])


def family(pid: int) -> list[psutil.Process]:
    """Returns a process and its descendants; [] if it has ended."""
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


def kill_program(ready: Callable[[], bool], larger: str, module: str, *arguments: str) -> None:
    """Starts `python -m module`, and kills it and its descendants with SIGKILL as soon as `ready` returns True.

    Raises UserError, which advises to give `larger`, if the program ends before.
    """
    child = subprocess.Popen([sys.executable, "-m", module, *arguments])
    while not ready():
        if child.poll() is not None:
            raise UserError(f"{module} ended before it could be killed; give {larger}")
        time.sleep(0.05)
    for process in reversed(family(child.pid)):
        process.kill()
    child.wait()


def timed(
    function: Callable[Parameters, Result], *arguments: Parameters.args, **named: Parameters.kwargs
) -> tuple[float, Result]:
    """Returns the seconds of a call, and its result."""
    start = time.perf_counter()
    result = function(*arguments, **named)
    return time.perf_counter() - start, result


def check_pillow(python: str) -> None:
    """Raises UserError if another Python has not this environment's release of Pillow: decoders would be compared."""
    call = subprocess.run([python, "-c", "import PIL; print(PIL.__version__)"], capture_output=True, text=True)
    if (found := call.stdout.strip()) != PIL.__version__:
        raise UserError(
            f"{python} has {f'Pillow {found}' if found else 'no Pillow'}, and this environment {PIL.__version__}, so "
            f"decoders would be compared; install pillow=={PIL.__version__} there"
        )


def compared(taken: list[tuple[float, float]], limit: list[tuple[float, float]]) -> list[str]:
    """Returns the medians of two rates, and of their ratios to the limit's of the same round, these with their range.

    Args:
      taken: both rates of a contestant, by round.
      limit: those of the limit.
    """
    cells = [f"{statistics.median(rates):.0f}" for rates in zip(*taken, strict=True)]
    for clock in (0, 1):
        ratios = [own[clock] / most[clock] for own, most in zip(taken, limit, strict=True)]
        cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return cells


@contextlib.contextmanager
def kept_figures(output: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function that prints a figure, and appends it to the JSON lines beside the file `output`, if given."""
    with contextlib.ExitStack() as stack:
        lines = None
        if output:
            lines = stack.enter_context(contextlib.closing(LineWriter(paths.resolve(output).with_suffix(".jsonl"))))

        def keep(figure: dict[str, Any]) -> None:
            print(json.dumps(figure), flush=True)
            if lines is not None:
                lines.append(figure)

        yield keep


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
    """Yields a `new_directory`, and removes it at the end."""
    directory = new_directory(path)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def make_published(path: pathlib.Path, config: EditorConfig, part: str, zeros: bool = False) -> int:
    """Writes random weights of a part as published, or zeros in a sparse file; returns their bytes."""
    mapped = convert.mapping_of(config, [part])
    file = PthFile(path, [Planned(m.link.name, m.link.shape, m.dtype) for m in mapped])
    file.create()
    draw = np.random.default_rng(0)
    checksums = {}
    for line in Progress(mapped, desc=f"{part} weights", unit="tensor"):
        link = line.link
        if zeros:  # the file is all zeros where nothing has been written
            checksums[link.name] = zlib.crc32(bytes(math.prod(link.shape) * line.dtype.itemsize))
            continue
        tensor = BUFFERS[link.layout](link.shape) if link.is_buffer else draw.standard_normal(link.shape, np.float32)
        checksums[link.name] = file.write(link.name, tensor)
    file.finish(checksums)
    return sum(tensor.nbytes for tensor in file.tensors)


def command_line(module: str, *given: flags.FlagHolder[Any]) -> str:
    """Returns the command for a report: the flags that were given, without paths of this machine."""
    shown = [text for flag in given if flag.present for text in flag.serialize().splitlines()]  # one per value
    hidden = [re.sub(r"^--(directory|checkpoint|output|curves|peer_python)=.*", r"--\1=...", text) for text in shown]
    return " ".join([f"python -m {module}", *hidden])


def machine() -> str:
    """Returns cores, processor and versions, for a report."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = next(iter(names), platform.machine())
    jax = importlib.metadata.version("jax")
    return f"{os.cpu_count()} cores, {processor}; Python {platform.python_version()}, jax {jax}"


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Returns a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def report(title: str, command: str, about: str, *blocks: str) -> str:
    """Returns Markdown: title, command, date, machine and description, and blocks of text."""
    head = f"# {title}\n\n    {command}\n\n{time.strftime('%Y-%m-%d')}, {machine()}. {about}"
    return "\n\n".join([head, *filter(None, blocks)]) + "\n"


def publish(text: str, output: str) -> None:
    """Prints a report, and writes it to the file `output`, if given."""
    print(f"\n{text}", end="", flush=True)
    if output:
        files.write_text(paths.resolve(output), text)
