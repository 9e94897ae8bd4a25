"""Strict numerics, one CPU, no network, nothing written outside the repository and temporary directories.

Settings go through the environment, before JAX is imported, so that processes started by a test have them too.
"""

import os
import pathlib
import socket
import tempfile
import zlib
from typing import Any

import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_SCRATCH = tempfile.TemporaryDirectory(prefix="varedit-tests-")


def _cpu_fingerprint() -> str:
    """Compiled code is for one kind of CPU: on another it could stop at an illegal instruction."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return f"{zlib.crc32(next((line for line in lines if line.startswith('flags')), '').encode()):08x}"


os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ |= {
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_COMPILATION_CACHE_DIR": str(_ROOT / ".cache" / "jax" / _cpu_fingerprint()),
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),  # a bounded cache is a locked one: processes can share it
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "VAREDIT_CACHE": "",  # what is compiled by a test is compiled in it
    "TFDS_DATA_DIR": os.path.join(_SCRATCH.name, "tfds"),
    "HF_HOME": os.path.join(_SCRATCH.name, "huggingface"),
    "HF_HUB_OFFLINE": "1",
    "XDG_CACHE_HOME": os.path.join(_SCRATCH.name, "cache"),
    # The emulator of Google's store has no gRPC and asks for no credentials.
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "FSSPEC_GCS_TOKEN": "anon",
    "NO_GCE_CHECK": "true",
}

from absl import flags  # noqa: E402

flags.FLAGS.mark_as_parsed()  # Grain's worker processes read flags that only an absl program parses


def pytest_unconfigure() -> None:
    _SCRATCH.cleanup()


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Any:
    """A test that reaches for the network fails by name, not by a time-out on somebody else's machine."""
    connect = socket.socket.connect

    def connect_at_home(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise PermissionError(f"a test tried to reach {address[0]}; tests use nothing outside the repository")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_at_home)
        yield
