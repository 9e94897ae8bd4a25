import dataclasses
import re

import numpy as np
import pytest
from PIL import Image

from varedit_jax.contact_sheet import SheetRow, contact_sheet

TITLES = ("source", "scale 1", "result", "target")
GREEN, RED = (22, 133, 74), (200, 46, 42)


def random_row(seed: int, *, height: int = 12, width: int = 16, **fields) -> SheetRow:
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in TITLES]
    return SheetRow(images=images, instruction="make the red circle green", **fields)


def corners_of(block: np.ndarray, sheet: Image.Image) -> list[tuple[int, int]]:
    """Returns the upper left corners (x, y) where the sheet shows exactly this block."""
    pixels = np.asarray(sheet)
    height, width = block.shape[:2]
    candidates = np.argwhere(np.all(pixels[: 1 - height, : 1 - width] == block[0, 0], axis=-1))
    return [(x, y) for y, x in candidates.tolist() if np.array_equal(pixels[y : y + height, x : x + width], block)]


def pixels_of(color: tuple[int, int, int], sheet: Image.Image) -> np.ndarray:
    """Returns (x, y) of every pixel of exactly this color."""
    return np.argwhere(np.all(np.asarray(sheet) == np.array(color, np.uint8), axis=-1))[:, ::-1]


def test_images_appear_unaltered_in_columns_and_rows():
    rows = [random_row(seed) for seed in range(3)]
    sheet = contact_sheet(rows, TITLES, scale=3)
    assert sheet.mode == "RGB"
    places = []
    for row in rows:
        found = [corners_of(image.repeat(3, axis=0).repeat(3, axis=1), sheet) for image in row.images]
        assert [len(corners) for corners in found] == [1] * len(TITLES)
        places.append([corners[0] for corners in found])
    places = np.array(places)
    assert (places[:, :, 0] == places[:1, :, 0]).all()  # a column has one x
    assert (places[:, :, 1] == places[:, :1, 1]).all()  # a row has one y
    assert (np.diff(places[0, :, 0]) > 3 * 16).all()
    assert (np.diff(places[:, 0, 1]) > 3 * 12).all()


def test_small_images_are_enlarged_to_96_pixels_by_default():
    sheet = contact_sheet([random_row(0, height=20, width=40)], TITLES)
    image = random_row(0, height=20, width=40).images[1]
    assert len(corners_of(image.repeat(5, axis=0).repeat(5, axis=1), sheet)) == 1


def test_a_large_image_keeps_its_size():
    row = random_row(0, height=100, width=120)
    sheet = contact_sheet([row], TITLES)
    assert len(corners_of(row.images[3], sheet)) == 1


def test_sheet_grows_with_rows_columns_and_text():
    row = random_row(0)
    one = contact_sheet([row], TITLES)
    assert contact_sheet([row, row], TITLES).height > one.height + 96
    assert contact_sheet([dataclasses.replace(row, images=row.images[:2])], TITLES[:2]).width < one.width - 2 * 96
    wordy = dataclasses.replace(row, instruction="make the red circle green " * 20)
    assert contact_sheet([wordy], TITLES).height > one.height + 96
    assert contact_sheet([row], TITLES, heading="what it is").height > one.height
    assert contact_sheet([row], TITLES, heading="W" * 200).width > one.width


def test_instruction_is_wrapped_left_of_the_images():
    magenta = np.full((40, 40, 3), (255, 0, 255), np.uint8)
    sheet = contact_sheet([SheetRow(images=[magenta], instruction="unbroken" * 20)], ["source"])
    left = pixels_of((255, 0, 255), sheet)[:, 0].min()
    ink = pixels_of((32, 36, 44), sheet)
    assert len(ink) > 50
    assert ink[:, 0].max() < left
    assert np.ptp(ink[:, 1]) > 3 * 15


@pytest.mark.parametrize(("verdict", "shown", "absent"), [(True, GREEN, RED), (False, RED, GREEN)])
def test_verdict_is_a_colored_mark(verdict, shown, absent):
    gray = np.full((8, 8, 3), 128, np.uint8)
    sheet = contact_sheet([SheetRow(images=[gray], instruction="remove it", verdict=verdict)], ["source"])
    assert len(pixels_of(shown, sheet)) > 100  # most of a disc 18 pixels wide
    assert len(pixels_of(absent, sheet)) == 0


def test_without_a_verdict_there_is_no_mark():
    sheet = contact_sheet([SheetRow(images=[np.full((8, 8, 3), 128, np.uint8)], instruction="remove it")], ["source"])
    assert len(pixels_of(GREEN, sheet)) == len(pixels_of(RED, sheet)) == 0


@pytest.mark.parametrize(
    ("rows", "titles", "message"),
    [
        ([], TITLES, "rows is empty"),
        ([SheetRow(images=[], instruction="")], [], "titles is empty"),
        ([random_row(0)], TITLES[:3], "row 0 has 4 images for 3 titles: ['source', 'scale 1', 'result']"),
        ([random_row(0), random_row(1, height=9)], TITLES, "image 'source' of row 1 is 9 x 16 pixels and the first"),
        (
            [SheetRow(images=[np.zeros((4, 4, 3), np.float32)], instruction="")],
            ["source"],
            "image 'source' of row 0 is float32 [4, 4, 3]; it must be uint8 [h, w, 3]",
        ),
        ([SheetRow(images=[np.zeros((4, 4), np.uint8)], instruction="")], ["a"], "image 'a' of row 0 is uint8 [4, 4];"),
        ([SheetRow(images=[np.zeros((0, 4, 3), np.uint8)], instruction="")], ["a"], "is uint8 [0, 4, 3];"),
    ],
)
def test_bad_rows_are_named(rows, titles, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        contact_sheet(rows, titles)


def test_bad_scale_is_named():
    with pytest.raises(ValueError, match="scale is 0"):
        contact_sheet([random_row(0)], TITLES, scale=0)
