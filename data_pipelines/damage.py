"""What is wrong with a record: images that cannot be used, told by reason, and the file that keeps their names.

Nothing that is published is trusted: images are opened as few kinds of files, their size is looked at before they are
decoded, and whatever a decoder throws becomes a reason.
"""

import collections
import contextlib
import io
import json
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO, Self

from PIL import Image, UnidentifiedImageError

from data_pipelines.reasons import LeftOut, Reason
from data_pipelines.record import Record
from varedit_jax.errors import UserError
from varedit_jax.images import MAX_PIXELS, READABLE, orientation
from varedit_jax.training.run_config import make_directory, room_explained

MIN_SIDE = 16  # pixels; less is a placeholder or a tracking pixel
MAX_SIDE = 65_500  # pixels; what a JPEG can have
MAX_RATIO = 8.0  # long side over short side; templates end at 3

_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class Damaged(LeftOut):
    """A record that cannot be used."""


def open_image(data: bytes) -> Image.Image:
    """An image file, opened but not decoded, whose size, kind and frames are fit to be.

    Raises Damaged.
    """
    if not data:
        raise Damaged(Reason.EMPTY)
    Image.init()  # at once where it has been done; what imports one kind of image registers that alone
    try:
        image = Image.open(io.BytesIO(data), formats=[kind for kind in READABLE if kind in Image.OPEN])
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except UnidentifiedImageError:
        raise Damaged(Reason.NOT_AN_IMAGE, f"{len(data)} bytes that begin with {data[:12]!r}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the latter where warnings are errors
        raise Damaged(Reason.BOMB, "hundreds of millions") from None
    except Exception as error:  # decoders meet damaged headers with every kind of exception
        raise _from_decoder(error) from error
    width, height = image.size
    size = f"{width} x {height} pixels"
    if width * height > MAX_PIXELS:
        raise Damaged(Reason.BOMB, size)
    short, long = sorted(image.size)
    if short < MIN_SIDE or long > MAX_SIDE or long > MAX_RATIO * short:
        raise Damaged(Reason.SIZE, size)
    if frames > 1:
        raise Damaged(Reason.ANIMATED, f"{frames} frames")
    return image


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """What a decoder throws in the block becomes Damaged."""
    try:
        yield
    except Damaged:
        raise
    except UserError as error:  # of the conversion to RGB
        raise Damaged(Reason.COLORS, str(error)) from error
    except Exception as error:
        raise _from_decoder(error) from error


def _from_decoder(error: Exception) -> Damaged:
    text = str(error) or type(error).__name__
    return Damaged(Reason.TRUNCATED if "truncated" in text.lower() else Reason.DECODING, text)


def check_image(data: bytes) -> tuple[int, int]:
    """Width and height, upright, of an image file that is decoded to see whether it can be. Raises Damaged."""
    image = open_image(data)
    with decoding():
        image.load()
    return upright_size(image)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image, turned as its metadata says."""
    width, height = image.size
    return (height, width) if orientation(image) in _TURNED else (width, height)


def check_record(record: Record) -> tuple[int, int]:
    """Width and height of a record's source, if both images can be decoded and it says what to do. Raises Damaged."""
    if not record.instructions or not record.instructions[0].strip():
        raise Damaged(Reason.INSTRUCTION)
    sizes = []
    for side in ("source", "target"):
        try:
            sizes.append(check_image(getattr(record, side)))
        except Damaged as error:
            raise Damaged(error.reason, f"{side}: {error.detail}" if error.detail else side) from error
    return sizes[0]


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
