"""The judge: accepts every exact target, also through a moderate codec, and nothing else."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipelines.shapes import edits, judge
from data_pipelines.shapes.edits import KINDS, Edit
from data_pipelines.shapes.judge import Verdict
from data_pipelines.shapes.scene import (
    BACKGROUND_RGB,
    CELL,
    COLORS,
    SHAPES,
    STYLES,
    Object,
    Scene,
    render,
    style_color,
)
from varedit_jax.errors import UserError

EXACT = Verdict(done=True, kept=True)
UNREADABLE = Verdict(done=False, kept=False)
SOURCE = Scene.decode("grey|plain|red circle,-,blue cross,-")
TARGET = Scene.decode("grey|plain|red circle,-,green cross,-")  # recolored


@pytest.fixture(scope="module")
def cases() -> list[Edit]:
    rng = np.random.default_rng(0)
    return [edits.random_edit(rng) for _ in range(210)]


def to_uint8(images: NDArray[Any]) -> NDArray[np.uint8]:
    return np.clip(np.round(images), 0, 255).astype(np.uint8)


def blur(images: NDArray[Any], sigma: float) -> NDArray[np.float64]:
    """Returns images [B, 32, 32, 3] with a Gaussian blur; sigma in pixels."""
    taps = np.exp(-(np.arange(-6, 7) ** 2) / (2 * sigma**2))
    result = images.astype(float)
    for axis in (1, 2):
        padding = [(6, 6) if a == axis else (0, 0) for a in range(4)]
        padded = np.pad(result, padding, mode="edge")
        result = sum(
            tap * np.take(padded, range(i, i + result.shape[axis]), axis=axis)
            for i, tap in enumerate(taps / taps.sum())
        )
    return result


def verdicts(images: NDArray[Any], cases: list[Edit]) -> list[Verdict]:
    return judge.judge_batch(to_uint8(images), [case.source for case in cases], [case.target for case in cases])


def verdict(image: NDArray[np.uint8], source: Scene, target: Scene) -> Verdict:
    return judge.judge_batch(image[None], [source], [target])[0]


def targets(cases: list[Edit]) -> NDArray[np.uint8]:
    return np.stack([render(case.target) for case in cases])


def test_exact_targets_are_exact_for_every_kind_and_style(cases: list[Edit]) -> None:
    assert {case.kind for case in cases} == set(KINDS)
    assert {case.target.style for case in cases} == set(STYLES)
    found = verdicts(targets(cases), cases)
    assert found == [EXACT] * len(cases) and all(verdict.exact for verdict in found)
    assert judge.read_scenes(targets(cases)) == [case.target for case in cases]


def test_copying_the_source_keeps_everything_and_does_nothing(cases: list[Edit]) -> None:
    sources = np.stack([render(case.source) for case in cases])
    assert verdicts(sources, cases) == [Verdict(done=False, kept=True)] * len(cases)


@pytest.mark.parametrize(
    ("shown", "done", "kept"),
    [
        ("grey|plain|red circle,-,green cross,-", True, True),
        ("grey|plain|red circle,-,yellow cross,-", False, True),  # wrong color
        ("grey|plain|red circle,-,green square,-", False, True),  # wrong shape
        ("grey|plain|red circle,-,-,-", False, True),  # object gone
        ("grey|plain|-,-,green cross,-", True, False),  # another object gone
        ("grey|plain|red circle,green cross,green cross,-", True, False),  # one too many, and two alike
        ("grey|plain|green circle,-,blue cross,-", False, False),  # the wrong object recolored
        ("pink|plain|red circle,-,green cross,-", True, False),  # background
        ("grey|night|red circle,-,green cross,-", True, False),  # style
        ("grey|plain|-,-,-,-", False, False),
    ],
)
def test_done_and_kept_are_told_apart(shown: str, done: bool, kept: bool) -> None:
    image = render(Scene.decode(shown))
    assert verdict(image, SOURCE, TARGET) == Verdict(done=done, kept=kept)


def test_a_move_is_done_only_if_the_object_left_and_arrived() -> None:
    moved = Scene.decode("grey|plain|red circle,blue cross,-,-")
    stayed = render(Scene.decode("grey|plain|red circle,blue cross,blue cross,-"))
    assert verdict(stayed, SOURCE, moved) == Verdict(done=False, kept=True)
    assert verdict(render(moved), SOURCE, moved) == EXACT


@pytest.mark.parametrize(("noise", "sigma"), [(6.0, 0.0), (0.0, 0.6), (4.0, 0.5)])
def test_a_moderate_codec_error_is_accepted(cases: list[Edit], noise: float, sigma: float) -> None:
    """Noise of standard deviation 6 levels; blur of 0.6 pixels, which takes a fifth of the step at an edge."""
    images = blur(targets(cases), sigma) if sigma else targets(cases).astype(float)
    images = images + noise * np.random.default_rng(0).normal(size=images.shape)
    assert np.mean([verdict.exact for verdict in verdicts(images, cases)]) == 1.0


@pytest.mark.parametrize(("noise", "sigma"), [(40.0, 0.0), (0.0, 3.0)])
def test_noise_and_blur_beyond_that_are_rejected(cases: list[Edit], noise: float, sigma: float) -> None:
    images = blur(targets(cases), sigma) if sigma else targets(cases).astype(float)
    images = images + noise * np.random.default_rng(0).normal(size=images.shape)
    found = [v for v, case in zip(verdicts(images, cases), cases, strict=True) if any(case.target.cells)]
    assert not any(verdict.exact for verdict in found)  # but a blurred empty scene is an empty scene
    assert np.mean([verdict == UNREADABLE for verdict in found]) > 0.95


def test_half_drawn_objects_are_rejected(cases: list[Edit]) -> None:
    first, second, whole = slice(2, 8), slice(8, 14), slice(2, 14)
    images = []
    for case in cases[:60]:
        ground = style_color(BACKGROUND_RGB[case.target.background], case.target.style)
        position = next(i for i, item in enumerate(case.target.cells) if item)
        for half in ((first, whole), (second, whole), (whole, first), (whole, second)):
            image = render(case.target)
            image[CELL * (position // 2) :, CELL * (position % 2) :][half] = ground
            images.append(image)
    assert judge.read_scenes(np.stack(images)) == [None] * len(images)


def test_mixtures_of_two_scenes_are_rejected() -> None:
    half = to_uint8((render(SOURCE).astype(float) + render(TARGET)) / 2)
    assert verdict(half, SOURCE, TARGET) == UNREADABLE
    styles = to_uint8((render(SOURCE).astype(float) + render(Scene.decode("grey|night|red circle,-,blue cross,-"))) / 2)
    assert judge.read_scene(styles) is None


@pytest.mark.parametrize("level", [0, 215, 255])
def test_images_of_nothing_are_rejected(level: int) -> None:
    assert judge.read_scene(np.full((32, 32, 3), level, np.uint8)) is None


def test_an_object_of_the_wrong_size_or_place_is_rejected() -> None:
    for shift in ((0, 2), (2, 0), (-2, 2)):
        assert judge.read_scene(np.roll(render(SOURCE), shift, (0, 1))) is None
    small = render(Scene.decode("grey|plain|-,-,-,-"))
    small[5:11, 5:11] = style_color((235, 0, 70), "plain")
    assert judge.read_scene(small) is None


def test_every_single_content_is_read(cases: list[Edit]) -> None:
    scenes = [
        Scene(background=case.target.background, style=style, cells=(None, item, None, None))
        for case in cases[:3]
        for style in STYLES
        for item in (None, *(Object(shape, color) for shape in SHAPES for color in COLORS))
    ]
    assert judge.read_scenes(np.stack([render(scene) for scene in scenes])) == scenes


def test_batches_and_single_images_agree_and_bad_input_is_refused(cases: list[Edit]) -> None:
    some = cases[:5]
    assert verdicts(targets(some), some) == [verdict(render(case.target), case.source, case.target) for case in some]
    with pytest.raises(UserError, match=r"not float64 \[1, 32, 32, 3\]"):
        judge.read_scenes(np.zeros((1, 32, 32, 3)))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"\[1, 16, 16, 3\]"):
        judge.read_scene(np.zeros((16, 16, 3), np.uint8))
