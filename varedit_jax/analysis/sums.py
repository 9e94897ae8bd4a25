"""Rounding of gradients that devices sum hop by hop: a model in NumPy of reduce-scatters, each hop in its own type.

A partial sum is rounded each time it is sent on; what a device adds to it is rounded once, as its matmul writes it.
"""

from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

Array = np.ndarray
Round = Callable[[Array], Array]


def bfloat16(x: Array) -> Array:
    """Returns float32 values rounded to bfloat16, as float32."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def float32(x: Array) -> Array:
    """Returns the values in float32."""
    return x.astype(np.float32)


def ring(parts: Array, sent: Round) -> Array:
    """The sum of parts [..., devices, values] as a single ring makes it: [..., values].

    Every value's sum begins at one device and passes all others in turn, devices - 1 hops; piece p of the values
    begins at device p + 1, so that each device ends with its own piece.
    """
    devices, count = parts.shape[-2:]
    begin = np.arange(count) * devices // count + 1
    total = np.take_along_axis(parts, np.broadcast_to(begin % devices, (*parts.shape[:-2], 1, count)), -2)[..., 0, :]
    for hop in range(1, devices):
        index = np.broadcast_to((begin + hop) % devices, (*parts.shape[:-2], 1, count))
        total = sent(total) + np.take_along_axis(parts, index, -2)[..., 0, :]
    return sent(total)


def torus(parts: Array, sides: Sequence[int], sent: Round) -> Array:
    """The sum of parts [devices, values] by rings along one side of a torus after the other: [values]."""
    grid = parts.reshape(*sides, -1)
    for _ in sides:
        grid = ring(grid, sent)
    return grid


def tree(parts: Array, sent: Round) -> Array:
    """The sum of parts [devices, values], a power of two of them, by pairs of partial sums: [values]."""
    while len(parts) > 1:
        parts = sent(parts[0::2]) + sent(parts[1::2])
    return sent(parts[0])


def relative_error(found: Array, exact: Array) -> float:
    """Returns the norm of the difference over the norm of `exact`."""
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
