"""Facts by which records are compared: a row of fixed size, in files that are read a piece at a time.

Records are numbered through all parts, in the order in which they were read. Hashes are the first 64 bits of a
SHA-256: among ten million records two that differ have the same with a probability of 3e-6.
"""

import contextlib
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.preparation.perceptual_hash import COLORS
from data_pipelines.record import Record
from varedit_jax.storage.files import make_directory, replacing

PIECE = 1 << 17  # rows in memory at a time

FACTS = np.dtype(
    [
        ("key", "<u8"),  # hash of Record.key; the lowest of several that are alike stays
        ("original", "<u8"),  # of Record.original
        ("content", "<u8"),  # of both images and the instruction
        ("source", "<u8"),  # of the source image
        ("target", "<u8"),
        ("words", "<u8"),  # of the instruction without case and punctuation
        ("source_shape", "<u8"),  # perceptual_hash.Look.shape
        ("target_shape", "<u8"),
        ("source_colors", "u1", COLORS),  # perceptual_hash.Look.colors
        ("target_colors", "u1", COLORS),
        ("width", "<i4"),  # pixels of the source, upright
        ("height", "<i4"),
        ("nbytes", "<i8"),  # of the encoded record
        ("dataset", "<i4"),  # index into the part's list of names
    ]
)


def save_array(path: pathlib.Path, array: NDArray[Any]) -> None:
    """Writes an .npy file at once or not at all."""
    make_directory(path.parent)
    with replacing(path) as file:
        np.save(file, array)


def digest(*pieces: bytes) -> int:
    """64 bits of a hash of bytes; where one piece ends and the next begins makes a difference."""
    hashed = hashlib.sha256()
    for piece in pieces:
        hashed.update(len(piece).to_bytes(8, "little"))
        hashed.update(piece)
    return int.from_bytes(hashed.digest()[:8], "big")


def plain_words(text: str) -> str:
    """An instruction without what does not change its meaning: case, punctuation, white space."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def hashes(record: Record) -> dict[str, int]:
    """The hashes of a row."""
    instruction = record.instructions[0]
    return {
        "key": digest(record.dataset.encode(), record.id.encode()),
        "original": digest(record.original.encode()),
        "content": digest(record.source, record.target, instruction.encode()),
        "source": digest(record.source),
        "target": digest(record.target),
        # Writing without spaces between words, or of signs alone, is compared as it is.
        "words": digest((plain_words(instruction) or instruction).encode()),
    }


class PartFiles:
    """The files of a part that was read, in its directory. See scan.py, which writes them."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.records = directory / "records.array_record"  # those that no filter left out
        self.facts = directory / "facts.bin"  # a row of FACTS for each of them
        self.keys = directory / "keys.bin"  # data set and id of each, as JSON
        self.ends = directory / "ends.bin"  # where each ends in keys.bin
        self.left = directory / "left.jsonl"  # what was left out, as quarantine files have it
        self.counts = directory / "counts.json"
        self.samples = directory / "samples"  # images of some that were left out


def rows_so_far(directory: pathlib.Path) -> int:
    """Number of records in the directories of parts below `directory`, those included that are being written."""
    count = 0
    for path in directory.glob("*/facts.bin"):
        with contextlib.suppress(FileNotFoundError):  # it got its name in between
            count += path.stat().st_size // FACTS.itemsize
    return count


class Facts:
    """The rows of all parts."""

    def __init__(self, parts: Sequence[PartFiles]) -> None:
        self.parts = parts
        lengths = [part.facts.stat().st_size // FACTS.itemsize for part in parts]
        self.starts: NDArray[np.int64] = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def pieces(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """Rows, a few at a time, with the number of the first of them. A piece is of one part."""
        for part, start, end in zip(self.parts, self.starts[:-1], self.starts[1:], strict=True):
            with part.facts.open("rb") as file:
                for first in range(int(start), int(end), PIECE):
                    yield first, np.fromfile(file, FACTS, min(PIECE, int(end) - first))

    def place(self, number: int) -> tuple[int, int]:
        """Part of a record, and its row there."""
        part = int(np.searchsorted(self.starts, number, side="right")) - 1
        return part, int(number - self.starts[part])

    def key(self, number: int) -> tuple[str, str]:
        """Data set and id of a record."""
        index, row = self.place(number)
        part = self.parts[index]
        with part.ends.open("rb") as ends, part.keys.open("rb") as keys:
            begin = 0
            if row:
                ends.seek(8 * (row - 1))
                begin = int.from_bytes(ends.read(8), "little")
            else:
                ends.seek(0)
            end = int.from_bytes(ends.read(8), "little")
            keys.seek(begin)
            dataset, id = json.loads(keys.read(end - begin))
        return dataset, id


class FactsWriter(contextlib.ExitStack):
    """Writes the rows and the keys of a part."""

    def __init__(self, files: PartFiles) -> None:
        super().__init__()
        self._facts, self._keys, self._ends = (
            self.enter_context(path.open("wb")) for path in (files.facts, files.keys, files.ends)
        )

    def write(self, record: Record, row: NDArray[Any]) -> None:
        """Adds a record's row: FACTS, []."""
        self._facts.write(row.tobytes())
        self._keys.write(json.dumps([record.dataset, record.id], ensure_ascii=False).encode())
        self._ends.write(self._keys.tell().to_bytes(8, "little"))
