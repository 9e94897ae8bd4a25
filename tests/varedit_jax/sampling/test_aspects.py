"""Which aspect an editor shows an image at, and how it comes back."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from varedit_jax.config import EditingConfig, preset
from varedit_jax.errors import UserError
from varedit_jax.placement import fit, restore, restore_released
from varedit_jax.sampling.editor import Editor
from varedit_jax.scales import aspect_templates, aspects_to_use

CONFIG = dataclasses.replace(preset("tiny"), grids=(), pixel_budget="0.06M")  # 16 x 16 tokens of 4 px if it is square
WIDE, TALL = (30, 90), (90, 50)


def editor_of(monkeypatch: pytest.MonkeyPatch, *aspects: str) -> tuple[Editor, list[tuple[int, int]]]:
    """An editor that inverts what it is shown, and the sizes of that."""
    sizes: list[tuple[int, int]] = []

    def inverted(self: Editor, images: np.ndarray, *_: Any, **__: Any) -> np.ndarray:
        sizes.append(images.shape[1:3])
        return 255 - images[None]

    monkeypatch.setattr(Editor, "edit_fitted", inverted)
    return Editor(CONFIG, {}, editing=EditingConfig(aspects=aspects)), sizes


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("trained, asked, size", [
    ((), "", (36, 108)),  # not recorded: the nearest of all
    (("1.0",), "", (64, 64)),
    (("1.0", "2.0"), "", (64, 64)),
    (("1.0", "0.5"), "", (44, 88)),
    (("1.0",), "auto", (36, 108)),
    ((), "square", (64, 64)),
    (("0.5",), "square", (64, 64)),
    (("1.0",), "2.0", (88, 44)),
])  # fmt: skip
def test_the_aspect_is_that_of_training_or_the_one_asked_for(monkeypatch, trained, asked, size):
    editor, sizes = editor_of(monkeypatch, *trained)
    [edited] = editor.edit([photo(*WIDE)], ["invert it"], aspect=asked)
    assert (sizes, edited.shape) == ([size], (*WIDE, 3))


@pytest.mark.parametrize("shape", [WIDE, TALL, (64, 64)])
def test_squares_come_back_as_from_the_release(monkeypatch, shape):
    editor, _ = editor_of(monkeypatch, "1.0")
    image = photo(*shape)
    fitted, placement = fit(image, (64, 64))
    [edited] = editor.edit([image], ["invert it"])
    np.testing.assert_array_equal(edited, restore_released(255 - fitted, placement))
    assert shape == (64, 64) or (edited != restore(255 - fitted, placement)).any()


def test_other_aspects_come_back_without_their_padding(monkeypatch):
    editor, _ = editor_of(monkeypatch)
    image = photo(*TALL)
    fitted, placement = fit(image, (84, 48))
    [edited] = editor.edit([image], ["invert it"])
    np.testing.assert_array_equal(edited, restore(255 - fitted, placement))


def test_an_aspect_that_there_is_not(monkeypatch):
    editor, sizes = editor_of(monkeypatch, "1.0")
    with pytest.raises(UserError, match="the aspect 'wide' is none; give square, auto, or one of 1.0, 1.25, "):
        editor.edit([photo(*WIDE)], ["invert it"], aspect="wide")
    assert sizes == []
    assert aspects_to_use("auto", ("1.0",)) == aspects_to_use("", ()) == aspect_templates()
