"""Measures how prepare grows with its data set: memory, time, and whether every record is where it should be.

    python -m experiments.benchmarks.prepare --records=100000,1000000 --directory=/tmp/prepare --output=prepare.md

Makes small images in the tars of the VAREdit release, one of a hundred each a copy, nearly a copy, an edit that
changed nothing and an image cut short; prepares them with every step that needs no endpoint; kills the first, half
way through reading, and goes on. The directory takes three times the tars (a million records: 12 GB) and is removed.
"""

import io
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tqdm
from absl import flags
from PIL import Image

from data_pipelines.reasons import Reason
from data_pipelines.shards import Records, read_index
from varedit_jax import command
from varedit_jax.errors import UserError

_RECORDS = flags.DEFINE_list("records", ["20000", "100000"], "sizes of data sets")
_DIRECTORY = flags.DEFINE_string("directory", None, "new directory to work in", required=True)
_WORKERS = flags.DEFINE_integer("workers", 1, "processes of prepare")
_OUTPUT = flags.DEFINE_string("output", "", "Markdown file for the table")

_TAR = 10_000  # records
_SIDE = 32  # pixels
_ROUND = 100  # records, in which each thing that is wrong comes once, the first round aside
_WRONG = {0: Reason.EXACT, 1: Reason.NEAR, 2: Reason.UNCHANGED, 3: Reason.TRUNCATED}


class Measured(NamedTuple):
    """One data set."""

    records: int
    seconds: float
    peak: float  # MB, resident, of all processes together
    again: float  # seconds from going on after a kill to the end; 0 if there was none
    opening: float  # seconds until the index is open and a record of it read


def _jpeg(image_HW3: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image_HW3).save(file, "JPEG")
    return file.getvalue()


def _marked(jpeg: bytes, number: int) -> bytes:
    """The same pixels in other bytes: with a comment."""
    return jpeg[:2] + b"\xff\xfe" + (2 + 8).to_bytes(2, "big") + b"%08d" % number + jpeg[2:]


def _triples(count: int) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Source, target and instruction of each record."""
    draw = np.random.default_rng(0)
    before = (b"", b"", b"")  # what copies are of
    for number in range(count):
        wrong = _WRONG.get(number % _ROUND) if number >= _ROUND else None
        if wrong is Reason.EXACT:
            yield before
        elif wrong is Reason.NEAR:
            yield _marked(before[0], number), *before[1:]
        else:
            cells = Image.fromarray(draw.integers(0, 256, (4, 4, 3), np.uint8))
            image = np.array(cells.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))
            source = _jpeg(image)
            image[8:20, 8:20] = 255 - image[8:20, 8:20] // 2
            text = b"make it number %d" % (number % 1000)
            if wrong is Reason.UNCHANGED:
                yield source, source, text
            elif wrong is Reason.TRUNCATED:
                yield source[:500], _jpeg(image), text
            else:
                before = source, _jpeg(image), text
                yield before


def _make(directory: pathlib.Path, count: int) -> None:
    directory.mkdir()
    triples = enumerate(_triples(count))
    with tqdm.tqdm(total=count, desc="images", unit="record", mininterval=1) as bar:
        for index in range(-(-count // _TAR)):
            with tarfile.open(directory / f"{index:05d}.tar", "w") as tar:
                for number, (source, target, text) in itertools.islice(triples, _TAR):
                    for name, data in (("src.jpg", source), ("tgt.jpg", target), ("txt", text)):
                        info = tarfile.TarInfo(f"{number:08d}.{name}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
                    bar.update()


class _Memory:
    """Watches a process and those that it starts."""

    def __init__(self, pid: int) -> None:
        self.peak = 0  # bytes
        self._pid = pid
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Memory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.2):
            self.peak = max(self.peak, sum(map(_resident, _family(self._pid))))


def _family(pid: int) -> list[int]:
    try:
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        others = [
            child
            for thread in pathlib.Path(f"/proc/{pid}/task").iterdir()
            if thread.name != str(pid)
            for child in (thread / "children").read_text().split()
        ]
    except OSError:  # it has ended
        return []
    return [pid, *(found for child in (*children, *others) for found in _family(int(child)))]


def _resident(pid: int) -> int:
    try:
        return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _command(source: pathlib.Path, output: pathlib.Path) -> list[str]:
    return [
        sys.executable, "-m", "data_pipelines.prepare", "--source=varedit", f"--input={source}", f"--output={output}",
        "--min_side=16", "--min_change=3", "--near_bits=3", "--shard_mb=64", f"--workers={_WORKERS.value}",
    ]  # fmt: skip


def _measure(directory: pathlib.Path, count: int, with_kill: bool) -> Measured:
    source, output, killed = directory / "in", directory / "out", directory / "killed"
    _make(source, count)
    start = time.perf_counter()
    child = subprocess.Popen(_command(source, output))
    with _Memory(child.pid) as memory:
        status = child.wait()
    seconds = time.perf_counter() - start
    if status:
        raise UserError("prepare failed; what it said is above")
    start = time.perf_counter()
    records = Records(output, "train")
    assert records[len(records) // 2]
    opening = time.perf_counter() - start
    _check(output, count)

    again = 0.0 if not with_kill else _kill_and_go_on(source, output, killed, -(-count // _TAR) // 2)
    for path in (source, output, killed):
        shutil.rmtree(path, ignore_errors=True)
    return Measured(count, seconds, memory.peak / 1e6, again, opening)


def _kill_and_go_on(source: pathlib.Path, output: pathlib.Path, killed: pathlib.Path, tars: int) -> float:
    """Kills prepare once some tars are read; seconds that it then takes to the end, which is to be the same."""
    child = subprocess.Popen(_command(source, killed))
    staging = killed.with_name(f".{killed.name}.partial") / "scan"
    while not staging.exists() or sum(path.name[0] != "." for path in staging.iterdir()) < tars:
        if child.poll() is not None:
            raise UserError("prepare was over before it could be killed")
        time.sleep(0.05)
    for pid in reversed(_family(child.pid)):
        os.kill(pid, signal.SIGKILL)
    child.wait()
    start = time.perf_counter()
    subprocess.run(_command(source, killed), check=True)
    seconds = time.perf_counter() - start
    if subprocess.run(["diff", "-r", str(output), str(killed)]).returncode:
        raise UserError("what was killed and gone on with differs")
    return seconds


def _check(output: pathlib.Path, count: int) -> None:
    """Raises UserError if a record is not where it should be."""
    wrong = count // _ROUND - 1
    text = (output / "report" / "quarantine.jsonl").read_text()
    found = {reason: text.count(f'"reason": "{reason}"') for reason in _WRONG.values()}
    kept = sum(split["records"] for split in read_index(output)["splits"].values())
    if any(number != wrong for number in found.values()) or kept != count - wrong * len(_WRONG):
        raise UserError(f"of {count} records {kept} stayed, and left: {found}; it should be {wrong} each")


def main(argv: list[str]) -> None:
    """Makes, prepares, kills, goes on."""
    del argv
    directory = pathlib.Path(_DIRECTORY.value)
    directory.mkdir(parents=True)
    try:
        measured = [_measure(directory, int(count), with_kill=n == 0) for n, count in enumerate(_RECORDS.value)]
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    rows = [
        f"| {line.records:,} | {line.seconds:.0f} | {line.records / line.seconds:.0f} | {line.peak:.0f} | "
        f"{f'{line.again:.0f}' if line.again else ''} | {line.opening:.3f} |"
        for line in measured
    ]
    lines = [
        "# Prepare\n",
        f"    python -m experiments.benchmarks.prepare --records={','.join(_RECORDS.value)} "
        "--directory=... --output=...\n",
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores; pairs of JPEGs of {_SIDE} px, {_WORKERS.value} "
        f"process(es), all steps but the vision-language filter.\n",
        "| records | seconds | records/s | peak memory, MB | seconds after a kill half way through reading | "
        "seconds to open the index and read a record |",
        "|---|---|---|---|---|---|",
        *rows,
        "\nEvery record was where it should be: one of a hundred each left as exact duplicate, near-duplicate, edit "
        "that changed nothing and image cut short. What was killed (SIGKILL) and gone on with has the same bytes.",
    ]
    print("\n".join(lines))
    if _OUTPUT.value:
        pathlib.Path(_OUTPUT.value).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    command.run(main)
