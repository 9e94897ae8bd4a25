"""Images for people: contact sheets of edits and small-multiple curves, drawn with Pillow alone.

`contact_sheet` shows what an editor did, a row an example: source, image after each scale, result, target.
`curve_sheet` shows how training went, a panel a metric. Both return an RGB `PIL.Image.Image` to save or to log.
The built-in font has Latin letters only: other writing comes out as boxes.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Point = tuple[float, float]

_PAGE: Color = (244, 245, 247)
_CARD: Color = (255, 255, 255)
_EDGE: Color = (222, 225, 230)
_GRID: Color = (234, 236, 240)
_INK: Color = (32, 36, 44)
_FAINT: Color = (112, 119, 131)
_RIGHT: Color = (22, 133, 74)
_WRONG: Color = (200, 46, 42)
# Told apart by color-blind readers too (Okabe and Ito).
_LINES: tuple[Color, ...] = ((0, 114, 178), (213, 94, 0), (0, 148, 108), (190, 95, 150), (205, 138, 0), (70, 160, 215))

_MARGIN = 24  # pixels around the page
_GAP = 10  # pixels between images
_PAD = 14  # pixels between a card's edge and what it holds
_TEXT_WIDTH = 216  # pixels of the text beside the images
_MIN_SIDE = 96  # pixels; the shorter side of an enlarged image is at least this
_SMOOTH = 4  # shapes are drawn this many times larger, then reduced, for smooth edges
_PLOT = (330, 190)  # pixels of the area between the axes, width and height
_PLOT_LEFT, _PLOT_RIGHT, _PLOT_ABOVE, _PLOT_BELOW = 62, 62, 54, 46  # room for labels around it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One example of a contact sheet."""

    images: Sequence[np.ndarray]  # uint8 [h, w, 3], one a column
    instruction: str
    kind: str = ""  # of edit, such as "recolor"
    verdict: bool | None = None  # was the edit right; None shows no mark
    note: str = ""  # beside or instead of the verdict, such as a score


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot of a curve sheet: lines over the same axes."""

    title: str
    lines: Mapping[str, Sequence[Point]]  # name -> (x, y) points in order of x; a non-finite y breaks the line
    x_label: str = "step"
    log_y: bool = False  # logarithmic y axis; then a y that is not positive breaks the line


def contact_sheet(
    rows: Sequence[Row], titles: Sequence[str], *, scale: int | None = None, heading: str = ""
) -> Image.Image:
    """Lays out examples as rows of images, each with its instruction and verdict.

    Args:
      rows: the examples; every image is uint8 [h, w, 3] of one size.
      titles: of the columns; as many as each row has images.
      scale: whole factor of nearest-neighbor enlargement; None takes the least that makes the shorter side 96 px.
      heading: text above everything.

    Returns:
      An RGB image; the pixels of the images appear in it unaltered, each `scale` x `scale` times.

    Raises:
      ValueError: no row, a row whose images do not match the titles, images of different sizes or not uint8
        [h, w, 3], or a scale below 1.
    """
    height, width = _common_size(rows, titles)
    if scale is None:
        scale = math.ceil(_MIN_SIDE / min(height, width))
    if scale < 1:
        raise ValueError(f"scale is {scale}; it must be a whole number of at least 1")
    height, width = height * scale, width * scale

    title_lines = [_wrap(title, _font(13), width) for title in titles]
    texts = [_RowText(row) for row in rows]
    left = _MARGIN + _PAD + _TEXT_WIDTH + _PAD
    top = _MARGIN + (38 if heading else 0)
    first_card = top + max(map(len, title_lines)) * _leading(13) + 8
    card_heights = [max(height, text.height) + 2 * _PAD for text in texts]
    page_width = max(left + len(titles) * (width + _GAP) - _GAP + _PAD + _MARGIN, _heading_width(heading))
    page_height = first_card + sum(card_heights) + _GAP * (len(rows) - 1) + _MARGIN

    page = Image.new("RGB", (page_width, page_height), _PAGE)
    draw = ImageDraw.Draw(page)
    if heading:
        draw.text((_MARGIN, _MARGIN - 6), heading, fill=_INK, font=_font(22))
    for column, lines in enumerate(title_lines):
        center = left + column * (width + _GAP) + width // 2
        for n, line in enumerate(reversed(lines)):
            draw.text((center, first_card - 8 - n * _leading(13)), line, fill=_FAINT, font=_font(13), anchor="md")

    card_top = first_card
    for row, text, card_height in zip(rows, texts, card_heights, strict=True):
        _draw_card(page, (_MARGIN, card_top, page_width - _MARGIN, card_top + card_height))
        text.draw(page, (_MARGIN + _PAD, card_top + (card_height - text.height) // 2))
        y = card_top + (card_height - height) // 2
        for column, image in enumerate(row.images):
            x = left + column * (width + _GAP)
            draw.rectangle((x - 1, y - 1, x + width, y + height), outline=_EDGE)
            page.paste(Image.fromarray(image.repeat(scale, axis=0).repeat(scale, axis=1)), (x, y))
        card_top += card_height + _GAP
    return page


def curve_sheet(panels: Sequence[Panel], *, heading: str = "", columns: int | None = None) -> Image.Image:
    """Plots metrics over steps, a panel each, with the last value written at the end of each line.

    Args:
      panels: what to plot, row by row.
      heading: text above everything.
      columns: panels a row; None takes up to three.

    Returns:
      An RGB image.

    Raises:
      ValueError: no panel, a line without a point or with an x that is not finite, more lines in a panel than
        colors, or columns below 1.
    """
    if not panels:
        raise ValueError("panels is empty; a curve sheet needs at least one")
    for panel in panels:
        if not panel.lines or not all(panel.lines.values()):
            raise ValueError(f"panel {panel.title!r} has no line or a line without a point: {dict(panel.lines)}")
        if not all(math.isfinite(x) for points in panel.lines.values() for x, _ in points):
            raise ValueError(f"panel {panel.title!r} has a point whose x is not finite")
        if len(panel.lines) > len(_LINES):
            raise ValueError(
                f"panel {panel.title!r} has {len(panel.lines)} lines; at most {len(_LINES)} can be told apart"
            )
    if columns is None:
        columns = min(3, len(panels))
    if columns < 1:
        raise ValueError(f"columns is {columns}; it must be at least 1")

    card_width = _PLOT_LEFT + _PLOT[0] + _PLOT_RIGHT
    card_height = _PLOT_ABOVE + _PLOT[1] + _PLOT_BELOW
    top = _MARGIN + (38 if heading else 0)
    size = (
        max(2 * _MARGIN + columns * (card_width + _GAP) - _GAP, _heading_width(heading)),
        top + math.ceil(len(panels) / columns) * (card_height + _GAP) - _GAP + _MARGIN,
    )
    page = Image.new("RGB", size, _PAGE)
    if heading:
        ImageDraw.Draw(page).text((_MARGIN, _MARGIN - 6), heading, fill=_INK, font=_font(22))
    for n, panel in enumerate(panels):
        x = _MARGIN + n % columns * (card_width + _GAP)
        y = top + n // columns * (card_height + _GAP)
        _draw_card(page, (x, y, x + card_width, y + card_height))
        _draw_panel(page, panel, (x, y))
    return page


def _common_size(rows: Sequence[Row], titles: Sequence[str]) -> tuple[int, int]:
    """Height and width of every image of the rows."""
    if not rows:
        raise ValueError("rows is empty; a contact sheet needs at least one")
    if not titles:
        raise ValueError("titles is empty; a contact sheet needs at least one column")
    size: tuple[int, ...] | None = None
    for n, row in enumerate(rows):
        if len(row.images) != len(titles):
            raise ValueError(f"row {n} has {len(row.images)} images for {len(titles)} titles: {list(titles)}")
        for title, image in zip(titles, row.images, strict=True):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ValueError(
                    f"image {title!r} of row {n} is {image.dtype} {list(image.shape)}; it must be uint8 [h, w, 3]"
                )
            size = size or image.shape[:2]
            if image.shape[:2] != size:
                raise ValueError(
                    f"image {title!r} of row {n} is {image.shape[0]} x {image.shape[1]} pixels and the first is "
                    f"{size[0]} x {size[1]}; resize them to one size"
                )
    assert size is not None
    return size[0], size[1]


class _RowText:
    """The text beside a row's images: kind, wrapped instruction, verdict."""

    def __init__(self, row: Row):
        self.row = row
        self.lines = _wrap(row.instruction, _font(15), _TEXT_WIDTH)
        self.notes = _wrap(row.note, _font(12), _TEXT_WIDTH)
        self.height = len(self.lines) * _leading(15) + len(self.notes) * _leading(12) + (4 if row.note else 0)
        self.height += _leading(12) + 2 if row.kind else 0
        self.height += 30 if row.verdict is not None else 0

    def draw(self, page: Image.Image, corner: tuple[int, int]) -> None:
        draw = ImageDraw.Draw(page)
        x, y = corner
        if self.row.kind:
            draw.text((x, y), self.row.kind, fill=_FAINT, font=_font(12))
            y += _leading(12) + 2
        for line in self.lines:
            draw.text((x, y), line, fill=_INK, font=_font(15))
            y += _leading(15)
        if self.row.verdict is not None:
            _draw_verdict(page, (x, y + 8), self.row.verdict)
            y += 30
        y += 4
        for line in self.notes:
            draw.text((x, y), line, fill=_FAINT, font=_font(12))
            y += _leading(12)


def _draw_verdict(page: Image.Image, corner: tuple[int, int], right: bool) -> None:
    """A disc with a tick or a cross in it, 18 px wide, and the word."""
    side = 18
    color = _RIGHT if right else _WRONG
    badge = Image.new("RGB", (side * _SMOOTH, side * _SMOOTH), _CARD)
    draw = ImageDraw.Draw(badge)
    draw.ellipse((0, 0, side * _SMOOTH - 1, side * _SMOOTH - 1), fill=color)
    strokes = ([(5, 9.5), (8, 12.5), (13.3, 6)],) if right else ([(6, 6), (12, 12)], [(12, 6), (6, 12)])
    for stroke in strokes:
        _draw_line(draw, [(x * _SMOOTH, y * _SMOOTH) for x, y in stroke], _CARD, width=9)
    page.paste(badge.resize((side, side), Image.Resampling.BOX), corner)
    middle = (corner[0] + side + 7, corner[1] + side // 2)
    ImageDraw.Draw(page).text(middle, "right" if right else "wrong", fill=color, font=_font(14), anchor="lm")


def _draw_panel(page: Image.Image, panel: Panel, corner: tuple[int, int]) -> None:
    """Title, legend, axes and lines of one panel whose card starts at the corner."""
    draw = ImageDraw.Draw(page)
    left, top = corner[0] + _PLOT_LEFT, corner[1] + _PLOT_ABOVE
    width, height = _PLOT
    room = _PLOT_LEFT + width + _PLOT_RIGHT - 2 * _PAD
    draw.text((corner[0] + _PAD, corner[1] + 10), _fit(panel.title, _font(16), room), fill=_INK, font=_font(16))
    if len(panel.lines) > 1:
        x: float = corner[0] + _PAD
        names = list(panel.lines)
        if sum(_font(12).getlength(name) + 33 for name in names) > room:
            names = [_fit(name, _font(12), room / len(names) - 33) for name in names]
        for name, color in zip(names, _LINES, strict=False):
            draw.rounded_rectangle((x, corner[1] + 40, x + 12, corner[1] + 43), radius=1, fill=color)
            draw.text((x + 17, corner[1] + 41), name, fill=_FAINT, font=_font(12), anchor="lm")
            x += 17 + _font(12).getlength(name) + 16

    pieces = {name: _finite_pieces(points, panel.log_y) for name, points in panel.lines.items()}
    drawn = [point for parts in pieces.values() for part in parts for point in part]
    if not drawn:
        draw.text((left + width // 2, top + height // 2), "no finite value", fill=_WRONG, font=_font(14), anchor="mm")
        return
    x_axis = _Axis([x for x, _ in drawn])
    y_axis = _Axis([y for _, y in drawn], log=panel.log_y)

    plot = Image.new("RGB", (width * _SMOOTH, height * _SMOOTH), _CARD)
    plot_draw = ImageDraw.Draw(plot)
    for tick, _ in y_axis.ticks:
        y = round((1 - y_axis.place(tick)) * (height - 1)) * _SMOOTH  # on whole pixels, so the line is crisp
        plot_draw.rectangle((0, y, width * _SMOOTH, y + _SMOOTH - 1), fill=_GRID)
    ends = []
    for (_, parts), color in zip(pieces.items(), _LINES, strict=False):
        for part in parts:
            spots = [(x_axis.place(x) * width * _SMOOTH, (1 - y_axis.place(y)) * height * _SMOOTH) for x, y in part]
            _draw_line(plot_draw, spots, color, width=2 * _SMOOTH)
        if parts:
            last = parts[-1][-1][1]
            ends.append((top + (1 - y_axis.place(last)) * height, _short(last), color))
    page.paste(plot.resize(_PLOT, Image.Resampling.BOX), (left, top))
    draw.line((left, top + height, left + width, top + height), fill=_FAINT)

    for tick, label in y_axis.ticks:
        y = round(top + (1 - y_axis.place(tick)) * (height - 1))
        draw.text((left - 7, y), label, fill=_FAINT, font=_font(12), anchor="rm")
    for tick, label in x_axis.ticks:
        x = round(left + x_axis.place(tick) * (width - 1))
        draw.line((x, top + height, x, top + height + 4), fill=_FAINT)
        draw.text((x, top + height + 7), label, fill=_FAINT, font=_font(12), anchor="ma")
    draw.text((left + width, top + height + 24), panel.x_label, fill=_FAINT, font=_font(12), anchor="ra")
    for (_, label, color), level in zip(ends, _spread(ends, distance=14, lowest=top + height), strict=True):
        draw.text((left + width + 6, level), label, fill=color, font=_font(12), anchor="lm")


class _Axis:
    """Maps values to 0 .. 1 and knows round values to mark, with their labels."""

    def __init__(self, values: Sequence[float], *, log: bool = False):
        self.log = log
        low, high = min(values), max(values)
        if log:
            low, high = math.log10(low), math.log10(high)
        if high == low:
            low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
        room = 0.04 * (high - low)
        self.low, self.high = low - room, high + room
        ticks: list[float] = []
        if log:
            marks = (1, 2, 5) if self.high - self.low < 2.5 else (1,)
            stride = math.ceil((self.high - self.low) / 7)
            powers = range(math.floor(self.low / stride) * stride, math.ceil(self.high) + 1, stride)
            ticks = self._inside([mark * 10.0**power for power in powers for mark in marks])
            low, high = 10.0**low, 10.0**high
        if len(ticks) < 2:
            step = _round_step((high - low) / 5)
            ticks = self._inside([n * step for n in range(math.floor(low / step) - 1, math.ceil(high / step) + 2)])
        digits = next((n for n in range(3, 15) if len({_short(tick, n) for tick in ticks}) == len(ticks)), 15)
        self.ticks = [(tick, _short(tick, digits)) for tick in ticks]

    def place(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return (value - self.low) / (self.high - self.low)

    def _inside(self, ticks: Sequence[float]) -> list[float]:
        return [tick for tick in ticks if (tick > 0 or not self.log) and 0 <= self.place(tick) <= 1]


def _round_step(step: float) -> float:
    """The least 1, 2 or 5 times a power of ten that is not below the step."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(mark * power for mark in (1, 2, 5, 10) if mark * power >= step * (1 - 1e-9))


def _finite_pieces(points: Sequence[Point], log: bool) -> list[list[Point]]:
    """Cuts a line where it cannot be drawn."""
    pieces: list[list[Point]] = [[]]
    for x, y in points:
        if math.isfinite(y) and (y > 0 or not log):
            pieces[-1].append((float(x), float(y)))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _draw_line(draw: ImageDraw.ImageDraw, spots: Sequence[Point], color: Color, *, width: int) -> None:
    """A line with round ends and joints; a dot where there is one spot only."""
    draw.line(spots, fill=color, width=width, joint="curve")
    radius = width / 2 if len(spots) > 1 else 1.5 * width
    for x, y in (spots[0], spots[-1]):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)


def _spread(labels: Sequence[tuple[float, str, Color]], *, distance: int, lowest: float) -> list[float]:
    """Heights at which labels do not lie on each other: each one near its own, none below the lowest."""
    order = sorted(range(len(labels)), key=lambda n: labels[n][0])
    heights = [label[0] for label in labels]
    for above, n in itertools.pairwise(order):
        heights[n] = max(heights[n], heights[above] + distance)
    for k, n in enumerate(reversed(order)):
        heights[n] = min(heights[n], lowest - k * distance)
    return heights


def _short(value: float, digits: int = 3) -> str:
    """A number in few letters: 0.25, 1.5k, 2M, 3e-05."""
    value = float(f"{value:.{digits}g}")
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e12:
            return f"{value / size:.{digits}g}{suffix}"
    return f"{value:.{digits}g}"


def _heading_width(heading: str) -> int:
    return math.ceil(_font(22).getlength(heading)) + 2 * _MARGIN


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _leading(size: int) -> int:
    """Pixels from one line of text to the next."""
    return round(size * 1.32)


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, cut to the width."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Breaks text into lines of at most the width: between words, or within a word that is wider."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _draw_card(page: Image.Image, box: tuple[int, int, int, int]) -> None:
    """A white box with smooth round corners."""
    width, height = box[2] - box[0], box[3] - box[1]
    mask = Image.new("L", (width * 2, height * 2), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, width * 2 - 1, height * 2 - 1), radius=16, fill=255)
    inner = Image.new("L", (width * 2, height * 2), 0)
    ImageDraw.Draw(inner).rounded_rectangle((2, 2, width * 2 - 3, height * 2 - 3), radius=14, fill=255)
    page.paste(_EDGE, box, mask.resize((width, height), Image.Resampling.BOX))
    page.paste(_CARD, box, inner.resize((width, height), Image.Resampling.BOX))
