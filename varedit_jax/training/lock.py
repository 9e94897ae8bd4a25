"""One run a directory: a lock that the kernel releases when its holder dies, however it dies."""

import fcntl
import json
import os
import pathlib
import socket
from typing import Self, TextIO

import jax

from varedit_jax.errors import UserError
from varedit_jax.training.run_config import make_directory

LOCK_FILE = "lock"


class Lock:
    """The directory of a run is in use while this is entered. Process 0 holds it for all. A context manager.

    It is a flock, so it is gone with the process. Where the file system knows none, there is no lock.
    """

    def __init__(self, workdir: str | os.PathLike[str]) -> None:
        """Takes nothing yet."""
        self._workdir = pathlib.Path(workdir)
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        """Takes the lock. Raises UserError if another process has it, or the directory cannot be made."""
        if jax.process_index() != 0:
            return self
        make_directory(self._workdir)
        path = self._workdir / LOCK_FILE
        try:
            self._file = path.open("a+")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(self._file)
            self._file.close()
            raise UserError(
                f"{self._workdir} is in use by {holder}; wait for it, end it, or use another --workdir"
            ) from error
        except OSError:  # no locks there
            return self
        self._file.truncate(0)
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        self._file.flush()
        return self

    def __exit__(self, *exception: object) -> None:
        """Gives the lock back. The file stays: removing it could take the lock of whoever waits for it."""
        if self._file is not None:
            self._file.close()


def _holder(file: TextIO) -> str:
    """Returns the holder of the lock, as its file names it."""
    try:
        file.seek(0)
        values = json.load(file)
        return f"process {values['pid']} on {values['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # just taken, and not yet said by whom
        return "another run"
