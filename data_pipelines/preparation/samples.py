"""Sample records of each data set and reason, with thumbnails, for the report's image sheet."""

import bisect
import collections
import contextlib
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

EACH = 3  # samples per data set and reason
_SIDE = 144  # pixels


@dataclasses.dataclass(frozen=True, order=True)
class SampledRecord:
    """A record with thumbnails."""

    order: int  # a hash: the lowest are shown, in whatever order records come
    dataset: str
    id: str
    instruction: str
    reason: str
    images: tuple[bytes, bytes]  # source and target, uint8 [144, 144, 3]

    def row(self) -> SheetRow:
        """Returns a row of a contact sheet."""
        images = [np.frombuffer(data, np.uint8).reshape(_SIDE, _SIDE, 3) for data in self.images]
        return SheetRow(images=images, instruction=self.instruction[:160], kind=self.reason, note=self.id[-48:])


class SampleKeeper:
    """Keeps `EACH` of the offered records per data set and reason; as a context manager, writes them to a file."""

    def __init__(self, path: pathlib.Path | None = None) -> None:
        self._path = path
        self._kept: dict[tuple[str, str], list[SampledRecord]] = collections.defaultdict(list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._path is not None:
            self._path.write_bytes(msgpack.packb([dataclasses.astuple(sample) for sample in self]))

    def __iter__(self):  # type: ignore[no-untyped-def]
        for name in sorted(self._kept):
            yield from self._kept[name]

    def offer(self, record: Record, reason: str) -> None:
        """Keeps a record if it is among the lowest so far and its images can be decoded."""
        order = digest(reason.encode(), record.key.encode())
        kept = self._kept[record.dataset, reason]
        if len(kept) == EACH and order >= kept[-1].order:
            return
        with contextlib.suppress(Damaged):
            images = check_record(record, lambda _, image: _small(image))
            both = (images["source"], images["target"])
            self.add([SampledRecord(order, record.dataset, record.id, record.instructions[0], reason, both)])

    def add(self, samples: Iterable[SampledRecord]) -> None:
        """Merges samples of another keeper."""
        for sample in samples:
            kept = self._kept[sample.dataset, sample.reason]
            bisect.insort(kept, sample)
            del kept[EACH:]


def read_samples(path: pathlib.Path) -> list[SampledRecord]:
    """Returns the samples in a keeper's file."""
    return [
        SampledRecord(*values[:-1], images=tuple(values[-1]))  # type: ignore[misc]
        for values in msgpack.unpackb(path.read_bytes())
    ]


def _small(image: Image.Image) -> bytes:
    """Returns an opened image centered in a square, as the bytes of uint8 [144, 144, 3]. Raises ImageError."""
    image.draft("RGB", (2 * _SIDE, 2 * _SIDE))
    load_image(image)
    return square(upright_rgb(image), _SIDE).tobytes()


def square(image_HW3: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Returns an image resized to fit a square with the page's gray around it, uint8 [side, side, 3]."""
    height, width = image_HW3.shape[:2]
    factor = side / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    page = Image.new("RGB", (side, side), (236, 238, 241))
    filter = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST
    page.paste(Image.fromarray(image_HW3).resize(size, filter), ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.asarray(page)
