"""Which records of a prepared data set cannot be used: found by decoding every image once, and read by the loader.

DIRECTORY/SPLIT/bad.jsonl names them with their reason, after a line that says which index it is of.
"""

import json
import multiprocessing
import os
import pathlib
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import tqdm
from numpy.typing import NDArray

from data_pipelines.damage import Damaged, check_record
from data_pipelines.reasons import Reason
from data_pipelines.record import BrokenRecord
from data_pipelines.shards import Records
from varedit_jax.errors import UserError
from varedit_jax.images import load_image
from varedit_jax.training.run_config import room_explained

BAD = "bad.jsonl"
CHUNK = 256  # records a line of the journal


class _Chunk(NamedTuple):
    directory: str
    split: str
    number: int


def _check_chunk(chunk: _Chunk) -> tuple[int, list[tuple[int, str, str]]]:
    """The bad records of a chunk: row, reason and detail."""
    records = Records(chunk.directory, chunk.split)
    found = []
    for row in range(chunk.number * CHUNK, min((chunk.number + 1) * CHUNK, len(records))):
        try:
            check_record(records[row], lambda _, image: load_image(image))
        except BrokenRecord as error:
            found.append((row, str(Reason.RECORD), str(error)))
        except Damaged as error:
            found.append((row, str(error.reason), error.detail))
    return chunk.number, found


def check_split(directory: str | os.PathLike[str], split: str, processes: int = 1) -> Counter[str]:
    """Decodes all records of a split, and writes down the bad ones; returns their number by reason.

    Raises UserError if there is no such split, or the disk is full.
    """
    directory = pathlib.Path(directory)
    records = Records(directory, split)
    path, journal = directory / split / BAD, directory / split / f".{BAD}.partial"
    header = {"index": records.stored.digest, "records": len(records)}
    done = _read_journal(journal, header)
    chunks = [
        _Chunk(str(directory), split, number) for number in range(-(-len(records) // CHUNK)) if number not in done
    ]
    with room_explained("list of bad records", directory), journal.open("w") as file:
        file.write(json.dumps(header) + "\n" + "".join(json.dumps(entry) + "\n" for entry in done.items()))
        with (
            multiprocessing.get_context("spawn").Pool(processes) as pool,
            tqdm.tqdm(total=len(records), desc=split, unit="record") as progress,
        ):
            progress.update(min(len(done) * CHUNK, len(records)))
            for number, found in (
                pool.imap_unordered(_check_chunk, chunks) if processes > 1 else map(_check_chunk, chunks)
            ):
                done[number] = found
                file.write(json.dumps((number, found)) + "\n")
                file.flush()
                progress.update(min(CHUNK, len(records) - number * CHUNK))
        lines = [
            {"row": row, "id": records.id(row), "dataset": records.dataset(row), "reason": reason, "detail": detail}
            for number in sorted(done)
            for row, reason, detail in done[number]
        ]
    with room_explained("list of bad records", directory):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (header, *lines))
        journal.write_text(text, encoding="utf-8")
        journal.replace(path)
    return Counter(line["reason"] for line in lines)


def _read_journal(journal: pathlib.Path, header: dict[str, Any]) -> dict[int, Any]:
    """What a check of the same data did before it was ended: bad records by chunk."""
    done: dict[int, Any] = {}
    if not journal.exists():
        return done
    try:
        first, *lines = journal.read_text(encoding="utf-8").splitlines()
        if json.loads(first) == header:
            for line in lines:
                number, found = json.loads(line)
                done[number] = found
    except ValueError:  # the last line was cut short; or it is a finished list that did not get its name
        pass
    return done


def kept_records(records: Records) -> NDArray[np.bool_]:
    """False for the records of a split that a check found to be bad, [n]; all True if none was made.

    Raises UserError if the check was of other data.
    """
    kept = np.ones(len(records), np.bool_)
    path = pathlib.Path(records.directory) / records.split / BAD
    if not path.exists():
        return kept
    # Not by `splitlines`: ids may hold ends of lines that JSON does not escape.
    header, *lines = (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line)
    if header["index"] != records.stored.digest:
        raise UserError(
            f"{path} is of data that were prepared anew since; run data_pipelines.check again, or delete it"
        )
    kept[[line["row"] for line in lines]] = False
    return kept
