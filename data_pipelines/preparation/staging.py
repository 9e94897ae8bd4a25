"""The staging directory of a data set in preparation, which gets its final name only when complete.

    .OUT.partial/job.json           inputs and settings; a job with others starts over
                 scan/00000/        a scanned part, see scan.py
                 step/...           duplicates and vision verdicts
                 out/               the data set, which becomes OUT
                 runner.log         what a cluster's runner had to say
    OUT.report/                     the report of a data set of which nothing was left
    OUT.answers/                    answers of a vision-language model

It is local, since shards are written to local files. If OUT is in an object store, it is in the working directory, and
`out` is uploaded at the end. The output of a task appears complete or not at all, so finished tasks are not repeated.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, Self

from varedit_jax.errors import UserError
from varedit_jax.storage import disk, files
from varedit_jax.storage.lock import LOCK_FILE, Lock
from varedit_jax.storage.paths import PathLike, children, files_below, is_remote, local, resolve

_JOB = "job.json"


def staging_directory(output: pathlib.Path, chosen: str = "") -> pathlib.Path:
    """Returns the local staging directory of an output: the chosen one, or one named after the output."""
    if chosen:
        return local(chosen, "the staging directory")
    if not is_remote(output):
        return files.staging_of(output)
    digest = hashlib.sha256(os.fspath(output).encode()).hexdigest()[:8]
    return resolve(f".{output.name}-{digest}.partial")


class Staging:
    """The staging directory, as a context manager that one process at a time can hold."""

    def __init__(self, output: PathLike, job: Mapping[str, Any], directory: str = "") -> None:
        """`job` must equal that of an interrupted attempt to resume it; `directory` overrides the default place.

        Raises UserError if the output exists.
        """
        self.output = files.followed(resolve(output))
        if files.exists(self.output):
            raise UserError(f"{self.output} exists; give a new directory, or remove it first")
        self.directory = staging_directory(self.output, directory)
        self._job = json.loads(json.dumps(job))  # tuples become lists, as in the file
        self._beside = self.directory if is_remote(self.output) else self.output
        self.report = self.beside("report")
        self._locked = [self.directory]
        if is_remote(self.output):  # which other machines, with staging directories of their own, could write, too
            self._locked.append(self.output.with_name(f".{self.output.name}.partial"))
        self._stack = contextlib.ExitStack()

    def beside(self, suffix: str) -> pathlib.Path:
        """Returns the local path with a suffix to the name of the output, or of the staging directory."""
        return self._beside.with_name(f"{self._beside.name}.{suffix}")

    def __enter__(self) -> Self:
        """Locks the directory, and empties it if it is of another job."""
        with contextlib.ExitStack() as stack:
            for directory in self._locked:
                stack.enter_context(Lock(directory, flag="--output"))
            self._stack = stack.pop_all()
        path = self.directory / _JOB
        if not path.exists() or json.loads(path.read_text()) != self._job:
            for other in children(self.directory):
                if other.name != LOCK_FILE:
                    _remove(other)
            if is_remote(self.output):  # remains of another job's interrupted upload
                files.remove_directory(self.output)
            files.write_json(path, self._job)
        self._remove_unfinished()
        return self

    def __exit__(self, *error: object) -> None:
        """Keeps the contents, to be resumed."""
        self._stack.close()

    def check_room(self, inputs: int, most: int) -> None:
        """Raises UserError if the disks have no room for a data set from `inputs` bytes that needs `most` for staging.

        What an interrupted attempt has staged already is taken off.
        """
        most -= sum(path.stat().st_size for path in files_below(self.directory))
        what = f"preparing {disk.size_text(inputs)} of inputs"
        then = ", give a larger disk with --staging_directory, or --nocheck_disk if filters will leave far less"
        disk.check_room(self.directory, most, what, then)
        if not is_remote(self.output):
            above = next(path for path in self.output.parents if path.exists())
            if above.stat().st_dev != self.directory.stat().st_dev:
                disk.check_room(above, inputs, f"a data set from {disk.size_text(inputs)} of inputs", then)

    def finish(self) -> None:
        """Moves or uploads the data set to the output, and removes the rest."""
        self._remove_unfinished()
        if is_remote(self.output):
            files.upload(self.directory / "out", self.output, keep=True)
        else:
            files.make_directory(self.output.parent)
            files.move_directory(self.directory / "out", self.output)
        shutil.rmtree(self.directory)
        files.remove_directory(self.report)

    def _remove_unfinished(self) -> None:
        """Removes what writers that were killed have left."""
        for pattern in (".*.partial", ".*.draft"):
            for path in self.directory.rglob(pattern):
                _remove(path)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
