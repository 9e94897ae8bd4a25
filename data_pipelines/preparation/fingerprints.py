"""Fingerprints by which records are compared: one row of fixed size per record, in files that are read in pieces.

Records are numbered across all parts, in the order of reading. Hashes are the first 64 bits of a SHA-256: among ten
million records, the probability of a collision is 3e-6.
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

# Counted of the records that passed the filters: some letters of their instruction are unknown to the text encoder.
PARTLY_UNKNOWN = "partly unknown instruction"
PIECE = 1 << 17  # rows in memory at a time

FACTS = np.dtype(
    [
        ("key", "<u8"),  # hash of Record.key; the lowest of several duplicates is kept
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
        ("target_width", "<i4"),
        ("target_height", "<i4"),
        ("source_turn", "u1"),  # EXIF orientation, 1 to 8
        ("target_turn", "u1"),
        ("nbytes", "<i8"),  # of the encoded record
        ("offset", "<i8"),  # of its bytes in their staged file
        ("checksum", "<u4"),  # CRC-32 of these bytes
        ("dataset", "<i4"),  # index into the part's list of names
    ]
)


def save_array(path: pathlib.Path, array: NDArray[Any]) -> None:
    """Writes an .npy file, which appears complete or not at all."""
    make_directory(path.parent)
    with replacing(path) as file:
        np.save(file, array)


def digest(*pieces: bytes) -> int:
    """Returns 64 bits of a hash of byte strings, which depends on where one ends and the next begins."""
    hashed = hashlib.sha256()
    for piece in pieces:
        hashed.update(len(piece).to_bytes(8, "little"))
        hashed.update(piece)
    return int.from_bytes(hashed.digest()[:8], "big")


def plain_words(text: str) -> str:
    """Returns an instruction without case, punctuation and white space that do not change its meaning."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def hashes(record: Record) -> dict[str, int]:
    """Returns the hashes of a record's row."""
    instruction = record.instructions[0]
    return {
        "key": digest(record.dataset.encode(), record.id.encode()),
        "original": digest(record.original.encode()),
        "content": digest(record.source, record.target, instruction.encode()),
        "source": digest(record.source),
        "target": digest(record.target),
        # An instruction of symbols alone is compared as it is.
        "words": digest((plain_words(instruction) or instruction).encode()),
    }


class PartFiles:
    """The files of a scanned part, in its directory. See scan.py, which writes them."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.records = directory / "records"  # those that passed the filters, see staged.py
        self.facts = directory / "facts.bin"  # a row of FACTS for each of them
        self.keys = directory / "keys.bin"  # data set and id of each, as JSON
        self.ends = directory / "ends.bin"  # end offset of each in keys.bin, int64
        self.left = directory / "left.jsonl"  # dropped records, in the format of quarantine files
        self.counts = directory / "counts.json"
        self.samples = directory / "samples"  # images of some dropped records


def rows_so_far(directory: pathlib.Path) -> int:
    """Returns the number of records of all parts below `directory`, including unfinished ones."""
    count = 0
    for path in directory.glob("*/facts.bin"):
        with contextlib.suppress(FileNotFoundError):  # renamed in between
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
        """Yields rows in pieces, each of one part, with the number of its first row."""
        for part, start, end in zip(self.parts, self.starts[:-1], self.starts[1:], strict=True):
            with part.facts.open("rb") as file:
                for first in range(int(start), int(end), PIECE):
                    yield first, np.fromfile(file, FACTS, min(PIECE, int(end) - first))

    def place(self, number: int) -> tuple[int, int]:
        """Returns the index of a record's part, and its row there."""
        part = int(np.searchsorted(self.starts, number, side="right")) - 1
        return part, int(number - self.starts[part])

    def row(self, number: int) -> NDArray[Any]:
        """Returns the row of a record, FACTS []."""
        part, row = self.place(number)
        return np.fromfile(self.parts[part].facts, FACTS, 1, offset=row * FACTS.itemsize)[0]

    def key(self, number: int) -> tuple[str, str]:
        """Returns data set and id of a record."""
        index, row = self.place(number)
        part = self.parts[index]
        begin, end = (
            np.fromfile(part.ends, "<i8", 2, offset=8 * (row - 1)) if row else (0, np.fromfile(part.ends, "<i8", 1)[0])
        )
        dataset, id = json.loads(np.fromfile(part.keys, np.uint8, end - begin, offset=begin).tobytes())
        return dataset, id


class FactsWriter(contextlib.ExitStack):
    """Writes the rows and the keys of a part."""

    def __init__(self, files: PartFiles) -> None:
        super().__init__()
        self._facts, self._keys, self._ends = (
            self.enter_context(path.open("wb")) for path in (files.facts, files.keys, files.ends)
        )

    def write(self, record: Record, row: NDArray[Any]) -> None:
        """Appends a record's row, FACTS [], and its key."""
        self._facts.write(row.tobytes())
        self._keys.write(json.dumps([record.dataset, record.id], ensure_ascii=False).encode())
        self._ends.write(self._keys.tell().to_bytes(8, "little"))
