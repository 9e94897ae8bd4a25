"""Several processes stop at the same call; a single process is tested with the loop."""

import signal

import pytest

from varedit_jax.training.stop import Stopped, StopSignal, poll


def test_processes_stop_at_the_call_that_jax_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call has the next number, whether it comes from the loop or from an evaluation; signals are left to JAX."""
    calls: list[int] = []

    def reached(number: int) -> bool:
        calls.append(number)
        return number == 3

    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.experimental.multihost_utils.reached_preemption_sync_point", reached)
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert signal.getsignal(signal.SIGTERM) is before
        assert not stop.requested()
        poll()
        assert not stop.requested()
        with pytest.raises(Stopped):
            poll()
        assert stop.requested() and stop.signal == signal.SIGTERM
    assert calls == [0, 1, 2, 3]
    poll()
    assert calls == [0, 1, 2, 3]  # the run is over


def test_poll_is_a_sign_of_life() -> None:
    beats: list[str] = []
    poll()
    with StopSignal(lambda: beats.append("beat")):
        poll()
        poll()
    poll()
    assert beats == ["beat", "beat"]
