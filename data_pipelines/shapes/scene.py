"""Scenes of up to four colored shapes on a colored background, and their 32 x 32 images.

An image is a 2 x 2 arrangement of square cells. A cell is empty or shows one centered object. A style changes the
whole image. Rendering is exact and has no antialiasing, so an image can be read back (`judge.py`).
"""

import dataclasses
import functools
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from varedit_jax.errors import UserError

Shape = Literal["circle", "square", "triangle", "cross"]
Color = Literal["red", "green", "blue", "yellow"]
Background = Literal["grey", "pink", "mint", "sky"]
Style = Literal["plain", "night", "fog", "frame"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLORS: tuple[Color, ...] = get_args(Color)
BACKGROUNDS: tuple[Background, ...] = get_args(Background)
STYLES: tuple[Style, ...] = get_args(Style)
POSITIONS = ("top left", "top right", "bottom left", "bottom right")  # cells 0 to 3, in this order

SIZE = 32  # pixels along a side of the image
CELL = 16  # pixels along a side of a cell
FRAME = 2  # pixels of border in style `frame`
FRAME_RGB = (255, 255, 255)

COLOR_RGB: dict[Color, tuple[int, int, int]] = {
    "red": (235, 0, 70),
    "green": (50, 195, 45),
    "blue": (15, 35, 250),
    "yellow": (220, 245, 20),
}
BACKGROUND_RGB: dict[Background, tuple[int, int, int]] = {
    "grey": (140, 120, 105),
    "pink": (240, 115, 195),
    "mint": (140, 255, 170),
    "sky": (85, 170, 255),
}


def _masks() -> NDArray[np.bool_]:
    """Returns masks [4, 16, 16] of the shapes, in the order of `SHAPES`; each is 12 pixels wide and high."""
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2  # from the center of the cell: -7.5, -6.5, ..., 7.5
    circle = y**2 + x**2 <= 34
    square = (abs(y) < 6) & (abs(x) < 6)
    triangle = (abs(y) < 6) & (abs(x) <= (y + 6.5) / 2)
    cross = (abs(y) < 6) & (abs(x) < 6) & ((abs(y) < 2) | (abs(x) < 2))
    return np.stack([circle, square, triangle, cross])


MASKS = _masks()


@dataclasses.dataclass(frozen=True)
class Object:
    """One colored shape."""

    shape: Shape
    color: Color

    def __str__(self) -> str:
        return f"{self.color} {self.shape}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """The content of an image: up to four objects on a background, in a style.

    Raises UserError for an unknown shape, color, background or style, and for a wrong number of cells.
    """

    background: Background
    cells: tuple[Object | None, ...]  # four, in the order of POSITIONS; None is empty
    style: Style = "plain"

    def __post_init__(self) -> None:
        _check("background", self.background, BACKGROUNDS)
        _check("style", self.style, STYLES)
        if len(self.cells) != len(POSITIONS):
            raise UserError(f"a scene has {len(POSITIONS)} cells, not {len(self.cells)}")
        for item in self.objects:
            _check("shape", item.shape, SHAPES)
            _check("color", item.color, COLORS)

    @property
    def objects(self) -> tuple[Object, ...]:
        """The objects, in the order of their cells."""
        return tuple(item for item in self.cells if item is not None)

    def encode(self) -> str:
        """Returns the scene as text: `grey|plain|red circle,-,blue cross,-`."""
        return f"{self.background}|{self.style}|{','.join(str(item or '-') for item in self.cells)}"

    @classmethod
    def decode(cls, text: str) -> "Scene":
        """Returns the scene of a text from `encode`. Raises UserError for text that is not a scene."""
        try:
            background, style, cells = text.split("|")
            words = [cell.split(" ") for cell in cells.split(",")]
            objects = tuple(None if word == ["-"] else _object(*word) for word in words)
        except (ValueError, TypeError):
            raise UserError(f"{text!r} is not a scene; one looks like 'grey|plain|red circle,-,blue cross,-'") from None
        return cls(background=cast(Background, background), style=cast(Style, style), cells=objects)


def _object(color: str, shape: str) -> Object:
    return Object(cast(Shape, shape), cast(Color, color))  # a scene checks its objects


def _check(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"unknown {what} {value!r}; known are {', '.join(known)}")


def style_color(rgb: tuple[int, int, int], style: Style) -> NDArray[np.uint8]:
    """Returns the color [3] of `rgb` in an image of this style."""
    color = np.array(rgb, np.uint8)
    if style == "night":
        return np.round(color * 0.6).astype(np.uint8)
    if style == "fog":
        return np.round(color * 0.6 + 102).astype(np.uint8)
    return color


@functools.cache
def cell_image(background: Background, style: Style, item: Object | None, position: int) -> NDArray[np.uint8]:
    """Returns a read-only image [16, 16, 3] of one cell; `position` matters only for the frame."""
    pixels_yx3 = np.tile(style_color(BACKGROUND_RGB[background], style), (CELL, CELL, 1))
    if item is not None:
        pixels_yx3[MASKS[SHAPES.index(item.shape)]] = style_color(COLOR_RGB[item.color], style)
    if style == "frame":
        rows = slice(None, FRAME) if position < 2 else slice(-FRAME, None)
        columns = slice(None, FRAME) if position % 2 == 0 else slice(-FRAME, None)
        pixels_yx3[rows] = FRAME_RGB
        pixels_yx3[:, columns] = FRAME_RGB
    pixels_yx3.flags.writeable = False
    return pixels_yx3


def render(scene: Scene) -> NDArray[np.uint8]:
    """Returns the image of a scene, uint8 [32, 32, 3]."""
    image = np.empty((SIZE, SIZE, 3), np.uint8)
    for position, item in enumerate(scene.cells):
        y, x = CELL * (position // 2), CELL * (position % 2)
        image[y : y + CELL, x : x + CELL] = cell_image(scene.background, scene.style, item, position)
    return image


def random_scene(rng: np.random.Generator, style: Style | None = None) -> Scene:
    """Returns a uniformly random scene of 1 to 4 distinct objects in random cells; `style` is random unless given."""
    count = int(rng.integers(1, len(POSITIONS) + 1))
    positions = rng.choice(len(POSITIONS), count, replace=False)
    kinds = rng.choice(len(SHAPES) * len(COLORS), count, replace=False)
    cells: list[Object | None] = [None] * len(POSITIONS)
    for position, kind in zip(positions, kinds, strict=True):
        cells[position] = Object(SHAPES[kind // len(COLORS)], COLORS[kind % len(COLORS)])
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    return Scene(background=background, cells=tuple(cells), style=style or STYLES[rng.integers(len(STYLES))])
