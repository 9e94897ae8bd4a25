"""A few records of each data set and reason, with small images, for the report's image sheet."""

import bisect
import collections
import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Self

import msgpack
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipelines.damage import Damaged, check_record
from data_pipelines.preparation.fingerprints import digest
from data_pipelines.record import Record
from varedit_jax.contact_sheet import SheetRow
from varedit_jax.images import load_image, upright_rgb

EACH = 3  # of a data set and a reason
_SIDE = 144  # pixels


@dataclasses.dataclass(frozen=True, order=True)
class SampledRecord:
    """A record in small."""

    order: int  # the lowest of all records are shown, whatever the order in which they come
    dataset: str
    id: str
    instruction: str
    reason: str
    images: tuple[bytes, bytes]  # source and target, uint8 [144, 144, 3]

    def row(self) -> SheetRow:
        """A row of a contact sheet."""
        images = [np.frombuffer(data, np.uint8).reshape(_SIDE, _SIDE, 3) for data in self.images]
        return SheetRow(images=images, instruction=self.instruction[:160], kind=self.reason, note=self.id[-48:])


class SampleKeeper:
    """Keeps `EACH` of every data set and reason among the records it is offered; as a context manager, in a file."""

    def __init__(self, path: pathlib.Path | None = None) -> None:
        self._path = path
        self._kept: dict[tuple[str, str], list[SampledRecord]] = collections.defaultdict(list)

    def __enter__(self) -> Self:
        """Self."""
        return self

    def __exit__(self, *error: object) -> None:
        """Writes the file."""
        if self._path is not None:
            self._path.write_bytes(msgpack.packb([dataclasses.astuple(sample) for sample in self]))

    def __iter__(self):  # type: ignore[no-untyped-def]
        """Samples by data set and reason."""
        for name in sorted(self._kept):
            yield from self._kept[name]

    def offer(self, record: Record, reason: str) -> None:
        """Takes a record if it is among the lowest so far; one whose images cannot be decoded is passed over."""
        order = digest(reason.encode(), record.key.encode())
        kept = self._kept[record.dataset, reason]
        if len(kept) == EACH and order >= kept[-1].order:
            return
        try:
            images = check_record(record, lambda _, image: _small(image))
        except Damaged:
            return
        both = (images["source"], images["target"])
        self.add([SampledRecord(order, record.dataset, record.id, record.instructions[0], reason, both)])

    def add(self, samples: Iterable[SampledRecord]) -> None:
        """Takes what another keeper kept."""
        for sample in samples:
            kept = self._kept[sample.dataset, sample.reason]
            bisect.insort(kept, sample)
            del kept[EACH:]


def read_samples(path: pathlib.Path) -> list[SampledRecord]:
    """Reads the file of a keeper."""
    return [
        SampledRecord(*values[:-1], images=tuple(values[-1]))  # type: ignore[misc]
        for values in msgpack.unpackb(path.read_bytes())
    ]


def _small(image: Image.Image) -> bytes:
    """An opened image in the middle of a square, uint8 [144, 144, 3] as bytes. Raises ImageError."""
    image.draft("RGB", (2 * _SIDE, 2 * _SIDE))
    load_image(image)
    return square(upright_rgb(image), _SIDE).tobytes()


def square(image_HW3: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """An image reduced or enlarged to fit into a square of the page's gray: uint8 [side, side, 3]."""
    height, width = image_HW3.shape[:2]
    factor = side / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    page = Image.new("RGB", (side, side), (236, 238, 241))
    filter = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST
    page.paste(Image.fromarray(image_HW3).resize(size, filter), ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.asarray(page)
