"""The first stage: reads a part of a data set, filters single records and stages the others for the next stages.

A part becomes a directory with the files of `fingerprints.PartFiles`. One record is in memory at a time, beside the
samples.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipelines.damage import Damaged, check_record
from data_pipelines.preparation.filters import check_aspects, check_change, check_size, check_text
from data_pipelines.preparation.fingerprints import FACTS, PARTLY_UNKNOWN, FactsWriter, PartFiles, hashes
from data_pipelines.preparation.perceptual_hash import Look
from data_pipelines.preparation.samples import SampleKeeper
from data_pipelines.preparation.settings import Settings
from data_pipelines.preparation.staged import StagedWriter
from data_pipelines.reasons import LeftOut, Reason
from data_pipelines.record import Record, encode
from data_pipelines.sources import Part, Refused, read_part
from data_pipelines.sources.instructions import is_partly_unknown
from varedit_jax.images import load_image, orientation, upright_rgb, upright_size
from varedit_jax.storage.files import task_directory, write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanTask:
    """One part to scan."""

    part: Part
    settings: Settings
    directory: pathlib.Path  # for its files

    def is_done(self) -> bool:
        """Returns True if the part has been scanned."""
        return self.directory.exists()


def scan(task: ScanTask) -> None:
    """Scans a part. Raises UserError if its files have another format or cannot be read."""
    with task_directory(task.directory) as directory, _PartWriter(PartFiles(directory)) as part:
        for entry in read_part(task.part):
            part.counts[entry.dataset]["read"] += 1
            if isinstance(entry, Refused):
                part.leave(entry.id, entry.dataset, entry.reason, entry.detail)
                continue
            try:
                row = examine(entry, task.settings)
            except LeftOut as left_out:
                part.leave(entry.id, entry.dataset, left_out.reason, left_out.detail)
                if not isinstance(left_out, Damaged):
                    part.samples.offer(entry, left_out.reason)
                continue
            part.keep(entry, row)


class _PartWriter(contextlib.ExitStack):
    """Writes the files of a part."""

    def __init__(self, files: PartFiles) -> None:
        super().__init__()
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)  # by data set
        self._datasets: list[str] = []
        self._partly_unknown: collections.Counter[str] = collections.Counter()  # instructions, by data set
        self.callback(lambda: write_json(files.counts, self._summary()))
        self._records = self.enter_context(StagedWriter(files))
        self._facts = self.enter_context(FactsWriter(files))
        self._left = self.enter_context(files.left.open("w", encoding="utf-8"))
        self.samples = self.enter_context(SampleKeeper(files.samples))

    def _summary(self) -> dict[str, Any]:
        return {"datasets": self._datasets, "counts": self.counts, PARTLY_UNKNOWN: self._partly_unknown}

    def leave(self, id: str, dataset: str, reason: Reason, detail: str) -> None:
        """Counts and lists a dropped record."""
        self.counts[dataset][reason] += 1
        line = {"id": id, "dataset": dataset, "reason": reason, "detail": detail}
        self._left.write(json.dumps(line, ensure_ascii=False) + "\n")

    def keep(self, record: Record, row: NDArray[Any]) -> None:
        """Stores a record and its row, FACTS [], completed with data set, original and place."""
        if not record.original:
            record = dataclasses.replace(record, original=hashlib.sha256(record.source).hexdigest())
            row["original"] = hashes(record)["original"]
        if record.dataset not in self._datasets:
            self._datasets.append(record.dataset)
        self._partly_unknown[record.dataset] += is_partly_unknown(record.instructions[0])
        row["dataset"] = self._datasets.index(record.dataset)
        self._records.write(encode(record), row)
        self._facts.write(record, row)


def examine(record: Record, settings: Settings) -> NDArray[Any]:
    """Returns the row of a record that passes the filters, FACTS [], without data set and place.

    Raises Damaged for an unusable record, LeftOut for an unwanted one.
    """
    check_text(record, settings)
    row = np.zeros((), FACTS)
    looks: dict[str, Look] = {}

    def see(side: str, image: Image.Image) -> tuple[tuple[int, int], int]:
        size, turn = upright_size(image), orientation(image)  # as stored: loading a TIFF turns it
        check_size(side, size, settings)
        if settings.decode:
            load_image(image)
            if settings.looks:
                looks[side] = Look.of(upright_rgb(image))
        return size, turn

    seen = check_record(record, see)
    (row["width"], row["height"]), row["source_turn"] = seen["source"]
    (row["target_width"], row["target_height"]), row["target_turn"] = seen["target"]
    check_aspects(seen["source"][0], seen["target"][0], settings)
    if settings.looks:
        check_change(looks["source"], looks["target"], settings)
        for side, look in looks.items():
            row[f"{side}_shape"], row[f"{side}_colors"] = look.shape, look.colors
    for name, value in hashes(record).items():
        row[name] = value
    return row
