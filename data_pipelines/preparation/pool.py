"""Processes that outlive a stage, and never the program: neither its end, Ctrl-C nor SIGKILL leaves one behind."""

import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import traceback
from collections.abc import Callable
from typing import Any, Self, TypeVar

from varedit_jax.errors import UserError

Result = TypeVar("Result")

_at_end: list[Callable[[], object]] = []  # in a process of a pool
_END_SECONDS = 10  # for what is to be done at the end


class Pool:
    """Context manager with processes that start when they are needed, and stay."""

    def __init__(self, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        # Processes end when the other end of this pipe is closed, which the kernel does for a process that is killed.
        theirs, self._ours = context.Pipe(duplex=False)
        self._executor = concurrent.futures.ProcessPoolExecutor(
            processes, context, initializer=_begin, initargs=(theirs,)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Ends the processes; after an error at once, whatever they do."""
        if error is None:
            self._executor.shutdown()
        self._ours.close()
        self._executor.shutdown(cancel_futures=True)

    def submit(self, work: Callable[..., Result], *arguments: Any) -> concurrent.futures.Future[Result]:
        """Starts a call in one of the processes.

        The future raises UserError as the call did, RuntimeError with the stack trace for any other exception, and
        BrokenProcessPool if a process was killed.
        """
        return self._executor.submit(_call, work, *arguments)


def at_end(work: Callable[[], object]) -> None:
    """Has `work`, the last that was given, done before an error elsewhere ends this process; it gets 10 seconds."""
    _at_end[:] = [work]


def _call(work: Callable[..., Result], *arguments: Any) -> Result:
    """Returns the result of a call. What it raises can be pickled: an exception that cannot would look like a kill."""
    failure: Exception
    try:
        return work(*arguments)
    except UserError as error:
        failure = UserError(str(error))
    except BaseException as error:
        failure = RuntimeError("".join(traceback.format_exception(error)))
    raise failure


def _begin(parent: multiprocessing.connection.Connection) -> None:
    os.setpgid(0, 0)  # so that Ctrl-C in a terminal is for the first process alone, which then ends this group
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: multiprocessing.connection.Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        parent.recv_bytes()
    last = threading.Thread(target=_do_all, args=(list(_at_end),), daemon=True)
    last.start()
    last.join(_END_SECONDS)
    os.killpg(0, signal.SIGKILL)  # with processes that this one has started


def _do_all(work: list[Callable[[], Any]]) -> None:
    for each in work:
        with contextlib.suppress(Exception):
            each()
