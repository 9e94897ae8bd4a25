"""Several processes stop at the same call; a single process is tested with the loop."""

import signal
import socket
import subprocess
import sys
import time

import pytest

from varedit_jax.parallel import processes
from varedit_jax.training.stop import Stopped, StopSignal, poll


def test_processes_stop_at_the_call_that_jax_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call has the next number, whether it comes from the loop or from an evaluation; signals are left to JAX."""
    calls: list[int] = []

    def reached(number: int) -> bool:
        calls.append(number)
        return number == 3

    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("varedit_jax.training.stop.noted", lambda name: False)
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


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.parametrize("interrupted", [(0,), (1,), (0, 1)])
def test_ctrl_c_in_any_process_stops_all_at_the_same_call(interrupted: tuple[int, ...]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [
        subprocess.Popen([sys.executable, __file__, address, str(index)], stdout=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    for process in both:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
    for index in interrupted:
        both[index].send_signal(signal.SIGINT)
    said = [process.communicate(timeout=100)[0] for process in both]
    assert said[0] == said[1] and said[0].startswith("stopped at ")
    assert [process.returncode for process in both] == [130, 130]


def steps(address: str, index: int) -> None:
    """For the test above: counts calls until it is to stop, as a run counts its steps."""
    with processes.joined(address, 2, index), StopSignal() as stop:
        print("begun", flush=True)
        for call in range(1000):
            if stop.requested():
                assert stop.signal is not None
                print("stopped at", call, flush=True)
                raise SystemExit(128 + stop.signal)
            time.sleep(0.02)


if __name__ == "__main__":
    steps(sys.argv[1], int(sys.argv[2]))
