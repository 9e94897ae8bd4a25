"""Pyramids: token grids of each scale, token offsets, and what each scale sees (model.md, sections 1 and 5)."""

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Iterator

from varedit_jax.config import PIXEL_BUDGETS, EditorConfig
from varedit_jax.errors import UserError

Grid = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """Token grids (rows, columns), coarse to fine, and the schedule whose last grid positions refer to."""

    grids: tuple[Grid, ...]
    full_grids: tuple[Grid, ...]  # the "1M" schedule of the same aspect; for an own pyramid see editor_pyramid

    def __post_init__(self) -> None:
        if not self.grids or any(len(grid) != 2 or min(grid) < 1 for grid in self.grids):
            raise ValueError(f"a pyramid needs grids of (rows, columns), each at least 1: {self.grids!r}")

    @property
    def scales(self) -> int:
        """K."""
        return len(self.grids)

    @property
    def last(self) -> Grid:
        """The finest grid, which is also the source's."""
        return self.grids[-1]

    @property
    def position_grid(self) -> Grid:
        """(U, V): the grid that RoPE positions are counted on."""
        return self.full_grids[-1]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(rows * columns for rows, columns in self.grids)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First target token of each scale, and the total number of target tokens as the last entry."""
        offsets = [0]
        for length in self.lengths:
            offsets.append(offsets[-1] + length)
        return tuple(offsets)

    @property
    def target_tokens(self) -> int:
        """Target tokens of all scales."""
        return self.offsets[-1]

    def source_grids(self, conditioning: str) -> tuple[Grid, ...]:
        """Grids of the source prefix: the finest alone, or all of them for `full` conditioning."""
        return self.grids if conditioning == "full" else self.grids[-1:]

    def source_tokens(self, conditioning: str) -> int:
        """S."""
        return sum(rows * columns for rows, columns in self.source_grids(conditioning))

    def slices(self) -> Iterator[slice]:
        """The target tokens of each scale."""
        for start, stop in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            yield slice(start, stop)

    def first(self, scales: int) -> "Pyramid":
        """The first scales alone. RoPE positions stay as they are."""
        if not 1 <= scales <= self.scales:
            raise ValueError(f"the pyramid {self.grids} has no first {scales} scales")
        return Pyramid(self.grids[:scales], (*self.grids[: scales - 1], self.position_grid))

    def cells(self, patchify: bool) -> "Pyramid":
        """The same pyramid in tokenizer cells: twice as fine along each side where tokens are patches."""
        if not patchify:
            return self
        return Pyramid(_doubled(self.grids), _doubled(self.full_grids))


def _doubled(grids: tuple[Grid, ...]) -> tuple[Grid, ...]:
    return tuple((2 * rows, 2 * columns) for rows, columns in grids)


@functools.cache
def _schedules() -> dict[str, dict[str, dict]]:
    text = importlib.resources.files("varedit_jax").joinpath("data/scale_schedules.json").read_text()
    return json.loads(text)


def aspect_templates() -> tuple[str, ...]:
    """Names of the 15 aspect templates; each is the ratio height / width as text."""
    return tuple(_schedules())


SQUARE = "1.0"  # the template of square images


def nearest_aspect(height: int, width: int, among: tuple[str, ...] = ()) -> str:
    """The template, among these or all, whose ratio height / width is nearest to that of an image."""
    return min(among or aspect_templates(), key=lambda name: abs(float(name) - height / width))


def aspects_to_use(aspect: str, trained: tuple[str, ...]) -> tuple[str, ...]:
    """The templates among which the nearest to an image is taken.

    Args:
      aspect: "square", "auto" for all 15, a template, or "" for those that a model was trained on.
      trained: these; if they are not recorded, all 15.

    Raises UserError for any other aspect.
    """
    if aspect in ("", "auto"):
        return (not aspect and trained) or aspect_templates()
    if aspect == "square":
        return (SQUARE,)
    if aspect not in aspect_templates():
        raise UserError(f"the aspect {aspect!r} is none; give square, auto, or one of {', '.join(aspect_templates())}")
    return (aspect,)


def published_pyramid(pixel_budget: str, aspect: str = SQUARE) -> Pyramid:
    """Published schedule of a pixel budget ("0.06M" = 256 px, ..., "1M" = 1024 px) and aspect template."""
    if pixel_budget not in PIXEL_BUDGETS:
        raise ValueError(f"unknown pixel budget {pixel_budget!r}; known are {', '.join(PIXEL_BUDGETS)}")
    if aspect not in _schedules():
        raise ValueError(f"unknown aspect {aspect!r}; known are {', '.join(aspect_templates())}")
    budgets = _schedules()[aspect]

    def grids(budget: str) -> tuple[Grid, ...]:
        return tuple((rows, columns) for rows, columns in budgets[budget]["grids"])

    return Pyramid(grids(pixel_budget), grids("1M"))


def editor_pyramid(config: EditorConfig, aspect: str = SQUARE) -> Pyramid:
    """The pyramid an editor works on; `aspect` chooses among the published ones."""
    if config.grids:
        rows, columns = config.grids[-1]
        finest = (rows * config.position_scale, columns * config.position_scale)
        return Pyramid(config.grids, (*config.grids[:-1], finest))
    return published_pyramid(config.pixel_budget, aspect)


def image_size(config: EditorConfig, pyramid: Pyramid) -> Grid:
    """Pixels (height, width) of the images of a pyramid."""
    rows, columns = pyramid.last
    return rows * config.token_stride, columns * config.token_stride
