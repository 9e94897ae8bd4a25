"""Perceptual hashes of images: they detect near-duplicates, and edits that changed nothing.

All arithmetic is on integers, of an image reduced to 32 x 32 cells, so that every machine gets the same bits.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_CELLS = 32  # per side
_WAVES = 8  # lowest frequencies per direction
_LUMA = np.array([299, 587, 114])  # of RGB, in thousandths
COLORS = 12  # numbers: RGB of four quarters
COLOR_TOLERANCE = 12  # greatest difference of near-duplicates, in levels of 255

_n = np.arange(_CELLS)
_COSINES = np.rint(1024 * np.cos(np.pi / _CELLS * (_n + 0.5) * np.arange(_WAVES)[:, None])).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Look:
    """An image reduced to 3 KB."""

    cells: NDArray[np.uint8]  # [32, 32, 3], means of the image's pixels

    @classmethod
    def of(cls, image_HW3: NDArray[np.uint8]) -> "Look":
        """Reduces an image, uint8 [H, W, 3]."""
        small = Image.fromarray(image_HW3).resize((_CELLS, _CELLS), Image.Resampling.BOX)
        return cls(np.asarray(small))

    @property
    def shape(self) -> int:
        """64 bits that hardly change when an image is compressed, resized or brightened.

        Bits tell which of the lowest 8 x 8 cosine coefficients of the luma are above their median.
        """
        waves = _COSINES @ (self.cells @ _LUMA) @ _COSINES.T
        flat = waves.reshape(-1)
        middle = (flat.size - 1) // 2
        bits = flat > np.partition(flat[1:], middle)[middle]  # the median without the constant term
        return int.from_bytes(np.packbits(bits).tobytes(), "big")

    @property
    def colors(self) -> NDArray[np.uint8]:
        """Mean RGB of the four quarters, uint8 [12]."""
        half = _CELLS // 2
        sums = self.cells.reshape(2, half, 2, half, 3).astype(np.int64).sum(axis=(1, 3))
        return (sums // half**2).astype(np.uint8).reshape(COLORS)


def change(source: Look, target: Look) -> float:
    """Returns the change of the cell that changed most, in levels of 255; compression alone gives small values.

    A mean over the whole image would not distinguish the removal of a small object from noise.
    """
    difference = np.abs(source.cells.astype(np.int64) - target.cells)
    return float(difference.sum(axis=2).max() / 3)


def alike(
    shapes_a: NDArray[np.uint64],
    shapes_b: NDArray[np.uint64],
    colors_a: NDArray[np.uint8],
    colors_b: NDArray[np.uint8],
    bits: int,
) -> NDArray[np.bool_]:
    """Returns True where images are near-duplicates: shapes differ in at most `bits` bits, colors hardly at all.

    Shapes broadcast to [...], colors to [..., 12].
    """
    near = np.bitwise_count(shapes_a ^ shapes_b) <= bits
    apart = np.abs(colors_a.astype(np.int16) - colors_b).max(axis=-1)
    return near & (apart <= COLOR_TOLERANCE)
