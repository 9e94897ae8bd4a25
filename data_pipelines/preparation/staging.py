"""The staging directory of a data set on its way, which has its name only once it is whole.

    .OUT.partial/job.json           what is being prepared; other settings begin anew
                 scan/00000/        what was read of a part, see scan.py
                 step/...           what the steps that compare records found
                 out/               the data set, which becomes OUT

What a task has written appears under its name at once, so that a task that is found done is not done again.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import IO, Any

from varedit_jax.errors import UserError

_JOB = "job.json"
_LOCK = "lock"


class Staging:
    """The directory, as a context manager that one process at a time can hold."""

    def __init__(self, output: str | os.PathLike[str], job: Mapping[str, Any]) -> None:
        """`job` is what must be the same for an earlier attempt to be gone on with.

        Raises UserError if the output exists.
        """
        self.output = pathlib.Path(output).absolute()
        if self.output.exists() or self.output.is_symlink():
            raise UserError(f"{self.output} exists; give a new directory, or remove it first")
        self.directory = self.output.with_name(f".{self.output.name}.partial")
        self._job = json.loads(json.dumps(job))  # tuples become lists, as in the file
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> "Staging":
        """Opens the directory, and empties it if it is of another job."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = (self.directory / _LOCK).open("wb")
        except OSError as error:
            raise UserError(f"cannot write {self.output}: {error.strerror}; give another directory") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise UserError(f"another process prepares {self.output}; wait for it, or end it first") from error
        path = self.directory / _JOB
        if not path.exists() or json.loads(path.read_text()) != self._job:
            for other in self.directory.iterdir():
                if other.is_dir():
                    shutil.rmtree(other)
                elif other.name != _LOCK:
                    other.unlink()
            with new_file(path) as partial:
                partial.write_text(json.dumps(self._job))
        for unfinished in self.directory.glob("*/.*.partial"):
            shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
        return self

    def __exit__(self, *error: object) -> None:
        """Leaves what is there, to be gone on with."""
        assert self._lock is not None
        self._lock.close()

    def finish(self) -> None:
        """Gives the data set its name, and removes the rest."""
        (self.directory / "out").rename(self.output)
        shutil.rmtree(self.directory)


@contextlib.contextmanager
def new_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to in the block; what is there at its end gets the name `path`, whole or not at all.

    Two tasks that do the same, as runners may let them, do not meet.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    yield partial
    partial.replace(path)


@contextlib.contextmanager
def new_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Likewise a directory."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():  # another worker was faster
        shutil.rmtree(partial)
    else:
        partial.rename(path)
