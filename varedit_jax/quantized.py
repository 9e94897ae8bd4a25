"""Arrays rounded to eight bits, and kernels that are kept so: int8 values, and one scale per output channel.

Rounding is symmetric: a scale is the largest magnitude along the axes that a product sums over, divided by 127, so a
value is off by at most half a scale. What is summed has the values alone, and their scale multiplies the sum.
"""

from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


@flax.struct.dataclass
class Int8:
    """A kernel in int8: a tree of two arrays, which takes the place of one array among parameters.

    The axes that a product sums over come first. Of a stack, both arrays have a leading axis of layers, and `nn.scan`
    takes a slice of each.
    """

    values: Any  # jax.Array, or another kind: int8, of the kernel's shape
    scale: Any  # float32, 1 along the axes that are summed over

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the kernel."""
        return tuple(self.values.shape)

    @property
    def ndim(self) -> int:
        """That of the kernel."""
        return len(self.values.shape)

    def __len__(self) -> int:
        """The size of the first axis."""
        return int(self.values.shape[0])

    def __getitem__(self, index: Any) -> Self:
        """Some output channels, with an index that leaves the axes that are summed over whole."""
        return self.replace(values=self.values[index], scale=self.scale[index])  # type: ignore[attr-defined]

    def reshape(self, rows: int, *channels: int) -> Self:
        """[rows, ...] as [rows, *channels]; `rows` are summed over."""
        values = self.values.reshape(rows, *channels)
        return self.replace(values=values, scale=self.scale.reshape(1, *values.shape[1:]))  # type: ignore[attr-defined]


def rounded(x: Any, axis: int | tuple[int, ...], dtype: DTypeLike, numpy: Any = jnp) -> tuple[Any, Any]:
    """Returns x / scale in an eight-bit type, and the scale: float32, 1 along `axis`, over which x is largest.

    `numpy` is the module that computes it: jax.numpy, or numpy on the host, where quotients are those of IEEE 754.
    """
    integer = jnp.issubdtype(dtype, jnp.integer)
    largest = float(jnp.iinfo(dtype).max if integer else jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    most = numpy.max(numpy.abs(x), axis=axis, keepdims=True)
    scale = numpy.where(most > 0, most / largest, numpy.float32(1))
    x = numpy.clip(x / scale, -largest, largest)  # the quotient may round up
    return (numpy.round(x) if integer else x).astype(dtype), scale


def quantize(kernel: Any, summed: tuple[int, ...]) -> Int8:
    """A kernel of any float type in int8, rounded on the host; `summed` are the axes that products sum over.

    If they do not begin with the first axis, this one is of layers, which are read and rounded one by one.
    """
    if 0 in summed:
        return Int8(*rounded(np.asarray(kernel), summed, np.int8, np))
    scale_shape = [1 if axis in summed else size for axis, size in enumerate(kernel.shape)]
    values, scale = np.empty(kernel.shape, np.int8), np.empty(scale_shape, np.float32)
    inner = tuple(axis - 1 for axis in summed)
    for layer in range(len(kernel)):
        values[layer], scale[layer] = rounded(np.asarray(kernel[layer]), inner, np.int8, np)
    return Int8(values, scale)


def dequantized(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The values that int8 stands for, float32."""
    return values.astype(np.float32) * scale


def dot(x: jax.Array, kernel: Int8, axes: int = 1) -> jax.Array:
    """The product over the last `axes` of x and the first of the kernel, in the type of x.

    The values are converted to the type of x, which holds them exactly. Sums and their scaling are float32.
    """
    summed = tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))
    values = kernel.values.astype(x.dtype)
    sums = jax.lax.dot_general(x, values, (summed, ((), ())), preferred_element_type=jnp.float32)
    scale = kernel.scale.reshape((1,) * (x.ndim - axes) + kernel.shape[axes:])
    return (sums * scale).astype(x.dtype)
