"""The check of a record, whose images may be unusable; and the file that keeps the names of what was left out."""

import collections
import contextlib
import io
import json
import os
import pathlib
from collections.abc import Callable
from typing import BinaryIO, Self, TypeVar

from PIL import Image

from data_pipelines.reasons import LeftOut, Reason
from data_pipelines.record import Record
from varedit_jax.images import ImageError, Limits, open_image
from varedit_jax.training.run_config import make_directory, room_explained

# Smaller images are placeholders or tracking pixels; a JPEG cannot be larger; templates end at a ratio of 3.
LIMITS = Limits(min_side=16, max_side=65_500, max_ratio=8.0)
SIDES = ("source", "target")

Seen = TypeVar("Seen")


class Damaged(LeftOut):
    """A record that cannot be used."""


def check_record(record: Record, see: Callable[[str, Image.Image], Seen]) -> dict[str, Seen]:
    """Opens both images of a record; returns `see(side, image)` of each.

    Raises Damaged if the record does not say what to do, or an image cannot be used, which `see` may find, too.
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
    """A JSONL file of what was left out, a line a record: id, data set, reason, detail. A record is written once."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        """Goes on with the file, if there is one, and makes it when there is something to write; None only counts."""
        self.counts: collections.Counter[str] = collections.Counter()  # of `add`, by reason
        self._path = None if path is None else pathlib.Path(path)
        self._known: set[tuple[str, str]] = set()
        self._file: BinaryIO | None = None

    def add(self, *, id: str, dataset: str, reason: str, detail: str = "") -> None:
        """Counts a record, and writes it down unless it is there already. Raises UserError if the disk is full."""
        self.counts[str(reason)] += 1
        if self._path is None:
            return
        with room_explained("list of bad records", self._path.parent):
            file = self._file or self._open(self._path)
            if (dataset, id) not in self._known:
                self._known.add((dataset, id))
                line = {"id": id, "dataset": dataset, "reason": str(reason), "detail": detail}
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def _open(self, path: pathlib.Path) -> BinaryIO:
        make_directory(path.parent)
        if path.exists():
            self._known = {(line["dataset"], line["id"]) for line in read_quarantine(path)}
        # Unbuffered: what is written is not lost, however the process ends.
        self._file = file = path.open("ab", buffering=0)
        if file.tell() and not path.read_bytes().endswith(b"\n"):  # a kill cut the last line short
            file.write(b"\n")
        return file

    def summary(self) -> str:
        """Counts by reason as text, the most frequent first."""
        return ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        """Self."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the file."""
        self.close()


def read_quarantine(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Lines of a quarantine file; one that a kill cut short is left out."""
    lines = []
    for text in (
        pathlib.Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    ):  # ids may hold other ends of lines
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines
