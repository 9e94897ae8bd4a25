"""Measures the conversion of a full-size transformer on this machine: time, memory, and whether a byte changed.

    python -m experiments.benchmarks.conversion --preset=2b --directory=/tmp/conversion --output=results/conversion.md

Makes a file of random weights with the published names and shapes, converts it to ours, back to .pth and to
safetensors shards, each in a process of its own whose peak memory the operating system tells; kills one conversion half
way and goes on with it. The directory takes three times the file (2B: 8.8 GB) and is removed at the end.
"""

import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import zlib
from typing import NamedTuple

import numpy as np
import tqdm
from absl import flags

from experiments import program
from varedit_jax.config import preset
from varedit_jax.conversion import convert
from varedit_jax.conversion.writer import Planned, PthFile
from varedit_jax.errors import UserError
from varedit_jax.weights.manifest import read_manifest
from varedit_jax.weights.names import BUFFERS

_PRESET = flags.DEFINE_string("preset", "2b", "size of the transformer")
_DIRECTORY = flags.DEFINE_string("directory", None, "new directory to work in", required=True)
_ZEROS = flags.DEFINE_bool("zeros", False, "weights of zeros: a file that takes no room on the disk")
_BRIEF = flags.DEFINE_bool("brief", False, "no killed conversion, and .pth alone")
_OUTPUT = flags.DEFINE_string("output", "", "Markdown file for the table")


class Measured(NamedTuple):
    """One conversion."""

    title: str
    seconds: float
    peak: float  # GB, resident, of the whole process


def _make(path: pathlib.Path) -> int:
    """Writes random weights; returns their bytes."""
    mapped = convert.mapping_of(preset(_PRESET.value), ["transformer"])
    file = PthFile(path, [Planned(m.link.name, m.link.shape, m.dtype) for m in mapped])
    file.begin()
    draw = np.random.default_rng(0)
    checksums = {}
    for line in tqdm.tqdm(mapped, desc="weights", unit="tensor"):
        link = line.link
        if _ZEROS.value:  # the file is all zeros where nothing has been written
            checksums[link.name] = zlib.crc32(bytes(math.prod(link.shape) * line.dtype.itemsize))
            continue
        tensor = BUFFERS[link.layout](link.shape) if link.is_buffer else draw.standard_normal(link.shape, np.float32)
        checksums[link.name] = file.write(link.name, tensor)
    file.finish(checksums)
    return sum(tensor.nbytes for tensor in file.tensors)


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "experiments.convert", *arguments]


def _measure(title: str, *arguments: str) -> Measured:
    print(f"\n=== {title}\n$ python -m experiments.convert {' '.join(arguments)}", flush=True)
    start = time.perf_counter()
    child = subprocess.Popen(_command(*arguments))
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise UserError(f"{title} failed; what it said is above")
    return Measured(title, time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9)


def _kill_half_way(output: pathlib.Path, tensors: int, *arguments: str) -> int:
    """Starts a conversion and kills it when half of the tensors are done; returns how many were."""
    print("\n=== the same, killed half way", flush=True)
    child = subprocess.Popen(_command(*arguments, f"--output={output}"))
    journal = output.with_name(f".{output.name}.partial") / "journal.jsonl"
    while child.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") > tensors // 2:
            child.send_signal(signal.SIGKILL)
            child.wait()
            return journal.read_bytes().count(b"\n") - 1
        time.sleep(0.05)
    raise UserError("the conversion was over before it could be killed")


def _identical(one: pathlib.Path, other: pathlib.Path) -> int:
    """Number of tensors whose bytes and types are the same in two outputs. Raises UserError naming one that is not."""
    sums = [
        {entry["name"]: (entry["dtype"], entry["sha256"]) for entry in (read_manifest(directory) or {})["tensors"]}
        for directory in (one, other)
    ]
    different = [name for name in sums[0] | sums[1] if sums[0].get(name) != sums[1].get(name)]
    if different:
        raise UserError(f"{len(different)} tensors changed on the way: {', '.join(different[:5])}")
    return len(sums[0])


def _table(size: int, measured: list[Measured], tensors: int, killed: int) -> str:
    command = f"python -m experiments.benchmarks.conversion --preset={_PRESET.value} --directory=... --output=..."
    command += "".join(f" --{flag.name}" for flag in (_ZEROS, _BRIEF) if flag.value)
    values = "zeros" if _ZEROS.value else "random weights"
    rows = [
        f"| {line.title} | {line.seconds:.1f} | {size / 1e6 / line.seconds:.0f} | {line.peak:.2f} |"
        for line in measured
    ]
    lines = [
        f"# Conversion of a full-size transformer: {_PRESET.value}\n",
        f"    {command}\n",
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores; float32 {values}, {tensors} tensors, "
        f"{size / 1e9:.2f} GB.",
        "Peak memory: resident, of the whole process, as the system tells it. Seconds are of the whole program.\n",
        "| | seconds | MB/s | peak memory, GB |",
        "|---|---|---|---|",
        *rows,
        f"\nAll {tensors} tensors come back with the same type and the same bytes (SHA-256).",
    ]
    if killed:
        lines.append(f"The conversion that was killed (SIGKILL) had {killed} tensors done, and did not do them again.")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    """Makes, converts, kills, compares."""
    del argv
    directory = pathlib.Path(_DIRECTORY.value)
    directory.mkdir(parents=True)
    try:
        source, ours, back = directory / "varedit.pth", directory / "ours", directory / "published"
        size = _make(source)
        tensors = len(convert.mapping_of(preset(_PRESET.value), ["transformer"]))
        inwards = [f"--transformer={source}"]
        measured = [_measure("published .pth to ours", *inwards, f"--output={ours}")]
        killed = 0
        if not _BRIEF.value:
            shutil.rmtree(ours)
            killed = _kill_half_way(ours, tensors, *inwards)
            measured.append(_measure("the same, gone on with", *inwards, f"--output={ours}"))
        measured.append(_measure("checksums of ours verified", f"--verify={ours}"))
        outwards = ["--to=torch", f"--input={ours}", f"--output={back}"]
        for title, options in (("ours to .pth", []), ("ours to safetensors shards of 5 GB", ["--format=safetensors"])):
            if _BRIEF.value and options:
                break
            measured.append(_measure(title, *outwards, *options))
            same = _identical(ours, back)
            measured.append(_measure("checksums of that verified", f"--verify={back}"))
            shutil.rmtree(back)
        table = _table(size, measured, same, killed)
        print("\n" + table)
        if _OUTPUT.value:
            pathlib.Path(_OUTPUT.value).write_text(table)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    program.run(main)
