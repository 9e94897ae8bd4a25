"""Edits: what the instruction says is what the target shows, and nothing held out gets into training."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from data_pipelines.shapes import edits
from data_pipelines.shapes.edits import HELD_OUT_COMBINATIONS, KINDS, STYLE_TEMPLATES, TEMPLATES, Edit, Novelty
from data_pipelines.shapes.scene import BACKGROUNDS, COLORS, POSITIONS, SHAPES, Object, Scene, random_scene
from varedit_jax.errors import UserError
from varedit_jax.text.vocabulary import Vocabulary

STYLE_OF = {text: after for (_, after), texts in STYLE_TEMPLATES.items() for text in texts}


def draw(novelty: Novelty, count: int, seed: int = 0) -> list[Edit]:
    rng = np.random.default_rng(seed)
    return [edits.random_edit(rng, novelty) for _ in range(count)]


@pytest.fixture(scope="module")
def train() -> list[Edit]:
    return draw("train", 1500)


def understood(instruction: str, scene: Scene) -> set[Scene]:
    """Returns every scene that the instruction could ask for, derived from its words alone, without its template."""
    if instruction in STYLE_OF:
        return {dataclasses.replace(scene, style=STYLE_OF[instruction])}
    words = instruction.replace("sky blue", "sky").split()
    if "background" in words:
        (color,) = [word for word in words if word in BACKGROUNDS]
        return {dataclasses.replace(scene, background=color)}

    # Cut into phrases at the words that come before a new object, a color to paint, or a position.
    text = " ".join(words)
    named = [cell for cell in POSITIONS if cell in text]
    news = [Object(shape, color) for shape in SHAPES for color in COLORS if f" a {color} {shape}" in text]
    for item in news:
        text = text.replace(f"a {item}", "")
    by_place = [
        i
        for i, cell in enumerate(POSITIONS)
        if f"the shape at the {cell}" in text or f"the object in the {cell}" in text
    ]
    cells: list[int]
    if by_place:
        cells = by_place
        named = [cell for cell in named if POSITIONS.index(cell) not in by_place]
    else:
        shapes = [shape for shape in SHAPES if shape in text.split()]
        colors = [color for color in COLORS if f"the {color}" in text]
        cells = [
            i
            for i, item in enumerate(scene.cells)
            if item and (not shapes or item.shape in shapes) and (not colors or item.color in colors)
        ]
    painted = [color for color in COLORS if text.endswith(f" {color}")]

    def put(*changes: tuple[int, Object | None]) -> Scene:
        result = list(scene.cells)
        for position, item in changes:
            result[position] = item
        return dataclasses.replace(scene, cells=tuple(result))

    if news and named:
        return {put((POSITIONS.index(named[0]), news[0]))}
    if news:
        return {put((cell, news[0])) for cell in cells}
    if named:
        return {put((cell, None), (POSITIONS.index(named[0]), scene.cells[cell])) for cell in cells}
    if painted:
        return {put((cell, Object(scene.cells[cell].shape, painted[0]))) for cell in cells}  # type: ignore[union-attr]
    return {put((cell, None)) for cell in cells}


def test_an_instruction_can_be_understood_in_one_way_only(train: list[Edit]) -> None:
    for edit in [*train, *draw("combination", 200)]:
        assert understood(edit.instruction, edit.source) == {edit.target}, (edit.instruction, edit.source.encode())


def test_an_edit_changes_what_its_kind_says(train: list[Edit]) -> None:
    for edit in train:
        before, after = edit.source, edit.target
        changed = [(a, b) for a, b in zip(before.cells, after.cells, strict=True) if a != b]
        assert (before.background != after.background) == (edit.kind == "background")
        assert (before.style != after.style) == (edit.kind == "global")
        assert len(changed) == {"background": 0, "global": 0, "move": 2}.get(edit.kind, 1)
        assert after.objects and len(set(after.objects)) == len(after.objects)
        if edit.kind == "global":
            assert "plain" in (before.style, after.style) and edit.subject == after.style
        elif edit.kind == "background":
            assert edit.subject == after.background
        elif edit.kind == "move":
            assert Counter(before.cells) == Counter(after.cells) and edit.subject in map(str, before.objects)
        else:
            (old, new) = changed[0]
            assert (old is None) == (edit.kind == "add") and (new is None) == (edit.kind == "remove")
            assert edit.subject == str(new or old)
            if edit.kind == "recolor":
                assert old and new and old.shape == new.shape
            if edit.kind == "replace":
                assert old and new and old.shape != new.shape


def test_shares_of_kinds_and_sources_mostly_plain(train: list[Edit]) -> None:
    """1500 draws for training: a share of 0.25 has a standard deviation of 0.011. Kinds to be scored on are even."""
    kinds = Counter(edit.kind for edit in train)
    weights = dict.fromkeys(KINDS, 1) | {"add": 2, "recolor": 3, "replace": 2, "move": 2}
    assert set(kinds) == set(KINDS)
    assert all(abs(kinds[kind] / len(train) - weights[kind] / 12) < 0.04 for kind in KINDS)
    scored = Counter(edit.kind for edit in draw("scene", 700))
    assert all(abs(scored[kind] / 700 - 1 / len(KINDS)) < 0.05 for kind in KINDS)
    plain = np.mean([edit.source.style == "plain" for edit in train])
    assert 0.75 <= plain < 0.87  # 75 %, and the plain ones of the other quarter


def test_wording_is_varied_and_short(train: list[Edit]) -> None:
    assert all(len(set(texts)) >= 6 for texts in [*TEMPLATES.values(), *STYLE_TEMPLATES.values()])
    lengths = [len(Vocabulary().tokens(edit.instruction)) for edit in train]
    assert max(lengths) <= 24
    texts = [edit.instruction for edit in train]
    for form in ("the red circle", "the shape at the top left", "the object in the top left", "the cross", "red shape"):
        assert any(form in text for text in texts), form


def test_references_name_one_object_only() -> None:
    scene = Scene.decode("grey|plain|red circle,red square,-,blue circle")
    assert "the circle" not in edits.references(scene, 0) and "the red shape" not in edits.references(scene, 0)
    assert edits.references(scene, 0)[0] == "the red circle"
    assert "the shape at the top left" in edits.references(scene, 0)
    assert "the square" in edits.references(scene, 1)
    assert "the blue shape" in edits.references(scene, 3)
    assert "the only shape" in edits.references(Scene.decode("grey|plain|red circle,-,-,-"), 0)
    with pytest.raises(UserError, match="bottom left"):
        edits.references(scene, 2)


def test_nothing_held_out_is_in_training(train: list[Edit]) -> None:
    for edit in train:
        assert not edits.scene_held_out(edit.source) and not edits.scene_held_out(edit.target)
        assert edit.subject not in [str(item) for item in HELD_OUT_COMBINATIONS.get(edit.kind, ())]


def test_held_out_edits_are_new_in_one_way_only() -> None:
    for edit in draw("scene", 100):
        assert edits.scene_held_out(edit.source) and not edits.combination_held_out(edit.kind, edit.subject)
    combinations = draw("combination", 300)
    for edit in combinations:
        assert not edits.scene_held_out(edit.source) and not edits.scene_held_out(edit.target)
    asked = {(edit.kind, edit.subject) for edit in combinations}
    assert asked == {(kind, str(item)) for kind, items in HELD_OUT_COMBINATIONS.items() for item in items}


def test_a_tenth_of_the_scenes_is_held_out_by_a_stable_hash() -> None:
    rng = np.random.default_rng(0)
    share = np.mean([edits.scene_held_out(random_scene(rng)) for _ in range(3000)])
    assert abs(share - 0.1) < 0.02
    assert edits.scene_held_out(Scene.decode("grey|plain|-,-,-,red circle"))
    assert not edits.scene_held_out(Scene.decode("grey|plain|red circle,-,-,-"))


def test_every_shape_and_color_of_a_held_out_combination_is_trained_on() -> None:
    assert sum(len(items) for items in HELD_OUT_COMBINATIONS.values()) == 8
    for items in HELD_OUT_COMBINATIONS.values():
        assert len({item.shape for item in items}) == len({item.color for item in items}) == len(items)


def test_same_seed_same_edit_and_unknown_novelty_is_refused() -> None:
    assert draw("train", 20, seed=3) == draw("train", 20, seed=3) != draw("train", 20, seed=4)
    with pytest.raises(UserError, match="unknown novelty 'dev'"):
        edits.random_edit(np.random.default_rng(0), "dev")  # type: ignore[arg-type]
