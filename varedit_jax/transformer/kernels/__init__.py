"""Kernels of attention, and the choice among them; each gives the numbers of plain attention."""

from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from varedit_jax.parallel.constrain import chip, device

Kernel = Literal["plain", "blocked", "splash", "cudnn"]

_FAST: dict[str, Kernel] = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}  # by platform


def platform() -> str:
    """The platform that is compiled for.

    The kernel is chosen by it rather than by `jax.lax.platform_dependent`, which would trace and shard a branch for
    every platform.
    """
    platform: str = device().platform
    return platform


def cores() -> int:
    """Tensor cores of a device that is compiled for, which share a kernel; 1 where that is not known."""
    found = chip()
    return found.cores // found.devices if found else 1


def apart(x: jax.Array) -> jax.Array:
    """Keeps the matmul that makes or takes `x` from being fused with what is on the other side, on TPUs alone.

    libtpu (0.0.42) fuses layer norms and residual sums with the matmuls around them, forward and backward. The tiles of
    such a matmul are smaller, and what precedes it is computed anew for every column of tiles: by the compiler's own
    estimate (v5p, the feed-forward part of 8B at 512 px) it takes 13 % longer than apart.
    """
    return jax.lax.optimization_barrier(x) if platform() == "tpu" else x


def matmuls_order_heads() -> bool:
    """Returns True where matmuls are to take and give [B, H, L, D] themselves, as anywhere but on CPUs.

    XLA for CPUs computes such a matmul as [H D, B L] and turns that afterwards, forward and backward: a copy with
    strides. From [B L, H D] whole rows of a head are moved.
    """
    return platform() != "cpu"


def _obstacle(kernel: Kernel, head_size: int, dtype: DTypeLike) -> str:
    """The reason that `kernel` cannot work on such heads; empty if it can."""
    if kernel == "splash" and head_size % 128 and platform() == "tpu":
        return f"needs heads of a multiple of 128 channels, not {head_size}"
    if kernel == "cudnn" and (head_size % 8 or head_size > 128):
        return f"needs heads of a multiple of 8 channels, at most 128, not {head_size}"
    if kernel == "cudnn" and jnp.dtype(dtype).itemsize != 2:
        return f"needs a compute type of 16 bits, as bfloat16, not {jnp.dtype(dtype).name}"
    return ""


def choose(attention: str, head_size: int, dtype: DTypeLike) -> Kernel:
    """The kernel of `TransformerConfig.attention`; "auto" is the platform's fast one where it can work, else plain.

    Raises ValueError if a kernel that was asked for by name cannot work.
    """
    if attention == "auto":
        kernel = _FAST.get(platform(), "plain")
        return "plain" if _obstacle(kernel, head_size, dtype) else kernel
    kernel = cast(Kernel, attention)
    if obstacle := _obstacle(kernel, head_size, dtype):
        raise ValueError(f"attention is {attention!r}, which {obstacle}; choose attention='auto' or 'plain'")
    return kernel
