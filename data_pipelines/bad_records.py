"""Unusable records of a prepared data set: found by decoding every image once, and skipped by the loader.

DIRECTORY/SPLIT/bad.jsonl lists them with their reasons, after a header that identifies the index.
"""

import concurrent.futures
import contextlib
import functools
import json
import multiprocessing
import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.damage import Damaged, check_record
from data_pipelines.reasons import Reason
from data_pipelines.record import BrokenRecord
from data_pipelines.shards import Records
from varedit_jax.errors import UserError
from varedit_jax.images import load_image
from varedit_jax.progress import Progress
from varedit_jax.storage.disk import explained, read_explained
from varedit_jax.storage.files import write_text
from varedit_jax.storage.jsonl import LineWriter, read_lines
from varedit_jax.storage.paths import PathLike

BAD = "bad.jsonl"
CHUNK = 256  # records per line of the journal

Found = list[tuple[int, str, str]]  # bad records: row, reason and detail


def _check_chunk(records: Records, number: int) -> tuple[int, Found]:
    """Returns the chunk's number and bad records. Raises UserError if the machine fails to read, whatever the data."""
    found = []
    for row in range(number * CHUNK, min((number + 1) * CHUNK, len(records))):
        try:
            check_record(records[row], lambda _, image: load_image(image))
        except BrokenRecord as error:
            found.append((row, str(Reason.RECORD), str(error)))
        except Damaged as error:
            found.append((row, str(error.reason), error.detail))
    return number, found


def check_split(directory: PathLike, split: str, processes: int = 1, cache_directory: str = "") -> Counter[str]:
    """Decodes all records of a split and writes the list of bad ones; returns their counts by reason.

    Raises UserError if there is no such split, or if reading it or writing the list fails.
    """
    records = Records(directory, split, cache_directory)
    place = records.directory / split
    journal = place / f".{BAD}.partial"
    header = {"index": records.stored.files.digest, "records": len(records)}
    done = _read_journal(journal, header)
    chunks = [number for number in range(-(-len(records) // CHUNK)) if number not in done]
    check = functools.partial(_check_chunk, records)
    with (
        explained("list of bad records", place),
        contextlib.closing(LineWriter(journal)) as lines,
        contextlib.ExitStack() as stack,
        Progress(total=len(records), desc=split, unit="record") as progress,
    ):
        if not done:
            lines.append(header)
        progress.update(min(len(done) * CHUNK, len(records)))
        checked: Iterator[tuple[int, Found]] = map(check, chunks)
        if processes > 1:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(processes, context))
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            checked = pool.map(check, chunks)
        try:
            for number, found in checked:
                done[number] = found
                lines.append({"chunk": number, "bad": found})
                progress.update(min(CHUNK, len(records) - number * CHUNK))
        except concurrent.futures.BrokenExecutor as error:
            raise UserError(
                f"a process that checks {place} was ended from outside, as for lack of memory or open files; run the "
                f"same command again with fewer --processes"
            ) from error
    bad: list[dict[str, Any]] = [
        {"row": row, "id": records.id(row), "dataset": records.dataset(row), "reason": reason, "detail": detail}
        for number in sorted(done)
        for row, reason, detail in done[number]
    ]
    with explained("list of bad records", place):
        write_text(place / BAD, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (header, *bad)))
        journal.unlink()
    return Counter(line["reason"] for line in bad)


def _read_journal(journal: pathlib.Path, header: dict[str, Any]) -> dict[int, Found]:
    """Returns bad records by chunk from an interrupted check of the same data; deletes a journal of other data."""
    with read_explained(str(journal)):
        first, *lines = read_lines(journal) or [{}]
        if first == header:
            return {line["chunk"]: line["bad"] for line in lines if "chunk" in line}
        journal.unlink(missing_ok=True)
    return {}


def kept_records(records: Records) -> NDArray[np.bool_]:
    """Returns [n], False for the records of a split that a check found to be bad; all True if none has run.

    Raises UserError if the check was of other data.
    """
    kept = np.ones(len(records), np.bool_)
    path = records.directory / records.split / BAD
    with read_explained(str(path)):
        header, *lines = read_lines(path) or [{"index": records.stored.files.digest}]
    if header.get("index") != records.stored.files.digest:
        raise UserError(
            f"{path} is of data that were prepared anew since; run data_pipelines.check again, or delete it"
        )
    kept[[line["row"] for line in lines]] = False
    return kept
