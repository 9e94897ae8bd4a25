"""A conversion on its way: a staging directory, a journal of what is done, and at the end a manifest with checksums.

The output appears complete or not at all. A conversion that was ended goes on where it was when the same command runs
again, as long as its inputs are the same.
"""

import concurrent.futures
import errno
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tqdm

from varedit_jax.errors import UserError
from varedit_jax.weights.manifest import MANIFEST, MANIFEST_VERSION, size_text

_JOURNAL = "journal.jsonl"
_WORKERS = 2  # tensors on their way at a time; each takes up to four times its size of memory

Record = dict[str, Any]


class Task(NamedTuple):
    """One tensor to convert."""

    key: str  # of its record in the journal
    nbytes: int
    work: Callable[[], Record]  # reads, checks and writes it; returns what the manifest says of it


class Job:
    """The staging directory of an output, and its journal: a context manager that holds the directory alone."""

    def __init__(self, output: str | os.PathLike[str], fingerprint: Mapping[str, Any]) -> None:
        """`fingerprint` is what must be the same for an earlier attempt to be gone on with.

        Raises UserError if the output exists.
        """
        self.output = pathlib.Path(output)
        if self.output.exists() or self.output.is_symlink():
            raise UserError(f"{self.output} exists; give a new directory, or remove it first")
        self.staging = self.output.absolute().with_name(f".{self.output.name}.partial")
        self._fingerprint = json.loads(json.dumps(fingerprint))  # tuples become lists, as in the journal
        self.done: dict[str, Record] = {}

    def __enter__(self) -> "Job":
        """Opens the staging directory; what an earlier attempt with the same fingerprint did is in `done`."""
        try:
            self.staging.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {self.output}: {error.strerror}") from error
        path = self.staging / _JOURNAL
        self._journal = path.open("a")  # and nothing changed before it is known that nobody else writes here
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._journal.close()
            raise UserError(f"another conversion is writing {self.output}; wait for it, or end it first") from error
        lines, end = _read_lines(path)
        if lines and lines[0] == {"job": self._fingerprint}:
            self._journal.truncate(end)  # the last line may have been cut short
        else:
            lines = []
            self._journal.truncate(0)
            for other in self.staging.iterdir():
                if other != path:
                    shutil.rmtree(other) if other.is_dir() else other.unlink()
            self._write({"job": self._fingerprint})
        self.done = {line["key"]: line["record"] for line in lines[1:]}
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Leaves the directory as it is, to be gone on with; but nothing after an input that cannot be converted."""
        self._journal.close()
        if isinstance(error, UserError) and not isinstance(error, _NoRoom):
            shutil.rmtree(self.staging, ignore_errors=True)

    def _write(self, line: Record) -> None:
        self._journal.write(json.dumps(line) + "\n")
        self._journal.flush()  # the tensor is durable already; a line that a crash of the machine loses is done again

    def check_room(self, tasks: Sequence[Task], size: int) -> None:
        """Raises UserError if the disk has no room for what is left of an output of `size` bytes."""
        whole = sum(task.nbytes for task in tasks)
        left = sum(task.nbytes for task in tasks if task.key not in self.done)
        needed, free = size * left // max(whole, 1), shutil.disk_usage(self.staging).free
        if needed > free:
            raise _NoRoom(
                f"{self.output} takes {size_text(needed)} more, but only {size_text(free)} are free there; "
                f"make room, or write to another disk"
            )

    def run(self, tasks: Sequence[Task], release: Callable[[], object], quiet: bool = False) -> None:
        """Does the tasks that are not yet done; `release` is called after each.

        Raises UserError if the disk runs full.
        """
        todo = [task for task in tasks if task.key not in self.done]
        whole, left = (sum(task.nbytes for task in some) for some in (tasks, todo))
        if len(todo) < len(tasks) and not quiet:
            print(f"{len(tasks) - len(todo)} of {len(tasks)} tensors were done by an earlier attempt")
        bar = tqdm.tqdm(total=whole, initial=whole - left, unit="B", unit_scale=True, disable=quiet, desc="tensors")
        with bar, concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
            try:
                for task, record in _in_flight(pool, todo):
                    self._write({"key": task.key, "record": record})
                    self.done[task.key] = record
                    release()
                    bar.update(task.nbytes)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                raise _NoRoom(
                    f"writing {self.output} failed: {error.strerror}; make room and run the same command again, "
                    f"it goes on from here"
                ) from error

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Writes the manifest, and lets the output appear under its name."""
        write_json(self.staging / MANIFEST, {"version": MANIFEST_VERSION, **manifest})
        (self.staging / _JOURNAL).unlink()
        self.staging.rename(self.output)


class _NoRoom(UserError):
    """A disk that is full: what has been done stays, and can be gone on with."""


def _in_flight(pool: concurrent.futures.Executor, tasks: Sequence[Task]) -> Iterator[tuple[Task, Record]]:
    """Tasks with their records, in order; never more than the workers and one on their way."""
    waiting: list[tuple[Task, concurrent.futures.Future[Record]]] = []
    try:
        for task in tasks:
            waiting.append((task, pool.submit(task.work)))
            if len(waiting) > _WORKERS:
                first, future = waiting.pop(0)
                yield first, future.result()
        while waiting:
            first, future = waiting.pop(0)
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _read_lines(path: pathlib.Path) -> tuple[list[Record], int]:
    """The whole lines of a journal, and where they end in bytes: the last may be cut short."""
    lines: list[Record] = []
    end = 0
    if path.exists():
        for text in path.read_bytes().splitlines(keepends=True):
            if not text.endswith(b"\n"):
                break
            lines.append(json.loads(text))
            end += len(text)
    return lines, end


def write_json(path: pathlib.Path, value: Any) -> None:
    """JSON, indented one space."""
    path.write_text(json.dumps(value, indent=1) + "\n")
