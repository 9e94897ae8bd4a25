"""Preparing on clusters: workers are other programs, and one is killed while it works."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from data_pipelines.preparation.pipeline import prepare
from data_pipelines.preparation.settings import Settings
from tests.data_pipelines.preparation.corpus import write_corpus
from varedit_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[3]
SETTINGS = Settings(exact=False, validation=0.3, shard_bytes=20_000)
# Run by a worker as it starts: the first to open this list leaves its number, and stops there.
HOLD = """
import builtins, os, time
plain = builtins.open
def held(file, *arguments, **named):
    if str(file).endswith("list-1.jsonl"):
        try:
            with plain({marker!r}, "x") as marker:
                marker.write(str(os.getpid()))
            time.sleep(60)
        except FileExistsError:
            pass
    return plain(file, *arguments, **named)
builtins.open = held
"""


class Cluster:
    """Programs that are ended with the test, and a data set for them."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.killed = False
        self._programs: list[subprocess.Popen[bytes]] = []
        self.lists, _, _ = write_corpus(directory / "in", lists=4)
        self.marker = directory / "held"
        hold = directory / "hold"
        hold.mkdir()
        (hold / "sitecustomize.py").write_text(HOLD.format(marker=str(self.marker)))
        python = pathlib.Path(sys.executable).parent  # Beam's pool of workers starts "python"
        self._environment = os.environ | {
            "PYTHONPATH": f"{hold}:{ROOT}", "PATH": f"{python}:{os.environ['PATH']}"
        }  # fmt: skip

    def start(self, module: str, *arguments: str) -> None:
        log = (self.directory / f"{module}-{len(self._programs)}.log").open("wb")
        with log:
            command = [sys.executable, "-m", module, *arguments]
            options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
            self._programs.append(subprocess.Popen(command, env=self._environment, cwd=self.directory, **options))

    def end(self) -> None:
        for program in self._programs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()

    def prepare(self, name: str, runner: str = "DirectRunner", *options: str, timeout: float = 60) -> None:
        prepare(
            "manifest", list(map(str, self.lists)), self.directory / name, SETTINGS, source_options={"dataset": "made"},
            runner=runner, runner_options=options, runner_timeout=timeout
        )  # fmt: skip

    def kill_the_held_worker(self) -> None:
        number = int(wait_for(lambda: self.marker.exists() and self.marker.read_text()))
        os.kill(number, signal.SIGKILL)
        self.killed = True

    def files(self, name: str) -> dict[str, bytes]:
        directory = self.directory / name
        return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def wait_for(ready: Callable[[], str | bool], seconds: float = 60) -> str:
    end = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return str(found)


@contextlib.contextmanager
def in_background(work: Callable[[], object]) -> Iterator[None]:
    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()


@pytest.fixture
def cluster(tmp_path: pathlib.Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.end()


@pytest.mark.slow
@pytest.mark.subprocess
def test_a_dask_cluster_gives_the_same_bytes_though_a_worker_is_killed(cluster: Cluster) -> None:
    address_file = cluster.directory / "scheduler.json"
    cluster.start(
        "distributed.cli.dask_scheduler", "--host=127.0.0.1", "--port=0", "--no-dashboard",
        f"--scheduler-file={address_file}",
    )  # fmt: skip
    for _ in range(3):
        cluster.start(
            "distributed.cli.dask_worker", f"--scheduler-file={address_file}", "--no-nanny", "--nthreads=1",
            "--no-dashboard", "--host=127.0.0.1",
        )  # fmt: skip
    wait_for(lambda: address_file.exists() and address_file.read_text().endswith("}"))
    address = json.loads(address_file.read_text())["address"]
    with in_background(cluster.kill_the_held_worker):
        cluster.prepare("dask", "DaskRunner", f"--dask_client_address={address}")
    assert cluster.killed
    cluster.prepare("here")
    assert cluster.files("dask") == cluster.files("here")


@pytest.mark.slow
@pytest.mark.subprocess
def test_a_job_service_whose_worker_is_killed_is_given_up_and_resumed_with_the_same_bytes(cluster: Cluster) -> None:
    port_file = cluster.directory / "port"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        pool = free.getsockname()[1]
    cluster.start("apache_beam.runners.portability.local_job_service_main", f"--port_file={port_file}")
    cluster.start("apache_beam.runners.worker.worker_pool_main", f"--service_port={pool}")
    service = int(wait_for(lambda: port_file.exists() and port_file.read_text()))
    options = (
        f"--job_endpoint=localhost:{service}", "--environment_type=EXTERNAL", f"--environment_config=localhost:{pool}"
    )  # fmt: skip
    given_up = 0
    with in_background(cluster.kill_the_held_worker):
        while not (cluster.directory / "portable").exists():  # on a busy machine workers may also start too late
            try:
                cluster.prepare("portable", "PortableRunner", *options, timeout=10 + 5 * given_up)
            except UserError as error:
                assert "no worker of --runner=PortableRunner has shown a sign of life for" in str(error)
                given_up += 1
                assert given_up < 8
    assert cluster.killed and given_up
    cluster.prepare("here")
    assert cluster.files("portable") == cluster.files("here")
