"""Ends a run that hangs, and reports where it hung."""

import contextlib
import faulthandler
import os
import pathlib
import sys
import tempfile
import threading
import time
from typing import Self, TextIO

from varedit_jax.config import GuardConfig
from varedit_jax.errors import TEMPORARY
from varedit_jax.storage.paths import PathLike, is_remote, resolve

_CHECKS = 20  # per allowed time
STARTING, FIRST_BATCH = "starting", "first batch"
# Reading weights or making them, restoring, waiting for the first data, compiling, and what compiles something.
LONG_PHASES = frozenset({STARTING, "restore", FIRST_BATCH, "compile", "evaluate", "sample", "save", "verify"})


class Watchdog:
    """Writes the stacks of all threads and exits with code 75 if `beat` is not called in time. A context manager.

    The loop calls `beat` when a step has finished and when a phase begins (compiling, evaluating, saving ...); long
    work within a phase does so by `stop.poll`. Phases that take long by themselves (`LONG_PHASES`) have a limit of
    their own: compiling takes ten minutes or more for 8B, and a slow start would be ended each time it is repeated.

    A collective that another process does not join hangs inside XLA, where no Python code of the main thread runs, so
    a separate thread checks the time. If that one cannot run either, because something holds the interpreter,
    faulthandler's C thread writes the stacks, to standard error alone, and exits somewhat later with code 1.
    """

    def __init__(self, config: GuardConfig, workdir: PathLike) -> None:
        """Does nothing if `config.hang_minutes` is 0. Stacks go to `workdir`/hang_PID.txt and to standard error.

        `config.long_minutes` is the limit of `LONG_PHASES`, if it is more than `hang_minutes`.
        """
        self._seconds = config.hang_minutes * 60
        self._long_seconds = max(config.long_minutes, config.hang_minutes) * 60
        directory = resolve(workdir)
        # The network may be what hangs: with an object store the file is local.
        directory = pathlib.Path(tempfile.gettempdir()) if is_remote(directory) else directory
        self._path = directory / f"hang_{os.getpid()}.txt"
        self._last = time.monotonic()
        self._phase = STARTING
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, phase: str = "") -> None:
        """Records that the run is alive, and its phase, if that changes."""
        self._last = time.monotonic()
        before = self._limit()
        self._phase = phase or self._phase
        if self._thread is not None and self._limit() < before:  # the thread may not run again before it hangs
            self._arm()

    def __enter__(self) -> Self:
        """Starts watching."""
        if self._seconds > 0:
            self._last = time.monotonic()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends watching."""
        self._ended.set()
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        interval = self._seconds / _CHECKS
        while True:
            self._arm()
            if self._ended.wait(interval):
                return
            idle = time.monotonic() - self._last
            if idle > self._limit():
                self._end(idle)

    def _arm(self) -> None:
        """Has C's thread end the run somewhat after the limit, in case no other thread runs again."""
        seconds = self._limit() + 2 * self._seconds / _CHECKS
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)

    def _limit(self) -> float:
        return self._long_seconds if self._phase in LONG_PHASES else self._seconds

    def _end(self, idle: float) -> None:
        field = "long_minutes" if self._limit() > self._seconds else "hang_minutes"
        sentence = (
            f"no sign of life for {idle / 60:.3g} minutes (guard.{field} is {self._limit() / 60:g}) while "
            f"{self._phase}; the stacks of all threads are in {self._path}; exit code {TEMPORARY}\n"
        )
        with contextlib.suppress(OSError, ValueError):
            self._path.parent.mkdir(parents=True, exist_ok=True)  # a run that starts may not have made it
            with self._path.open("w") as file:
                _write(file, sentence)
        with contextlib.suppress(OSError, ValueError):
            _write(sys.__stderr__ or sys.stderr, sentence)
        os._exit(TEMPORARY)  # nothing else ends a thread that hangs in C


def _write(file: TextIO, sentence: str) -> None:
    file.write(sentence)
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)
