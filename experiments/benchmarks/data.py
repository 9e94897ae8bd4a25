"""Measures the loader on this machine: against an upper limit and a peer, and with a million records.

    python -m experiments.benchmarks.data --directory=/tmp/data --peer_python=PEER/bin/python --output=data.md

Makes JPEG pairs of 1024 x 768 px, as prepared records and as WebDataset tars. Each contestant turns them into batches
in its own process, round by round: bare Pillow that only decodes and resizes images in memory (the limit), the loader
with threads and with worker processes, and a PyTorch DataLoader over the tars. PEER is an environment with torch,
webdataset and the same release of pillow; without it there is no peer. Each figure is printed as it is measured, and
kept beside the output, in data.jsonl. The directory is removed at the end.
"""

import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from data_pipelines import loader
from data_pipelines.record import Record
from data_pipelines.shards import Records, ShardWriter, shard_path, write_index
from experiments import program
from experiments.benchmarks import data_peer as peer
from experiments.benchmarks import harness
from varedit_jax import command
from varedit_jax.config import DataConfig, EditorConfig, PixelBudget
from varedit_jax.errors import UserError
from varedit_jax.progress import Progress
from varedit_jax.scales import aspect_templates
from varedit_jax.storage import paths
from varedit_jax.text.vocabulary import Vocabulary

_DIRECTORY = command.DEFINE_path("directory", None, "new directory to work in", local=True, required=True)
_PEER = command.DEFINE_path("peer_python", "", "Python of an environment with torch, webdataset and pillow", local=True)
_PAIRS = flags.DEFINE_integer("pairs", 512, "pairs on disk")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "rounds, whose median counts")
_BATCHES = flags.DEFINE_integer("batches", 32, "timed batches per round")
_RECORDS = flags.DEFINE_integer("records", 1_000_000, "small records, for index and resume")
_OUTPUT = command.DEFINE_path("output", "", "Markdown file for the tables")
_TURN = flags.DEFINE_string("turn", "", "internal: measures one contestant, threads|workers:BUDGET")

BATCH = 16
WARM_UP = 6
AHEAD = 4  # prefetched batches: few, because they are made before the clock starts
CORES = os.cpu_count() or 1
PIXELS = (1024, 768)  # width and height of the images: both sizes below need a true resize
SIZES = {256: "0.06M", 512: "0.25M"}  # pixels -> budget of the model


def _photo(draw: np.random.Generator) -> Image.Image:
    """Returns an image with details of every size, about as many bytes as a photo."""
    width, height = PIXELS
    pixels = draw.normal(0, 3, (height, width, 3))
    for cell, weight in ((8, 0.25), (32, 0.35), (128, 0.4)):
        coarse = Image.fromarray(draw.integers(0, 256, (height // cell, width // cell, 3), np.uint8))
        pixels += weight * np.asarray(coarse.resize(PIXELS, Image.Resampling.BICUBIC), np.float64)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def _make_pairs(directory: pathlib.Path, shards: int = 4) -> None:
    """Writes the same pairs as prepared records and as tars."""
    draw = np.random.default_rng(0)
    for shard in range(shards):
        path = shard_path(directory / "records" / "train", "pairs", shard, shards)
        with tarfile.open(directory / f"pairs-{shard}.tar", "w") as tar, ShardWriter(path) as writer:
            for number in Progress(range(_PAIRS.value // shards), desc=f"pairs {shard + 1}/{shards}"):
                image = _photo(draw)
                source, target = _jpeg(image), _jpeg(image.transpose(Image.Transpose.ROTATE_180))
                name, text = f"{shard}{number:06d}", f"turn image {number} upside down"
                record = Record(id=name, dataset="pairs", source=source, target=target, instructions=(text,))
                writer.write(record, image.size)
                for suffix, data in (("src.jpg", source), ("tgt.jpg", target), ("txt", text.encode())):
                    member = tarfile.TarInfo(f"{name}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    write_index(directory / "records")


def _open(directory: pathlib.Path, budget: PixelBudget, **fields: Any) -> loader.Batches:
    mixture = ((str(directory), 1.0),)
    data = DataConfig(
        name="records", mixture=mixture, batch_size=BATCH, text_tokens=64, prefetch_batches=AHEAD, **fields
    )
    source = loader.open_records(data, "train", EditorConfig(pixel_budget=budget))
    return loader.training_batches(data, Vocabulary.load(), source)


def _turn(kind: str, budget: Any) -> dict[str, float]:
    """Measures the loader with threads or workers."""
    fields = {"read_threads": CORES} if kind == "threads" else {"read_threads": 1, "workers": CORES}
    batches = _open(paths.local(_DIRECTORY.value, "--directory") / "records", budget, **fields)
    for _ in range(WARM_UP):
        next(batches)
    wall, cpu = time.perf_counter(), peer.cpu_seconds()
    for _ in range(_BATCHES.value):
        next(batches)
    measured = {"seconds": time.perf_counter() - wall, "cpu_seconds": peer.cpu_seconds() - cpu}
    batches.close()
    return measured


def _call(*command: str) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _contestants(directory: pathlib.Path, size: int) -> dict[str, list[str]]:
    """Returns the commands for one size by title, the limit first."""
    ours = [sys.executable, "-m", "experiments.benchmarks.data"]
    ours += [f"--directory={directory}", f"--batches={_BATCHES.value}"]
    numbers = [str(number) for number in (size, BATCH, _BATCHES.value, WARM_UP, CORES, AHEAD // CORES)]
    found = {
        "bare Pillow, decode and resize": [sys.executable, peer.__file__, "limit", str(directory), *numbers],
        "loader, threads": [*ours, f"--turn=threads:{SIZES[size]}"],
        "loader, worker processes": [*ours, f"--turn=workers:{SIZES[size]}"],
    }
    if _PEER.value:
        python = str(paths.local(_PEER.value, "--peer_python"))
        harness.check_pillow(python)
        command = [python, peer.__file__, "webdataset", str(directory), *numbers]
        found["PyTorch DataLoader over WebDataset"] = command
    return found


def _race(directory: pathlib.Path, size: int, keep: Callable[[dict[str, Any]], None]) -> list[tuple[object, ...]]:
    """Returns the rows of the table for one size; `keep` gets each figure as it is measured."""
    contestants = _contestants(directory, size)
    images = 2 * BATCH * _BATCHES.value
    rates: dict[str, list[tuple[float, float]]] = {title: [] for title in contestants}  # images/s, wall and processor
    for number in range(_ROUNDS.value):
        for title, arguments in contestants.items():
            turn = _call(*arguments)
            rates[title].append((images / turn["seconds"], images / turn["cpu_seconds"]))
            keep({"size": size, "round": number, "contestant": title} | turn)
    limit, *_ = rates.values()
    return [(f"{size} px", title, *harness.compared(taken, limit)) for title, taken in rates.items()]


def _many(directory: pathlib.Path) -> list[tuple[str, str]]:
    """Returns rows about index, shuffling and resuming with many records."""
    count, shards = _RECORDS.value, 16
    tiny = _jpeg(Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)))
    draw = np.random.default_rng(1)
    for shard in Progress(range(shards), desc="small records", unit="shard"):
        with ShardWriter(shard_path(directory / "train", "small", shard, shards)) as writer:
            for number in range(count * shard // shards, count * (shard + 1) // shards):
                size = (int(draw.integers(256, 1024)), int(draw.integers(256, 1024)))  # matters for the buckets only
                record = Record(id=str(number), dataset="small", source=tiny, target=tiny, instructions=(str(number),))
                writer.write(record, size)
    writing, _ = harness.timed(write_index, directory)
    opening, _ = harness.timed(Records, directory, "train")
    aspects = tuple(aspect_templates())
    planning, batches = harness.timed(_open, directory, "0.06M", aspects=aspects, read_threads=0)
    state, taken = batches.get_state(), []
    for step in np.random.default_rng(2).integers(0, 100 * count // BATCH, 10).tolist():
        batches.set_state(state | {"next_step": step})
        taken.append(harness.timed(next, batches)[0])
    resuming = f"first batch of {BATCH} after resuming anywhere in 100 epochs"
    return [
        (f"writing the index of {count:,} records", f"{writing:.2f}"),
        ("opening it", f"{opening:.3f}"),
        ("opening it and planning the batches of 15 aspects", f"{planning:.3f}"),
        (f"{resuming}, median of 10", f"{statistics.median(taken):.3f}"),
        ("the same, slowest", f"{max(taken):.3f}"),
    ]


def main(argv: list[str]) -> None:
    """Makes images, measures all contestants, and writes the tables."""
    del argv
    if _TURN.value:
        print(json.dumps(_turn(*_TURN.value.split(":"))))
        return
    with harness.scratch_directory(_DIRECTORY.value) as directory, harness.kept_figures(_OUTPUT.value) as keep:
        _make_pairs(directory)
        rows = [row for size in SIZES for row in _race(directory, size, keep)]
        many = _many(directory / "small")
    text = harness.report(
        "Throughput of the loader",
        harness.command_line(
            "experiments.benchmarks.data", _DIRECTORY, _PEER, _PAIRS, _ROUNDS, _BATCHES, _RECORDS, _OUTPUT
        ),
        f"{_PAIRS.value} pairs of JPEGs of {PIXELS[0]} x {PIXELS[1]} px, resized to cover the size (Lanczos), the "
        f"center cropped, batches of {BATCH} pairs, {CORES} threads or processes; {_BATCHES.value} batches per turn. "
        f"In each of {_ROUNDS.value} rounds one contestant runs after the other. Figures are medians; ratios are to "
        "the limit of the same round, with their range. Images per processor second count all processes, and depend "
        "less on what else runs.",
        harness.table(("to", "", "images/s", "images / processor second", "of the limit", "of it, by processor"), rows),
        harness.table(("", "seconds"), many),
    )
    harness.publish(text, _OUTPUT.value)


if __name__ == "__main__":
    program.run(main)
