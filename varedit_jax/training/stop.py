"""Requests to stop a run: signals, and JAX's preemption service where there are several processes."""

import signal
import sys
import threading
import types
from collections.abc import Callable
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class Stopped(Exception):
    """Raised by `poll` where a run is to stop; the loop catches it, saves, and exits."""


_POLLED: list[Callable[[], None]] = []  # by the runs that are under way: one, that is


def poll() -> None:
    """To be called now and then by what takes long between two steps, such as an evaluation after each batch.

    Raises Stopped, for the loop, if the run is to stop; a resumed run repeats what was broken off. It also tells
    the watchdog that something happens. Without effect outside of a run. In a run of several processes, all of them
    have to call it equally often.
    """
    for function in _POLLED:
        function()


class StopSignal:
    """Notes SIGTERM and SIGINT, for the loop to end between two steps. A context manager.

    A single process handles the signals by itself, in Python: they are noticed as soon as Python code runs in the main
    thread, so during a compilation only when that has ended. In several processes JAX's preemption service catches
    SIGTERM in any of them, and tells all of them at which of their calls of `requested` to stop: so all have to make
    the same calls.

    A second signal does not wait for the step to end, and a third one meets the handlers that were there before.
    """

    def __init__(self, beat: Callable[[], None] = lambda: None) -> None:
        """`beat` is called by every `poll`."""
        self.signal: signal.Signals | None = None
        self._beat = beat
        self._calls = 0
        self._previous: dict[signal.Signals, Any] = {}

    def requested(self) -> bool:
        """Returns True if the run is to stop now."""
        if jax.process_count() > 1 and self.signal is None:
            # The service compares the numbers of calls, and stops everyone at one that no one has reached yet.
            if multihost_utils.reached_preemption_sync_point(self._calls):
                self.signal = signal.SIGTERM
            self._calls += 1
        return self.signal is not None

    def _poll(self) -> None:
        self._beat()
        if self.requested():
            raise Stopped

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        if self.signal is not None:
            self._give_back()
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            sys.exit(128 + number)
        self.signal = signal.Signals(number)

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __enter__(self) -> Self:
        """Takes over the signals, in the main thread of a single process, and answers `poll`."""
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        _POLLED.append(self._poll)
        return self

    def __exit__(self, *exception: object) -> None:
        """Gives the signals back."""
        _POLLED.remove(self._poll)
        self._give_back()
