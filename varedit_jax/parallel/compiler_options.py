"""Options of XLA by chip: what they are for, where they are from, and the version that they were tried with.

A run adds its own by `RunConfig.compiler_options`, as NAME=VALUE; "NAME=" leaves one of these out. They go to the
compiler with the step, so that XLA_FLAGS and LIBTPU_INIT_ARGS need not be set.
"""

import concurrent.futures
import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from varedit_jax import hardware
from varedit_jax.errors import UserError

Value = bool | int | float | str

# A gather of parameters in pieces, each under a matmul that does not need it yet. Source: MaxText's
# benchmarks/xla_flags_library.py, "CF_FOR_ALL_GATHER". Tried with libtpu 0.0.42.1: without them no gather of this
# program is asynchronous.
_ASYNC_GATHERS: dict[str, Value] = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": True,
}
# Reduce-scatters of sums over all chips. Without it libtpu 0.0.42.1 makes all-reduces of them, which move twice the
# bytes, but over the rings of all links: on the three dimensions of v5p they are faster than the single ring of a
# scatter (8B at 512 px on 4x4x4: 0.37 s a step in place of 0.47 s, by the links' formula). v5e has no SparseCores.
_SCATTERS: dict[str, Value] = {"xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True}
# VMEM that one fusion may take, KiB, which larger tiles of matmuls need. Source of the option: as above,
# "DENSE_VMEM_LIMIT_FLAG", 98304 for Trillium. Tried with libtpu 0.0.42.1 on the feed-forward part of 8B at 512 px,
# forward and backward: matmuls take 67.1, 60.6, 59.2 and 58.9 ms on v5p with 16 (the default), 24, 32 and 48 MiB, and
# the compilation 1, 1.3, 2 and 7 times as long; 141.6, 139.4 and 139.5 ms on v5e with 16, 24 and 32 MiB; 45.8 and 38.7
# ms on v6e with 32 (the default) and 48 MiB. With 96 MiB the step of 8B had not compiled on v6e after 40 minutes of
# processor time.
_VMEM_24: dict[str, Value] = {"xla_tpu_scoped_vmem_limit_kib": 24 * 1024}
_VMEM_48: dict[str, Value] = {"xla_tpu_scoped_vmem_limit_kib": 48 * 1024}

# NVIDIA's JAX-Toolbox, "Tips for High-Performance LLMs with JAX and XLA". jaxlib 0.10.2 has the scheduler off by
# default. Not tried: no program of this project has been compiled for GPUs on a machine without one.
_GPU: dict[str, Value] = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_enable_pipelined_all_gather": True,
    "xla_gpu_enable_pipelined_reduce_scatter": True,
    "xla_gpu_enable_while_loop_double_buffering": True,
    "xla_gpu_all_gather_combine_threshold_bytes": 1 << 30,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 1 << 30,
}

# Matmuls alone go to the library YNNPACK. By default XLA of jaxlib 0.10.2 hands it sums, too, with all that is computed
# in front of them, some of which come out wrong: jax-ml/jax issue 39103, whose example is right with this option. Tried
# with jaxlib 0.10.2 (results/benchmark_cpu.md).
_CPU: dict[str, Value] = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}

CHIP_OPTIONS: dict[str, dict[str, Value]] = {
    "CPU": _CPU,
    "TPU v4": _ASYNC_GATHERS,
    "TPU v5e": _ASYNC_GATHERS | _VMEM_24,
    "TPU v5p": _ASYNC_GATHERS | _VMEM_24,
    "TPU v6e": _ASYNC_GATHERS | _SCATTERS | _VMEM_48,
    "H100": _GPU,
    "H200": _GPU,
}


def compiler_options(device: Any, own: Sequence[str] = ()) -> dict[str, Value]:
    """Returns the options for programs on `device`: those of its chip, changed by NAME=VALUE or left out by "NAME=".

    Raises UserError for an entry of another form.
    """
    chip = hardware.chip_of(device)
    options = dict(CHIP_OPTIONS.get(chip.name, {})) if chip else options_everywhere(device)
    for entry in own:
        name, equals, text = entry.partition("=")
        if not equals or not re.fullmatch(r"\w+", name):
            raise UserError(f"compiler_options has {entry!r}; give NAME=VALUE, or NAME= to leave one out")
        options.pop(name, None)
        if text:
            options[name] = _value(text)
    return options


def options_everywhere(device: Any) -> dict[str, Value]:
    """Returns the options for any program on `device`, not a run's step and evaluation alone: of CPUs, else none."""
    return dict(_known_on_cpus()) if getattr(device, "platform", "") == "cpu" else {}


def jit_everywhere(function: Callable[..., Any], device: Any = None, **more: Any) -> Any:
    """Returns `jax.jit(function, **more)` with the options for any program on `device`, by default the default one."""
    return jax.jit(function, compiler_options=options_everywhere(device or jax.devices()[0]) or None, **more)


@functools.cache
def _known_on_cpus() -> dict[str, Value]:
    """Returns the options of CPUs that this version of jaxlib takes; they are experimental, and may go again."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:  # in which no mesh is set
        return thread.submit(_tried_on_cpus).result()


def _tried_on_cpus() -> dict[str, Value]:
    known = {}
    for name, value in CHIP_OPTIONS["CPU"].items():
        sharding = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        argument = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(jnp.negative, compiler_options={name: value}).lower(argument).compile()
            known[name] = value
    return known


def _value(text: str) -> Value:
    words: dict[str, Value] = {"true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    return int(text) if re.fullmatch(r"-?\d+", text) else text


@contextlib.contextmanager
def options_explained() -> Iterator[None]:
    """Raises UserError in place of the compiler's error for an option that it does not know, or a bad value."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"(?:No such compile option:|setting option|into flag) '?(\w+)", str(error))
        if not found:
            raise
        name, reason = found[1], str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ").rstrip(": .")
        raise UserError(
            f"the compiler does not take the option {name} ({reason}); leave it out by "
            f"--config.compiler_options=\"('{name}=',)\""
        ) from error
