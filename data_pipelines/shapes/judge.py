"""The exact judge: reads the scene from an edited image alone, and compares it with the target scene.

Reading compares every cell with all its possible renderings, takes the nearest whole reading, and then accepts it
only if every cell is clearly that rendering. The limits below scale with the contrast of the style; colors of one
style differ by at least 63 levels (mean over channels) times its contrast, and shapes by at least 32 pixels.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipelines.shapes.scene import (
    BACKGROUNDS,
    CELL,
    COLORS,
    POSITIONS,
    SHAPES,
    SIZE,
    STYLES,
    Background,
    Object,
    Scene,
    Style,
    cell_image,
)
from varedit_jax.errors import UserError

CONTRAST: dict[Style, float] = {"plain": 1.0, "night": 0.6, "fog": 0.6, "frame": 1.0}

# Largest mean absolute error of a cell: MEAN_BASE + MEAN_SLOPE * contrast levels. The base leaves room for noise,
# which does not shrink with the contrast; the sum stays below half the distance of two colors.
MEAN_BASE = 5.0
MEAN_SLOPE = 15.0
# A pixel is wrong if its error (mean over channels) exceeds WRONG_LEVELS * contrast: it is then as near to another
# color as to its own. Beside an edge it may be off by half the step of the edge, where that is more: a blurred edge.
WRONG_LEVELS = 32.0
# Two contents of a cell differ in at least 32 pixels. With at most half of that wrong, it is nearer to this one than to
# any other; with more, it is not clearly this rendering.
WRONG_PIXELS = 16
BATCH = 64  # images compared at a time

_OBJECTS: tuple[Object | None, ...] = (None, *(Object(shape, color) for shape in SHAPES for color in COLORS))
_LOOKS: tuple[tuple[Background, Style], ...] = tuple((b, s) for b in BACKGROUNDS for s in STYLES)
_VALUES = 3 * CELL * CELL  # numbers in the image of a cell


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome of an edit."""

    done: bool  # everything the instruction changes has the value of the target
    kept: bool  # everything else is as in the source

    @property
    def exact(self) -> bool:
        """True if the image shows the target scene."""
        return self.done and self.kept


class _Renderings(NamedTuple):
    """All images of a cell: 4 positions, 16 looks (background and style), 17 contents."""

    pixels: NDArray[np.float32]  # [4, 16, 17, 768]
    squares: NDArray[np.float32]  # [4, 16, 17], sum of squares of the pixels
    limits: NDArray[np.float32]  # [4, 16, 17, 256], error above which a pixel is wrong
    mean_limits: NDArray[np.float32]  # [16], largest mean absolute error of a cell


@functools.cache
def _renderings() -> _Renderings:
    images = np.array(
        [
            [[cell_image(*look, item, position) for item in _OBJECTS] for look in _LOOKS]
            for position in range(len(POSITIONS))
        ],
        np.float32,
    )
    # Largest step from a pixel to one of its eight neighbors.
    padded = np.pad(images, ((0, 0), (0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    steps = np.zeros(images.shape[:-1], np.float32)
    for dy in range(3):
        for dx in range(3):
            shifted = padded[..., dy : dy + CELL, dx : dx + CELL, :]
            np.maximum(steps, abs(shifted - images).mean(-1), out=steps)
    contrast = np.array([CONTRAST[style] for _, style in _LOOKS], np.float32)
    limits = np.maximum(WRONG_LEVELS * contrast[:, None, None, None], steps / 2)
    lead = images.shape[:3]
    pixels = images.reshape(*lead, _VALUES)
    return _Renderings(
        pixels=pixels,
        squares=np.square(pixels).sum(-1),
        limits=limits.reshape(*lead, CELL * CELL),
        mean_limits=MEAN_BASE + MEAN_SLOPE * contrast,
    )


def _read(images: NDArray[np.uint8]) -> list[Scene | None]:
    """Reads the scenes of at most `BATCH` images; None for unclear ones."""
    known = _renderings()
    count = len(images)
    cells = images.reshape(count, 2, CELL, 2, CELL, 3).transpose(1, 3, 0, 2, 4, 5).astype(np.float32)
    cells = cells.reshape(len(POSITIONS), count, _VALUES)
    # Squared distance of each cell to each of its renderings, up to the cell's own sum of squares.
    flat = known.pixels.reshape(len(POSITIONS), -1, _VALUES)
    distances = known.squares.reshape(len(POSITIONS), 1, -1) - 2 * (cells @ flat.transpose(0, 2, 1))
    distances = distances.reshape(len(POSITIONS), count, len(_LOOKS), len(_OBJECTS))
    contents = distances.argmin(-1)  # [4, B, 16]: best content of each cell under each look
    looks = distances.min(-1).sum(0).argmin(-1)  # [B]: one look for the whole image
    contents = np.take_along_axis(contents, looks[None, :, None], -1)[..., 0]  # [4, B]

    positions = np.arange(len(POSITIONS))[:, None]
    nearest = known.pixels[positions, looks, contents]
    errors = abs(cells - nearest).reshape(len(POSITIONS), count, CELL * CELL, 3).mean(-1)
    wrong = (errors > known.limits[positions, looks, contents]).sum(-1)
    clear = ((errors.mean(-1) <= known.mean_limits[looks]) & (wrong <= WRONG_PIXELS)).all(0)
    scenes: list[Scene | None] = []
    for i in range(count):
        background, style = _LOOKS[looks[i]]
        items = tuple(_OBJECTS[k] for k in contents[:, i])
        scenes.append(Scene(background=background, style=style, cells=items) if clear[i] else None)
    return scenes


def read_scenes(images: NDArray[np.uint8]) -> list[Scene | None]:
    """Returns the scene that each image of uint8 [B, 32, 32, 3] shows; None for an unclear image.

    Raises UserError for another shape or type.
    """
    if images.shape[1:] != (SIZE, SIZE, 3) or images.dtype != np.uint8:
        raise UserError(
            f"the judge reads images of uint8 [B, {SIZE}, {SIZE}, 3], not {images.dtype} {list(images.shape)}"
        )
    return [scene for start in range(0, len(images), BATCH) for scene in _read(images[start : start + BATCH])]


def read_scene(image: NDArray[np.uint8]) -> Scene | None:
    """Returns the scene that an image uint8 [32, 32, 3] shows; None if a cell is not clearly one of the renderings."""
    return read_scenes(image[None])[0]


def _verdict(reading: Scene | None, source: Scene, target: Scene) -> Verdict:
    if reading is None:
        return Verdict(done=False, kept=False)
    parts = [
        (scene.background, scene.style, *scene.cells)  # all parts of a scene
        for scene in (reading, source, target)
    ]
    done = kept = True
    for shown, before, after in zip(*parts, strict=True):
        if before == after:
            kept &= shown == before
        else:
            done &= shown == after
    return Verdict(done=done, kept=kept)


def judge_batch(images: NDArray[np.uint8], sources: Sequence[Scene], targets: Sequence[Scene]) -> list[Verdict]:
    """Judges images uint8 [B, 32, 32, 3] against the edits from `sources` to `targets`.

    An image that cannot be read is neither done nor kept.
    """
    readings = read_scenes(images)
    return [_verdict(*case) for case in zip(readings, sources, targets, strict=True)]
