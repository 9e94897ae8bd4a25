"""Messages of a cluster's workers to the first process, in files: runners of Beam tell little, and wrap errors.

ID.pulse    touched every second while a task is at work
ID.error    why a task failed
"""

import contextlib
import json
import pathlib
import threading
import time
import traceback
import uuid
from collections.abc import Iterator

from varedit_jax.errors import UserError
from varedit_jax.storage.files import write_json
from varedit_jax.storage.paths import children

_PULSE_SECONDS = 1.0


def clear(directory: pathlib.Path) -> None:
    """Removes the messages of an earlier stage."""
    for path in children(directory):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def pulse(directory: pathlib.Path) -> Iterator[None]:
    """Shows signs of life in `directory` until the block ends."""
    path, end = directory / f"{uuid.uuid4().hex}.pulse", threading.Event()

    def beat() -> None:
        with contextlib.suppress(OSError):  # the directory is gone with the job
            path.touch()
            while not end.wait(_PULSE_SECONDS):
                path.touch()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        path.unlink(missing_ok=True)


class SignsOfLife:
    """Tells how long ago something changed in a directory of messages, by the clock of this machine alone."""

    def __init__(self, directory: pathlib.Path) -> None:
        self._directory = directory
        self._seen: dict[str, int] = {}
        self._changed = time.monotonic()

    def seconds_ago(self) -> float:
        """Returns the seconds since the last change that was seen."""
        seen = {}
        for path in children(self._directory):
            with contextlib.suppress(FileNotFoundError):  # the task has just ended
                seen[path.name] = path.stat().st_mtime_ns
        if seen != self._seen:
            self._seen, self._changed = seen, time.monotonic()
        return time.monotonic() - self._changed


def tell_failure(directory: pathlib.Path, error: Exception) -> None:
    """Stores an error for the first process."""
    mistake = isinstance(error, UserError)
    text = str(error) if mistake else "".join(traceback.format_exception(error))
    with contextlib.suppress(FileNotFoundError):  # the directory is gone with the job
        write_json(directory / f"{uuid.uuid4().hex}.error", {"mistake": mistake, "text": text})


def has_failed(directory: pathlib.Path) -> bool:
    """Returns True if a task has failed, so that the rest need not be tried."""
    return any(directory.glob("*.error"))


def raise_failure(directory: pathlib.Path) -> None:
    """Raises the error of a task that failed: UserError as it was, any other as a RuntimeError with its stack trace."""
    for path in children(directory, "*.error"):
        failure = json.loads(path.read_text())
        raise (UserError if failure["mistake"] else RuntimeError)(failure["text"])
