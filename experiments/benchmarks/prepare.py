"""Measures time and memory of prepare by size of the data set, and checks where every record ends up.

    python -m experiments.benchmarks.prepare --records=100000,1000000 --directory=/tmp/prepare --output=prepare.md

Makes small images in the tars of the VAREdit release, of which 1 % each are an exact duplicate, a near-duplicate, an
edit without a change and a truncated image; prepares them with every step that needs no endpoint; kills the first,
halfway through reading, and resumes. The directory needs three times the size of the tars (a million records: 12 GB)
and is removed at the end.
"""

import io
import itertools
import pathlib
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from absl import flags
from PIL import Image

from data_pipelines.reasons import Reason
from data_pipelines.shards import Records, read_index
from experiments.benchmarks import harness
from varedit_jax import command
from varedit_jax.errors import UserError
from varedit_jax.progress import Progress

_RECORDS = flags.DEFINE_list("records", ["20000", "100000"], "sizes of data sets")
_DIRECTORY = command.DEFINE_path("directory", None, "new directory to work in", local=True, required=True)
_WORKERS = flags.DEFINE_integer("workers", 1, "processes of prepare")
_OUTPUT = command.DEFINE_path("output", "", "Markdown file for the table")

_TAR = 10_000  # records
_SIDE = 32  # pixels
_ROUND = 100  # records, with each fault once, except in the first round
_WRONG = {0: Reason.EXACT, 1: Reason.NEAR, 2: Reason.UNCHANGED, 3: Reason.TRUNCATED}


class PreparedSet(NamedTuple):
    """Measurements of one data set."""

    records: int
    prepared: harness.Measured
    resumed: float | None  # seconds from the restart after a kill to the end; None without a kill
    opening: float  # seconds to open the index and read a record


def _jpeg(image_HW3: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image_HW3).save(file, "JPEG")
    return file.getvalue()


def _marked(jpeg: bytes, number: int) -> bytes:
    """Returns the same image in other bytes: with a comment."""
    return jpeg[:2] + b"\xff\xfe" + (2 + 8).to_bytes(2, "big") + b"%08d" % number + jpeg[2:]


def _triples(count: int) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yields source, target and instruction of each record."""
    draw = np.random.default_rng(0)
    before = (b"", b"", b"")  # the original of copies
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
    with Progress(total=count, desc="images", unit="record", mininterval=1) as bar:
        for index in range(-(-count // _TAR)):
            with tarfile.open(directory / f"{index:05d}.tar", "w") as tar:
                for number, (source, target, text) in itertools.islice(triples, _TAR):
                    for name, data in (("src.jpg", source), ("tgt.jpg", target), ("txt", text)):
                        info = tarfile.TarInfo(f"{number:08d}.{name}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
                    bar.update()


def _arguments(source: pathlib.Path, output: pathlib.Path) -> list[str]:
    return [
        "--source=varedit", f"--input={source}", f"--output={output}", "--min_side=16", "--min_change=3",
        "--near_bits=3", "--shard_mb=64", f"--workers={_WORKERS.value}",
    ]  # fmt: skip


def _measure(directory: pathlib.Path, count: int, with_kill: bool) -> PreparedSet:
    source, output, killed = directory / "in", directory / "out", directory / "killed"
    _make(source, count)
    prepared = harness.run_program("data_pipelines.prepare", *_arguments(source, output))

    def open_and_read() -> None:
        records = Records(output, "train")
        assert records[len(records) // 2]

    opening, _ = harness.timed(open_and_read)
    _check(output, count)
    resumed = _kill_and_resume(source, output, killed, -(-count // _TAR) // 2) if with_kill else None
    for path in (source, output, killed):
        shutil.rmtree(path, ignore_errors=True)
    return PreparedSet(count, prepared, resumed, opening)


def _kill_and_resume(source: pathlib.Path, output: pathlib.Path, killed: pathlib.Path, tars: int) -> float:
    """Kills prepare after `tars` tars; returns the seconds of the resumed run, whose output must be the same."""
    arguments = _arguments(source, killed)
    staging = killed.with_name(f".{killed.name}.partial") / "scan"
    harness.kill_program(
        lambda: staging.exists() and sum(path.name[0] != "." for path in staging.iterdir()) >= tars,
        "more --records",
        "data_pipelines.prepare",
        *arguments,
    )
    seconds, _ = harness.run_program("data_pipelines.prepare", *arguments)
    if subprocess.run(["diff", "-r", str(output), str(killed)]).returncode:
        raise UserError("the output of the killed and resumed run differs")
    return seconds


def _check(output: pathlib.Path, count: int) -> None:
    """Raises UserError if a record did not end up where it should."""
    wrong = count // _ROUND - 1
    text = (output / "report" / "quarantine.jsonl").read_text()
    found = {reason: text.count(f'"reason": "{reason}"') for reason in _WRONG.values()}
    kept = sum(split["records"] for split in read_index(output)["splits"].values())
    if any(number != wrong for number in found.values()) or kept != count - wrong * len(_WRONG):
        raise UserError(f"of {count} records {kept} stayed, and left: {found}; it should be {wrong} each")


def main(argv: list[str]) -> None:
    """Makes, prepares, kills, resumes."""
    del argv
    with harness.scratch_directory(_DIRECTORY.value) as directory:
        measured = [_measure(directory, int(count), with_kill=n == 0) for n, count in enumerate(_RECORDS.value)]
    rows = [
        (
            f"{row.records:,}",
            f"{row.prepared.seconds:.0f}",
            f"{row.records / row.prepared.seconds:.0f}",
            f"{row.prepared.peak_bytes / 1e6:.0f}",
            "" if row.resumed is None else f"{row.resumed:.0f}",
            f"{row.opening:.3f}",
        )
        for row in measured
    ]
    head = ("records", "seconds", "records/s", "peak memory, MB", "seconds after a kill halfway through reading")
    text = harness.report(
        "Prepare",
        harness.command_line("experiments.benchmarks.prepare", _RECORDS, _DIRECTORY, _WORKERS, _OUTPUT),
        f"Pairs of JPEGs of {_SIDE} px, {_WORKERS.value} process(es), all steps but the vision-language filter.",
        harness.table((*head, "seconds to open the index and read a record"), rows),
        "Every record ended up where it should: 1 % each were removed as exact duplicate, near-duplicate, edit without "
        "a change and truncated image. The killed (SIGKILL) and resumed run has the same bytes.",
    )
    harness.publish(text, _OUTPUT.value)


if __name__ == "__main__":
    command.run(main)
