"""Matrices in int8 on their devices: as they lie on disk, or rounded while they are read."""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from varedit_jax.errors import UserError
from varedit_jax.quantized import Int8, rounded
from varedit_jax.weights import blocks, native


class _Rounded(NamedTuple):
    """An array on disk that is rounded while it is read; what `native.load_sharded` needs of a `native.Leaf`.

    A block is rounded with all that its output channels are made of, so values and scales do not depend on blocks.
    """

    leaf: native.Leaf
    summed: tuple[int, ...]  # axes that products sum over
    scale: np.ndarray  # float32, 1 along `summed`: filled as blocks are read

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape

    @property
    def dtype(self) -> np.dtype:
        return self.leaf.dtype

    def bytes_of(self, block: blocks.Block) -> int:
        return self.leaf.bytes_of(self._channels(block))

    def merged(self, first: int, last: int) -> None:
        return None

    def parts_of(self, block: blocks.Block) -> Iterator[blocks.Block]:
        """Layers of a stack one by one."""
        if 0 in self.summed:
            yield block
        else:
            yield from (((layer, layer + 1), *block[1:]) for layer in range(*block[0]))

    def read_block(self, block: blocks.Block, dtype: np.dtype) -> np.ndarray:
        wide = self._channels(block)
        values, scale = rounded(self.leaf.read_block(wide, np.dtype(np.float32)), self.summed, dtype, np)
        self.scale[blocks.slices(tuple((0, 1) if axis in self.summed else part for axis, part in enumerate(wide)))] = (
            scale
        )
        return cast(np.ndarray, values[blocks.slices(block, wide)])

    def _channels(self, block: blocks.Block) -> blocks.Block:
        return tuple((0, self.shape[axis]) if axis in self.summed else part for axis, part in enumerate(block))


def load(leaf: native.Leaf, like: Int8, summed: tuple[int, ...]) -> Int8:
    """A matrix in int8 on the devices of the shardings of `like`, as `native.load_sharded` puts arrays there.

    `summed` are the axes that products sum over. One that is not int8 on disk is rounded layer by layer: a host needs
    memory for its part of the values, and for one layer in float32. Raises UserError as `native.load_sharded`, and for
    scales on disk that are not per output channel.
    """
    stored = leaf.source
    if isinstance(stored, native.StoredInt8):
        if stored.scale.shape != tuple(like.scale.shape):
            raise UserError(
                f"{stored.scale.name} has shape {list(stored.scale.shape)}, but one scale per output channel is "
                f"{list(like.scale.shape)}; convert the weights again"
            )
        return Int8(native.load_sharded(stored.values, like.values), native.load_sharded(stored.scale, like.scale))
    view = _Rounded(leaf, summed, np.ones(like.scale.shape, np.float32))
    values = native.load_sharded(cast(Any, view), like.values)
    # A device needs the scales of the channels that it holds, which this host has just rounded.
    sharding = like.scale.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return Int8(values, jax.make_array_from_callback(like.scale.shape, sharding, lambda index: view.scale[index]))
