"""Requests to stop a run: signals, and JAX's preemption service where there are several processes."""

import os
import signal
import sys
import threading
import types
from collections.abc import Callable
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from varedit_jax.parallel.processes import note, noted

_INTERRUPTED = "varedit_jax/interrupted"  # noted for all processes


class Stopped(Exception):
    """Raised by `poll` if the run is to stop; the loop catches it, saves, and exits."""


_POLLED: list[Callable[[], None]] = []  # of the run under way


def poll() -> None:
    """Raises Stopped if the run is to stop, and resets the watchdog. Does nothing outside of a run.

    Call it repeatedly in long work between two steps, such as after each batch of an evaluation; a resumed run repeats
    what was interrupted. All processes of a run must call it equally often.
    """
    for function in _POLLED:
        function()


class StopSignal:
    """Records SIGTERM and SIGINT, for the loop to end between two steps. A context manager.

    A single process handles the signals in Python: only when Python code runs in the main thread, so after a
    compilation, not during it. With several processes JAX's preemption service catches SIGTERM in any of them, and
    tells all of them at which call of `requested` to stop: so all must make the same calls. SIGINT in any of them is
    noted where all can read it, and becomes a SIGTERM.

    A second signal does not wait for the step to end; a third one reaches the previous handlers.
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
            # The service stops all processes at a call that none of them has reached yet.
            if multihost_utils.reached_preemption_sync_point(self._calls):
                self.signal = signal.SIGINT if noted(_INTERRUPTED) else signal.SIGTERM
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

    def _pass_on(self, number: int, frame: types.FrameType | None) -> None:
        del number, frame
        self._give_back()  # a second one does not wait
        note(_INTERRUPTED)  # before any process can learn that it is to stop
        os.kill(os.getpid(), signal.SIGTERM)

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __enter__(self) -> Self:
        """Takes over the signals, in the main thread, and answers `poll`."""
        handlers = {signal.SIGTERM: self._note, signal.SIGINT: self._note}
        if jax.process_count() > 1:
            handlers = {signal.SIGINT: self._pass_on}
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                self._previous[number] = signal.signal(number, handler)
        _POLLED.append(self._poll)
        return self

    def __exit__(self, *exception: object) -> None:
        """Gives the signals back."""
        _POLLED.remove(self._poll)
        self._give_back()
