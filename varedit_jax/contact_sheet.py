"""Contact sheets of edits, one row per example: source, image after each scale, result, target.

The built-in font has Latin letters only: other scripts come out as boxes.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Point = tuple[float, float]

_PAGE: Color = (244, 245, 247)
_CARD: Color = (255, 255, 255)
_EDGE: Color = (222, 225, 230)
_INK: Color = (32, 36, 44)
_FAINT: Color = (112, 119, 131)
_RIGHT: Color = (22, 133, 74)
_WRONG: Color = (200, 46, 42)

_MARGIN = 24  # pixels around the page
_GAP = 10  # pixels between images
_PAD = 14  # pixels between a card's edge and its contents
_TEXT_WIDTH = 216  # pixels of the text beside the images
_MIN_SIDE = 96  # pixels; the shorter side of an enlarged image is at least this
_SMOOTH = 4  # shapes are drawn this many times larger, then reduced, for smooth edges


@dataclasses.dataclass(frozen=True, kw_only=True)
class SheetRow:
    """One example of a contact sheet."""

    images: Sequence[np.ndarray]  # uint8 [h, w, 3], one per column
    instruction: str
    kind: str = ""  # of edit, such as "recolor"
    verdict: bool | None = None  # True if the edit is right; None shows no mark
    note: str = ""  # beside or instead of the verdict, such as a score


def contact_sheet(
    rows: Sequence[SheetRow], titles: Sequence[str], *, scale: int | None = None, heading: str = ""
) -> Image.Image:
    """Lays out examples as rows of images, each with its instruction and verdict.

    Args:
      rows: the examples; every image is uint8 [h, w, 3] of one size.
      titles: of the columns; as many as each row has images.
      scale: integer factor of nearest-neighbor enlargement; None takes the smallest for a shorter side of 96 px.
      heading: text above everything.

    Returns:
      An RGB image that shows each pixel of the images unaltered, `scale` x `scale` times.

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
    heading_width = math.ceil(_font(22).getlength(heading)) + 2 * _MARGIN
    page_width = max(left + len(titles) * (width + _GAP) - _GAP + _PAD + _MARGIN, heading_width)
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


def _common_size(rows: Sequence[SheetRow], titles: Sequence[str]) -> tuple[int, int]:
    """Returns height and width of every image of the rows."""
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

    def __init__(self, row: SheetRow):
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
    """Draws a disc with a tick or a cross in it, 18 px wide, and the word."""
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


def _draw_line(draw: ImageDraw.ImageDraw, spots: Sequence[Point], color: Color, *, width: int) -> None:
    """Draws a line with round ends and joints; a dot for a single spot."""
    draw.line(spots, fill=color, width=width, joint="curve")
    radius = width / 2 if len(spots) > 1 else 1.5 * width
    for x, y in (spots[0], spots[-1]):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _leading(size: int) -> int:
    """Returns the pixels from one line of text to the next."""
    return round(size * 1.32)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Returns text in lines of at most `width` pixels, broken between words, or within a word that is wider."""
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
    """Draws a white box with smooth round corners."""
    width, height = box[2] - box[0], box[3] - box[1]
    card = Image.new("RGB", (width * 2, height * 2), _PAGE)
    corners = (0, 0, width * 2 - 1, height * 2 - 1)
    ImageDraw.Draw(card).rounded_rectangle(corners, radius=16, fill=_CARD, outline=_EDGE, width=2)
    page.paste(card.resize((width, height), Image.Resampling.BOX), box)
