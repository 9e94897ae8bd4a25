"""Processes of one run: how they find each other, wait, and part; and what is said where that cannot be."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varedit_jax.config import MeshConfig
from varedit_jax.errors import UserError
from varedit_jax.parallel import processes
from varedit_jax.parallel.mesh import batch_part, make_mesh, put_batch, replicated


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("", 4, None), "--process_count=4 and --process_index=None need --coordinator=HOST:PORT"),
        (("", None, 0), "--process_count=None and --process_index=0 need --coordinator=HOST:PORT"),
        (("", 1, 0), "--process_count=1 and --process_index=0 need --coordinator=HOST:PORT"),
        (("here:1", None, 0), "--coordinator=here:1 needs --process_count and --process_index, too"),
        (("here:1", 2, None), "--coordinator=here:1 needs --process_count and --process_index, too"),
        (("here", 2, 0), "--coordinator=here is not HOST:PORT"),
        (("here:0", 2, 0), "--coordinator=here:0 has a port that does not exist; give one of 1 to 65535"),
        (("here:65536", 2, 0), "--coordinator=here:65536 has a port that does not exist; give one of 1 to 65535"),
        (("here:1", 2, 2), "--process_index=2 is none of 2 processes; give 0 to 1"),
        (("here:1", 2, -1), "--process_index=-1 is none of 2 processes; give 0 to 1"),
    ],
)
def test_arguments_that_do_not_go_together(arguments: tuple[str, int | None, int | None], sentence: str) -> None:
    with pytest.raises(UserError) as error, processes.joined(*arguments):
        pass
    assert str(error.value).startswith(sentence)


def test_a_coordinator_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_CONNECTING_SECONDS", 0.1)
    with socket.socket() as taken:  # a port where nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        expected = pytest.raises(UserError, match=f"process 0 does not answer at --coordinator={address}")
        with expected, processes.joined(address, 2, 1):
            pass


SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "8"}
GKE = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (SLURM, "SLURM"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, None),  # in the batch script, outside of srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        (GKE, "TPUs of GKE"),
        (GKE | {"TPU_WORKER_HOSTNAMES": "a"}, None),
        (GKE | {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "TPUs of GKE"),
        (GKE | {"JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_what_started_several_processes(
    environment: dict[str, str], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name)  # of libtpu
    assert processes.cluster(environment) == found


def test_a_tpu_machine_is_known_by_its_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: ["/dev/vfio/0"] if "vfio" in pattern else [])
    assert processes.cluster({}) == "TPU VMs"
    assert processes.cluster({"TPU_SKIP_MDS_QUERY": "1"}) is None
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    assert processes.cluster({}) is None


def test_a_process_alone_waits_for_nobody() -> None:
    with processes.joined("", 1):
        processes.meet(make_mesh(MeshConfig(), jax.devices()[:1]))
        processes.wait_for_all("nobody")
        with processes.first_process_first("nothing"):
            pass


@pytest.mark.slow
@pytest.mark.subprocess
def test_a_proxy_is_not_asked_for_process_0(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that nobody answers at: JAX would wait for it for minutes, and abort."""
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://192.0.2.1:3128")
    assert two_processes("joins", tmp_path, devices=1) == ([0, 0], ["joined\n"] * 2)


def two_processes(
    what: str, directory: pathlib.Path, devices: int, program: str = __file__
) -> tuple[list[int], list[str]]:
    """Exit codes and output of two processes with so many devices each, which do what the end of `program` says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": ""}
    environment["PYTHONPATH"] = str(pathlib.Path(__file__).parents[3])
    both = [
        subprocess.Popen(
            [sys.executable, program, what, str(directory), address, str(index)],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=100)[0] for process in both]
    return [process.returncode for process in both], said


@pytest.mark.slow
@pytest.mark.subprocess
def test_two_processes(tmp_path: pathlib.Path) -> None:
    """The second finds what the first has left; when the second fails, its error is said, and the first ends, too."""
    begin = time.monotonic()
    codes, said = two_processes("one_of_two", tmp_path, devices=1)
    assert "process 0 of 2 has left it" in said[0] and "process 1 of 2 found: it" in said[1], said
    assert codes[1] == 1 and "UserError: a mistake" in said[1], said
    assert codes[0] != 0, said
    assert time.monotonic() - begin < processes._SHUTDOWN_SECONDS, said


@pytest.mark.slow
@pytest.mark.subprocess
def test_devices_of_a_process_need_not_follow_each_other(tmp_path: pathlib.Path) -> None:
    """As on a torus of TPUs: a process's part of a batch lies between those of the other. Both notice other data."""
    assert two_processes("crossed", tmp_path, devices=2)[0] == [0, 0]


def one_of_two(directory: pathlib.Path, address: str, index: int) -> None:
    """For `test_two_processes`."""
    with processes.joined(address, 2, index):
        mesh = make_mesh(MeshConfig(data=1, fsdp=2))
        processes.meet(mesh)
        halves = put_batch(mesh, {"x": np.ones(1, np.float32)})["x"]
        with processes.first_process_first("it"):
            if index == 0:
                time.sleep(0.5)
                (directory / "left").write_text("it")
                print(f"process {jax.process_index()} of {jax.process_count()} has left it")
            else:
                text = (directory / "left").read_text()
                print(f"process {jax.process_index()} of {jax.process_count()} found: {text}")
        if index == 1:
            raise UserError("a mistake")
        jax.block_until_ready(jax.jit(jnp.sum, out_shardings=replicated(mesh))(halves))  # without the other


def joins(directory: pathlib.Path, address: str, index: int) -> None:
    """For `test_a_proxy_is_not_asked_for_process_0`."""
    del directory
    with processes.joined(address, 2, index):
        assert "grpc_proxy" in os.environ  # for whatever needs it later
        print("joined")


def crossed(directory: pathlib.Path, address: str, index: int) -> None:
    """For `test_devices_of_a_process_need_not_follow_each_other`."""
    del directory
    with processes.joined(address, 2, index):
        mesh = make_mesh(MeshConfig(data=1, fsdp=4))
        mesh = jax.sharding.Mesh(mesh.devices[:, [0, 2, 1, 3]], mesh.axis_names)
        assert batch_part(mesh) == (index, 2)
        placed = put_batch(mesh, {"x": np.array([index, index + 10])})["x"]
        own = {shard.index[0].start: int(shard.data[0]) for shard in placed.addressable_shards}
        assert own == {index: index, index + 2: index + 10}
        processes.check_same("data", "the same")
        with pytest.raises(UserError, match="data of process 1 differ from those of process 0; see that all processes"):
            processes.check_same("data", f"of {index}")


if __name__ == "__main__":
    {"one_of_two": one_of_two, "crossed": crossed, "joins": joins}[sys.argv[1]](
        pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    )
