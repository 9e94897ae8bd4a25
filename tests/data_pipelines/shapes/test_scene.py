"""Scenes, their text and their images."""

import itertools

import numpy as np
import pytest

from data_pipelines.shapes import scene as scene_lib
from data_pipelines.shapes.scene import BACKGROUNDS, COLORS, SHAPES, STYLES, Object, Scene, random_scene, render
from varedit_jax.errors import UserError

CONTENTS = (None, *(Object(shape, color) for shape in SHAPES for color in COLORS))
CONTRAST = {"plain": 1.0, "night": 0.6, "fog": 0.6, "frame": 1.0}


def test_text_form_round_trips() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = random_scene(rng)
        assert Scene.decode(scene.encode()) == scene
    assert Scene.decode("grey|night|red circle,-,-,blue cross").cells == (
        Object("circle", "red"),
        None,
        None,
        Object("cross", "blue"),
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("grey|plain", "is not a scene"),
        ("grey|plain|red,-,-,-", "is not a scene"),
        ("grey|plain|red circle,-,-", "4 cells, not 3"),
        ("white|plain|red circle,-,-,-", "unknown background 'white'"),
        ("grey|rain|red circle,-,-,-", "unknown style 'rain'"),
        ("grey|plain|red star,-,-,-", "unknown shape 'star'"),
        ("grey|plain|pink circle,-,-,-", "unknown color 'pink'"),
    ],
)
def test_bad_text_says_what_is_wrong(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Scene.decode(text)


def test_random_scenes_cover_everything_and_hold_no_two_alike() -> None:
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(2000)]
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {scene.style for scene in scenes} == set(STYLES)
    assert {cell for scene in scenes for cell in scene.cells} == set(CONTENTS)
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3, 4}
    assert all(len(set(scene.objects)) == len(scene.objects) for scene in scenes)
    assert all(random_scene(rng, style="fog").style == "fog" for _ in range(20))


def test_image_shows_each_object_in_its_cell() -> None:
    image = render(Scene.decode("pink|plain|red square,-,-,blue circle"))
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image[2:14, 2:14], np.broadcast_to((235, 0, 70), (12, 12, 3)))
    np.testing.assert_array_equal(image[:16, 16:], np.broadcast_to((240, 115, 195), (16, 16, 3)))
    np.testing.assert_array_equal(image[24, 24], (15, 35, 250))
    np.testing.assert_array_equal(image[1, 1], (240, 115, 195))


def test_styles_change_the_whole_image_as_specified() -> None:
    plain = render(Scene.decode("mint|plain|-,yellow triangle,-,-")).astype(float)
    night = render(Scene.decode("mint|night|-,yellow triangle,-,-"))
    fog = render(Scene.decode("mint|fog|-,yellow triangle,-,-"))
    frame = render(Scene.decode("mint|frame|-,yellow triangle,-,-"))
    assert abs(night - 0.6 * plain).max() <= 0.5
    assert abs(fog - (0.6 * plain + 102)).max() <= 0.5
    np.testing.assert_array_equal(frame[2:-2, 2:-2], plain[2:-2, 2:-2])
    border = np.ones((32, 32), bool)
    border[2:-2, 2:-2] = False
    assert (frame[border] == 255).all()


@pytest.mark.parametrize("style", STYLES)
def test_any_two_contents_of_a_cell_differ_clearly(style: scene_lib.Style) -> None:
    """At least 32 pixels differ, by 60 levels (mean over channels) times the contrast of the style."""
    for background, position in itertools.product(BACKGROUNDS, (0, 3)):
        cells = [scene_lib.cell_image(background, style, item, position).astype(float) for item in CONTENTS]
        for one, other in itertools.combinations(cells, 2):
            difference = abs(one - other).mean(-1)
            assert (difference >= 60 * CONTRAST[style]).sum() >= 32


def test_any_two_looks_differ_clearly() -> None:
    """Backgrounds under all styles: an empty cell of 256 pixels tells the style and the background."""
    cells = [
        scene_lib.cell_image(background, style, None, 0).astype(float)
        for background, style in itertools.product(BACKGROUNDS, STYLES)
    ]
    for one, other in itertools.combinations(cells, 2):
        assert abs(one - other).mean(-1).max() >= 22
