"""The first step: a part of a data set is read, each record looked at alone, and what stays is kept for the others.

A part becomes a directory, with the files of `facts.PartFiles`. One record is in memory at a time, and the few samples.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from numpy.typing import NDArray
from PIL import Image

from data_pipelines.damage import Damaged, check_record
from data_pipelines.preparation.filters import check_change, check_size, check_text
from data_pipelines.preparation.fingerprints import FACTS, FactsWriter, PartFiles, hashes
from data_pipelines.preparation.perceptual_hash import Look
from data_pipelines.preparation.samples import SampleKeeper
from data_pipelines.preparation.settings import Settings
from data_pipelines.reasons import LeftOut
from data_pipelines.record import Record, encode
from data_pipelines.sources import Part, Refused, read_part
from varedit_jax.images import load_image, upright_rgb, upright_size
from varedit_jax.storage.files import new_directory


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanTask:
    """Reading one part."""

    part: Part
    settings: Settings
    directory: pathlib.Path  # of its files

    def is_done(self) -> bool:
        """Whether it has been read."""
        return self.directory.exists()


def scan(task: ScanTask) -> None:
    """Reads a part. Raises UserError if its files are of another format, or the disk is full."""
    with new_directory(task.directory) as directory:
        files = PartFiles(directory)
        counts: dict[str, collections.Counter[str]] = {}
        datasets: list[str] = []
        writer = ArrayRecordWriter(str(files.records), "group_size:1,uncompressed")
        try:
            with (
                FactsWriter(files) as facts,
                files.left.open("w", encoding="utf-8") as left,
                SampleKeeper(files.samples) as samples,
            ):

                def leave(id: str, dataset: str, reason: str, detail: str) -> None:
                    counts[dataset][reason] += 1
                    line = {"id": id, "dataset": dataset, "reason": reason, "detail": detail}
                    left.write(json.dumps(line, ensure_ascii=False) + "\n")

                for entry in read_part(task.part):
                    counts.setdefault(entry.dataset, collections.Counter())["read"] += 1
                    if isinstance(entry, Refused):
                        leave(entry.id, entry.dataset, str(entry.reason), entry.detail)
                        continue
                    try:
                        row = examine(entry, task.settings)
                    except LeftOut as left_out:
                        leave(entry.id, entry.dataset, str(left_out.reason), left_out.detail)
                        if not isinstance(left_out, Damaged):
                            samples.offer(entry, str(left_out.reason))
                        continue
                    if not entry.original:
                        entry = dataclasses.replace(entry, original=hashlib.sha256(entry.source).hexdigest())
                        row["original"] = hashes(entry)["original"]
                    if entry.dataset not in datasets:
                        datasets.append(entry.dataset)
                    data = encode(entry)
                    row["dataset"], row["nbytes"] = datasets.index(entry.dataset), len(data)
                    writer.write(data)
                    facts.write(entry, row)
        finally:
            writer.close()
        files.counts.write_text(json.dumps({"datasets": datasets, "counts": counts}))


def examine(record: Record, settings: Settings) -> NDArray[Any]:
    """A record's row of FACTS, [], without data set and number of bytes, if it may stay.

    Raises Damaged for what cannot be used, LeftOut for what is not wanted.
    """
    check_text(record, settings)
    row = np.zeros((), FACTS)
    looks: dict[str, Look] = {}

    def see(side: str, image: Image.Image) -> tuple[int, int]:
        size = upright_size(image)
        check_size(side, size, settings)
        if settings.decode:
            load_image(image)
            if settings.looks:
                looks[side] = Look.of(upright_rgb(image))
        return size

    row["width"], row["height"] = check_record(record, see)["source"]
    if settings.looks:
        check_change(looks["source"], looks["target"], settings)
        for side, look in looks.items():
            row[f"{side}_shape"], row[f"{side}_colors"] = look.shape, look.colors
    for name, value in hashes(record).items():
        row[name] = value
    return row
