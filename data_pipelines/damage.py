"""Checks of a record's images, and the quarantine file that lists what was left out."""

import collections
import io
from collections.abc import Callable
from typing import TypeVar

from PIL import Image

from data_pipelines.reasons import LeftOut, Reason
from data_pipelines.record import Record
from varedit_jax.images import ImageError, Limits, open_image
from varedit_jax.storage.disk import read_explained
from varedit_jax.storage.jsonl import LineWriter, read_lines
from varedit_jax.storage.paths import PathLike, resolve

# Smaller images are placeholders or tracking pixels; a JPEG cannot be larger; templates end at a ratio of 3.
LIMITS = Limits(min_side=16, max_side=65_500, max_ratio=8.0)
SIDES = ("source", "target")

Seen = TypeVar("Seen")


class Damaged(LeftOut):
    """A record that cannot be used."""


def check_record(record: Record, see: Callable[[str, Image.Image], Seen]) -> dict[str, Seen]:
    """Opens both images of a record; returns the results of `see(side, image)` by side.

    Raises Damaged if the record has no instruction, or if an image cannot be used (`see` may raise ImageError).
    """
    if not record.instructions or not record.instructions[0].strip():
        raise Damaged(Reason.INSTRUCTION)
    seen = {}
    for side in SIDES:
        try:
            seen[side] = see(side, open_image(io.BytesIO(getattr(record, side)), limits=LIMITS))
        except ImageError as error:
            detail = f"{side}: {error.detail}" if error.detail else side
            raise Damaged(Reason(error.fault), detail) from error
    return seen


class Quarantine:
    """A JSONL file of what was left out, one line per record, without repeats: id, data set, reason, detail."""

    def __init__(self, path: PathLike | None) -> None:
        """Appends to the file, which is created by the first record; without a path, records are only counted."""
        self.counts: collections.Counter[str] = collections.Counter()  # of `add`, by reason
        self._path = None if path is None else resolve(path)
        self._known: set[tuple[str, str]] = set()
        self._lines: LineWriter | None = None

    def add(self, *, id: str, dataset: str, reason: str, detail: str = "") -> None:
        """Counts a record and lists it unless it is listed already. Raises UserError if the disk is full."""
        self.counts[str(reason)] += 1
        if self._path is None:
            return
        if self._lines is None:
            with read_explained(str(self._path)):
                self._known = {(line["dataset"], line["id"]) for line in read_lines(self._path)}
            self._lines = LineWriter(self._path)
        if (dataset, id) not in self._known:
            self._known.add((dataset, id))
            self._lines.append({"id": id, "dataset": dataset, "reason": str(reason), "detail": detail})

    def summary(self) -> str:
        """Returns counts by reason as text, the most frequent first."""
        return ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())

    def close(self) -> None:
        """Closes the file."""
        if self._lines is not None:
            self._lines.close()
