"""Whole compiled programs on disk, which the next process runs without tracing the functions they came from.

JAX's own cache spares compiling alone, and its key has to be made from the traced program. Here the key is what the
program was made from: names, configs, shapes, the source of this package, versions, and settings of JAX and XLA. A
program is for the kind of device, and the kind of CPU, that it was compiled on.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.resources
import os
import pickle
import threading
import zlib
from typing import Any

import jax
import jax.monitoring
from jax.experimental import serialize_executable

from varedit_jax.parallel import compilation_cache
from varedit_jax.parallel.compiler_options import options_everywhere
from varedit_jax.storage import files, paths

_MOST_BYTES = 4 * 2**30  # of all programs; the ones used longest ago go first
_SETTINGS = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
    "jax_disable_most_optimizations",
    "jax_exec_time_optimization_effort",
)

_compiling = threading.local()


def _listen(event: str, **more: Any) -> None:
    """Notes in the thread that compiles that JAX's cache had the program."""
    del more
    if event == "/jax/compilation_cache/cache_hits":
        _compiling.from_cache = True


jax.monitoring.register_event_listener(_listen)


def key_of(*parts: Any) -> str:
    """A name for the program that is made from `parts`, whose texts say all that it depends on in this environment."""
    device = jax.devices()[0]
    environment = (
        device.device_kind,
        device.client.platform_version,
        options_everywhere(device),
        [jax.config.values[name] for name in _SETTINGS],
        [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")],
    )
    return hashlib.sha256(repr((parts, environment, _source(), _cpu())).encode()).hexdigest()


@functools.cache
def _source() -> str:
    """A digest of the package's code, and of the versions of what it runs on."""
    digest = hashlib.sha256(f"{jax.__version__} {importlib.metadata.version('jaxlib')}".encode())
    with importlib.resources.as_file(importlib.resources.files("varedit_jax")) as root:
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _cpu() -> int:
    """Of what this machine's CPU can do: a program for another could stop at an illegal instruction."""
    cpuinfo = paths.resolve("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return zlib.crc32("".join(line for line in lines if line.startswith(("flags", "Features"))).encode())


def load(key: str) -> jax.stages.Compiled | None:
    """The program of a key; None if there is none that can be used, or none are to be kept."""
    path = _path(key)
    if path is None or not path.is_file():
        return None
    try:
        program = serialize_executable.deserialize_and_load(*pickle.loads(path.read_bytes()))
        os.utime(path)
        return program
    except Exception:  # whatever is wrong with a file, the program can be compiled
        with contextlib.suppress(OSError):
            path.unlink()
        return None


def compile_and_save(key: str, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a program, and keeps it where the backend can write it down and the disk has room."""
    _compiling.from_cache = False
    program = lowered.compile()
    path = _path(key)
    # What JAX's cache has loaded cannot be written down again: on CPUs (jaxlib 0.10.2) it then misses functions.
    if path is None or _compiling.from_cache:
        return program
    try:
        data = pickle.dumps(serialize_executable.serialize(program))
        files.make_directory(path.parent)
        files.write_bytes(path, data)
        _make_room(path.parent)
    except Exception:  # a program that is not kept is compiled again
        pass
    return program


def _path(key: str) -> Any:
    directory = compilation_cache.directory()
    if not directory or jax.process_count() > 1 or not jax.config.values["jax_enable_compilation_cache"]:
        return None
    return paths.local(directory, "VAREDIT_CACHE") / "programs" / key


def _make_room(directory: Any) -> None:
    found = sorted(((path.stat().st_mtime, path) for path in directory.iterdir()), reverse=True)
    total = 0
    for _, path in found:
        total += path.stat().st_size
        if total > _MOST_BYTES:
            path.unlink(missing_ok=True)
