"""Times of the processes of a run, compared by process 0."""

import pathlib
import sys

import pytest

from tests.varedit_jax.parallel.test_processes import two_processes
from varedit_jax.parallel import processes
from varedit_jax.training import hosts


def test_the_host_that_waits_longest_for_data_is_the_slowest() -> None:
    found = hosts.compare({0: (1.0, 0.1), 1: (1.0, 0.7), 2: (1.1, 0.2)}, 3)
    assert found == {
        "time/host_step_seconds_max": 1.1,
        "time/host_data_wait_max": 0.7,
        "time/slowest_host": 1.0,
        "time/late_host": -1.0,
    }


def test_a_host_without_a_report_is_late() -> None:
    found = hosts.compare({0: (1.0, 0.1)}, 2)
    assert found["time/slowest_host"] == found["time/late_host"] == 1.0
    assert found["time/host_data_wait_max"] == 0.1


def test_a_process_alone_has_no_such_fields() -> None:
    assert hosts.gather(3, 1.0, 0.5) == {}


@pytest.mark.slow
@pytest.mark.subprocess
def test_two_processes_report(tmp_path: pathlib.Path) -> None:
    codes, said = two_processes("reports", tmp_path, devices=1, program=__file__)
    assert codes == [0, 0], said


def reports(address: str, index: int) -> None:
    """For `test_two_processes_report`."""
    with processes.joined(address, 2, index):
        found = hosts.gather(7, 1.0 + index, 0.25 * index)
        processes.wait_for_all("reports")
        late = hosts.gather(8, 1.0, 0.0, seconds=0.2) if index == 0 else {}  # the other reports nothing
        if index == 0:
            assert (found["time/host_step_seconds_max"], found["time/host_data_wait_max"]) == (2.0, 0.25), found
            assert (found["time/slowest_host"], found["time/late_host"]) == (1.0, -1.0), found
            assert late["time/late_host"] == 1.0, late
        else:
            assert found == {}


if __name__ == "__main__":
    reports(sys.argv[3], int(sys.argv[4]))
