"""A conversion in progress: a staging directory, a journal of finished tensors, and a manifest with checksums.

The output appears complete or not at all. The same command resumes a conversion that was interrupted, as long as its
inputs are the same.
"""

import concurrent.futures
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from varedit_jax.errors import UserError
from varedit_jax.progress import Progress
from varedit_jax.storage import disk, files
from varedit_jax.storage.jsonl import LineWriter, read_lines
from varedit_jax.storage.lock import LOCK_FILE, Lock
from varedit_jax.storage.paths import PathLike, children, resolve
from varedit_jax.weights.manifest import MANIFEST, MANIFEST_VERSION

_JOURNAL = "journal.jsonl"
_WORKERS = 2  # tensors in flight; each takes up to four times its size in memory

ManifestEntry = dict[str, Any]


class TensorTask(NamedTuple):
    """One tensor to convert."""

    key: str  # of its record in the journal
    nbytes: int
    work: Callable[[], ManifestEntry]  # reads, checks and writes it; returns its entry in the manifest


class ConversionJob:
    """The staging directory of an output, and its journal: a context manager that holds the directory alone."""

    def __init__(self, output: PathLike, fingerprint: Mapping[str, Any]) -> None:
        """An earlier attempt with the same `fingerprint` is resumed.

        Raises UserError if the output exists.
        """
        self.output = files.followed(resolve(output))
        self.staging = files.staging_of(self.output)
        self._check_new()
        self._fingerprint = json.loads(json.dumps(fingerprint))  # tuples become lists, as in the journal
        self._held = contextlib.ExitStack()
        self.done: dict[str, ManifestEntry] = {}

    def _check_new(self) -> None:
        with disk.read_explained(str(self.output)):
            if files.exists(self.output):
                raise UserError(f"{self.output} exists; give a new directory, or remove it first")

    def __enter__(self) -> "ConversionJob":
        """Opens the staging directory; `done` holds the records of an earlier attempt with the same fingerprint."""
        with contextlib.ExitStack() as held, disk.explained("journal", self.output):
            held.enter_context(Lock(self.output.with_name(f".{self.output.name}.partial"), flag="--output"))
            self._check_new()  # by another conversion, meanwhile
            files.begin(self.output)
            lines = read_lines(self.staging / _JOURNAL)
            if lines[:1] != [{"job": self._fingerprint}]:
                lines = []
                self._clear()
            self._journal = LineWriter(self.staging / _JOURNAL)
            held.callback(self._journal.close)
            if not lines:
                self._write({"job": self._fingerprint})
            self._held = held.pop_all()
        self._is_begun = len(lines) > 1
        self.done = {line["key"]: line["record"] for line in lines if "key" in line}
        return self

    def _clear(self) -> None:
        for path in children(self.staging):
            if path.name not in (LOCK_FILE, files.INCOMPLETE):
                files.remove_directory(path) if path.is_dir() else path.unlink()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Leaves the directory to be resumed; removes it after an input that cannot be converted."""
        self._held.close()
        if isinstance(error, UserError) and not disk.is_machine_error(error):
            files.remove_directory(self.staging)

    def _write(self, line: ManifestEntry) -> None:
        # The tensor is durable already; one whose line a crash loses is converted again.
        self._journal.append(line)

    def _create(self, create: Sequence[Callable[[], None]]) -> None:
        with disk.explained("weights", self.output):
            for one in create:
                one()
        self._write({"begun": True})
        self._journal.flush()

    def run(
        self,
        tasks: Sequence[TensorTask],
        size: int,
        create: Sequence[Callable[[], None]],
        release: Callable[[], object] = lambda: None,
        quiet: bool = False,
    ) -> None:
        """Creates the files, unless an earlier attempt did, and runs the tasks that are not yet done.

        Args:
          tasks: all tensors of the output.
          size: of the output in bytes.
          create: functions that create its files.
          release: called after each task.
          quiet: without a progress bar.

        Raises:
          UserError: the disk has no room for what is left, runs full, or fails otherwise.
        """
        todo = [task for task in tasks if task.key not in self.done]
        whole, left = (sum(task.nbytes for task in some) for some in (tasks, todo))
        disk.check_room(self.staging, size * left // max(whole, 1), f"the rest of {self.output}")
        if not self._is_begun:
            self._create(create)
        if len(todo) < len(tasks) and not quiet:
            print(f"{len(tasks) - len(todo)} of {len(tasks)} tensors were done by an earlier attempt")
        bar = Progress(total=whole, initial=whole - left, unit="B", unit_scale=True, disable=quiet, desc="tensors")
        with bar, disk.explained("weights", self.output), concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
            for task, record in _in_flight(pool, todo):
                self._write({"key": task.key, "record": record})
                self.done[task.key] = record
                release()
                bar.update(task.nbytes)

    def finish(self, tasks: Sequence[TensorTask], manifest: Mapping[str, Any]) -> None:
        """Writes the manifest, with the record of every task, and gives the output its name."""
        manifest = {"version": MANIFEST_VERSION, **manifest, "tensors": [self.done[task.key] for task in tasks]}
        with disk.explained("weights", self.output):
            self._journal.close()
            files.write_json(self.staging / MANIFEST, manifest, indent=1)
            for name in (_JOURNAL, LOCK_FILE):
                (self.staging / name).unlink(missing_ok=True)
            files.commit(self.output)


def _in_flight(
    pool: concurrent.futures.Executor, tasks: Sequence[TensorTask]
) -> Iterator[tuple[TensorTask, ManifestEntry]]:
    """Tasks with their records, in order; at most one more in flight than there are workers."""
    waiting: list[tuple[TensorTask, concurrent.futures.Future[ManifestEntry]]] = []
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
