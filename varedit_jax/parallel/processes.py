"""The processes of one run: connecting, barriers, shutdown.

Each holds some of the devices; all run the same program and the same collective operations.
"""

import atexit
import contextlib
import glob
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping
from itertools import combinations, count
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import clusters
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from varedit_jax.causes import exit_code
from varedit_jax.errors import TemporaryError, UserError
from varedit_jax.parallel.roll_call import call_roll
from varedit_jax.storage.orbax import ocp

# After it a silent process counts as gone. A thread of its own answers, while the process compiles or waits, too.
_HEARTBEAT_SECONDS = 100
_SHUTDOWN_SECONDS = 120  # that a finished process waits for the others
_BARRIER_SECONDS = 4 * 3600  # others may compile, and process 0 prepare data, for hours
_CONNECTING_SECONDS = 300
_INTERRUPTED = 130  # exit code of a process that Ctrl-C ended

_TPU_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")

_BARRIERS = count()  # each needs a name of its own


@contextlib.contextmanager
def joined(coordinator: str = "", process_count: int | None = None, process_index: int | None = None) -> Iterator[None]:
    """Connects the process to the others of its run for the block. To be entered before JAX is used.

    Without arguments the environment tells if there are others: SLURM, Open MPI, and TPUs in Google's cloud. A process
    that succeeds waits for the others; one that fails does not, and then the others are ended, too.

    Args:
      coordinator: "HOST:PORT" of process 0; with it, the other two are needed.
      process_count: of the run; 1 alone means no others, whatever the environment says.
      process_index: of this process, from 0.

    Raises:
      UserError: arguments that do not go together, or others that were not found.
    """
    arguments = _arguments(coordinator, process_count, process_index)
    if arguments is None and (process_count == 1 or cluster(os.environ) is None):
        yield
        return
    with _without_proxies():
        _connect(arguments)
    try:
        yield
    except SystemExit:  # asked to stop, as all are
        jax.distributed.shutdown()
        raise
    except BaseException as error:
        # The others wait for it in the middle of a step, so it must not wait for them: they fail when it is gone.
        atexit.register(_leave, _INTERRUPTED if isinstance(error, KeyboardInterrupt) else exit_code(error))
        raise
    jax.distributed.shutdown()


def _connect(arguments: dict[str, Any] | None) -> None:
    """Connects the process to the others; without arguments, as the environment tells. Raises UserError."""
    try:
        found = arguments or _found_by_environment()
        call_roll(found["coordinator_address"], found["num_processes"], found["process_id"], _CONNECTING_SECONDS)
        jax.distributed.initialize(
            **found,
            initialization_timeout=_CONNECTING_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except UserError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TemporaryError(
            f"the processes of the run did not find each other ({reason}); see that all of them were started and can "
            f"reach process 0, or give --process_count=1 to run alone"
        ) from error


def _found_by_environment() -> dict[str, Any]:
    """Returns arguments of jax.distributed.initialize, as it finds them itself (jax 0.10.2)."""
    names = ("coordinator_address", "num_processes", "process_id", "local_device_ids")
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(*(None,) * 5, _CONNECTING_SECONDS)
    if None in found[:3]:
        raise RuntimeError("the environment does not tell which they are")
    return dict(zip(names, found, strict=True), cluster_detection_method="deactivate")


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """Hides the environment's proxies: gRPC would ask them for the address of process 0, when its channel is made."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.lower().endswith("_proxy")}
    try:
        yield
    finally:
        os.environ |= hidden


def wait_for_all(name: str) -> None:
    """Returns when all processes of the run have called it; `name` is for messages. All call it equally often.

    It uses no devices, so a process may arrive hours after the others.
    """
    barrier = ocp.multihost.get_barrier_sync_fn()
    barrier(key=f"varedit_jax/{next(_BARRIERS)}/{name}", timeout_ms=_BARRIER_SECONDS * 1000)


def meet(mesh: Mesh) -> None:
    """Runs the first collective operations, over every group of axes of the mesh, before anything takes long.

    Gloo, which connects CPUs (jaxlib 0.10), gives up connecting a group when a process is 30 s late, as it may be after
    minutes of compiling; a group that is connected waits.
    """
    wait_for_all("the others")
    groups = [axes for size in range(1, len(mesh.axis_names) + 1) for axes in combinations(mesh.axis_names, size)]
    everywhere = PartitionSpec()

    def add() -> jax.Array:
        return jnp.stack([jax.lax.psum(jnp.ones(()), axes) for axes in groups])

    sums = jax.jit(jax.shard_map(add, mesh=mesh, in_specs=(), out_specs=everywhere, check_vma=False))()
    jax.block_until_ready(sums)


@contextlib.contextmanager
def first_process_first(name: str) -> Iterator[None]:
    """Process 0 runs the block while the others wait; then they run it, and find its files on the shared disk."""
    first = jax.process_index() == 0
    if not first:
        wait_for_all(name)
    yield
    if first:
        wait_for_all(name)


def note(name: str) -> None:
    """Notes something for all processes of the run, which see it from now on by `noted`."""
    report(name, "yes")


def noted(name: str) -> bool:
    """Returns True if a process of the run has noted it."""
    try:
        return bool(ocp.multihost.get_jax_distributed_client().key_value_try_get(name))
    except jax.errors.JaxRuntimeError:  # there is no such key
        return False


def report(name: str, text: str) -> None:
    """Leaves a text for all processes of the run, instead of an earlier one of that name."""
    ocp.multihost.get_jax_distributed_client().key_value_set(name, text, allow_overwrite=True)


def reports(prefix: str) -> dict[str, str]:
    """Returns the texts left so far by names that begin with `prefix`, a path that ends in "/"; never waits."""
    return dict(ocp.multihost.get_jax_distributed_client().key_value_dir_get(prefix))


def check_same(what: str, value: str) -> None:
    """Returns if all processes of the run give the same value. Raises UserError, in all of them, if they do not."""
    if jax.process_count() == 1:
        return
    own = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.int32)  # JAX's arrays have 32 bits
    found = np.asarray(multihost_utils.process_allgather(own)).reshape(-1, own.size)
    others = np.flatnonzero((found != found[0]).any(axis=1))
    if len(others):
        raise UserError(
            f"{what} of process {others[0]} differ from those of process 0; see that all processes read the same "
            f"files, then run the same command again"
        )


def _leave(code: int) -> None:
    """Ends the process at exit, output flushed, before JAX waits for the other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def has_tpu() -> bool:
    """Returns True if this machine has TPUs."""
    return any(map(glob.glob, _TPU_DEVICES))


def cluster(environment: Mapping[str, str]) -> str | None:
    """The launcher that started several processes and gives each its index; None if there is none."""
    step = "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment  # begun by srun
    if step and _number(environment, "SLURM_NTASKS") > 1:
        return "SLURM"
    if _number(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    platforms = environment.get("JAX_PLATFORMS", "")
    if importlib.util.find_spec("libtpu") is None or (platforms and "tpu" not in platforms):
        return None
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    if "," in workers or _number(environment, "MEGASCALE_NUM_SLICES") > 1:
        return "TPUs of GKE"
    if not workers and "TPU_SKIP_MDS_QUERY" not in environment and has_tpu():
        return "TPU VMs"  # whose metadata server knows the others, if there are any
    return None


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else 0


def _arguments(coordinator: str, process_count: int | None, process_index: int | None) -> dict[str, Any] | None:
    """Arguments of jax.distributed.initialize; None if the environment has them or the process is alone.

    Raises UserError if they do not go together.
    """
    if not coordinator:
        if process_index is not None or process_count not in (None, 1):
            raise UserError(
                f"--process_count={process_count} and --process_index={process_index} need --coordinator=HOST:PORT, "
                f"the address of process 0"
            )
        return None
    if process_count is None or process_index is None:
        raise UserError(f"--coordinator={coordinator} needs --process_count and --process_index, too")
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(f"--coordinator={coordinator} is not HOST:PORT")
    if not 0 < int(coordinator.rpartition(":")[2]) < 2**16:
        raise UserError(f"--coordinator={coordinator} has a port that does not exist; give one of 1 to 65535")
    if not 0 <= process_index < process_count:
        raise UserError(
            f"--process_index={process_index} is none of {process_count} processes; give 0 to {process_count - 1}"
        )
    return {
        "coordinator_address": coordinator,
        "num_processes": process_count,
        "process_id": process_index,
        "cluster_detection_method": "deactivate",  # arguments override the environment
    }


def say(sentence: str, screen: TextIO | None = None) -> None:
    """Prints a line from process 0 only, to standard error if no screen is given."""
    if jax.process_index() == 0:
        print(sentence, file=screen or sys.stderr, flush=True)
