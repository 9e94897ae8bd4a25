"""Edits of scenes, and the instructions that ask for them.

Seven kinds, modeled on the task list of EMU-Edit. Together with its source image, every instruction determines the
target scene exactly; its wording and its references to objects vary.

To measure generalization, about a tenth of all scenes and a fixed set of (kind, object) combinations are held out of
training.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Literal, TypeVar, get_args

import numpy as np

from data_pipelines.shapes.scene import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    SHAPES,
    Background,
    Object,
    Scene,
    Style,
    random_scene,
)
from varedit_jax.errors import UserError

Kind = Literal["add", "remove", "recolor", "replace", "move", "background", "global"]
Novelty = Literal["train", "scene", "combination"]

KINDS: tuple[Kind, ...] = get_args(Kind)
NOVELTIES: tuple[Novelty, ...] = get_args(Novelty)
PLAIN_SHARE = 0.75  # of the sources: style is `plain`, otherwise random
FULL_NAME_SHARE = 0.5  # of the references: full names ("the red circle"), otherwise any fitting phrase
HELD_OUT_SCENES = 10  # one scene in ten is held out

# Training repeats kinds that ask for pixels not in the source, which take more examples to learn.
TRAINING_KINDS: tuple[Kind, ...] = (*KINDS, "add", "recolor", "recolor", "replace", "move")

# Objects that are never the subject of an edit of this kind in training: 8 of 80 combinations. Training shows each of
# them as the subject of other kinds.
HELD_OUT_COMBINATIONS: dict[Kind, tuple[Object, ...]] = {
    "add": (Object("triangle", "red"), Object("cross", "yellow")),
    "remove": (Object("circle", "blue"),),
    "recolor": (Object("cross", "green"), Object("square", "red")),
    "replace": (Object("circle", "yellow"), Object("square", "blue")),
    "move": (Object("triangle", "green"),),
}

# {ref}: a reference to an object of the source; {new}: an object with its article; {cell}: a position;
# {color}: a color's name.
TEMPLATES: dict[Kind, tuple[str, ...]] = {
    "add": (
        "add {new} at the {cell}",
        "put {new} in the {cell}",
        "draw {new} at the {cell}",
        "place {new} in the {cell} corner",
        "insert {new} in the empty {cell}",
        "there should be {new} at the {cell}",
        "I would like {new} at the {cell}",
    ),
    "remove": (
        "remove {ref}",
        "delete {ref}",
        "erase {ref}",
        "take away {ref}",
        "get rid of {ref}",
        "the picture should not show {ref}",
    ),
    "recolor": (
        "make {ref} {color}",
        "turn {ref} {color}",
        "paint {ref} {color}",
        "change the colour of {ref} to {color}",
        "colour {ref} {color}",
        "{ref} should be {color}",
    ),
    "replace": (
        "replace {ref} with {new}",
        "replace {ref} by {new}",
        "swap {ref} for {new}",
        "turn {ref} into {new}",
        "change {ref} to {new}",
        "put {new} in place of {ref}",
    ),
    "move": (
        "move {ref} to the {cell}",
        "shift {ref} to the {cell}",
        "put {ref} at the {cell} instead",
        "bring {ref} to the {cell}",
        "take {ref} to the empty {cell}",
        "{ref} should be at the {cell}",
    ),
    "background": (
        "make the background {color}",
        "change the background to {color}",
        "turn the background {color}",
        "set the background colour to {color}",
        "paint the background {color}",
        "use {color} as the background",
    ),
}

# By (style of the source, style of the target).
STYLE_TEMPLATES: dict[tuple[Style, Style], tuple[str, ...]] = {
    ("plain", "night"): (
        "make it night",
        "turn the scene into night",
        "darken the whole picture",
        "show the scene at night",
        "switch off the light",
        "make the whole picture dark",
    ),
    ("plain", "fog"): (
        "cover the scene with fog",
        "make it foggy",
        "add fog to the picture",
        "let thick fog come up",
        "show everything in white fog",
        "make the whole picture pale and foggy",
    ),
    ("plain", "frame"): (
        "put a white frame around the picture",
        "frame the picture",
        "add a white border",
        "draw a white frame at the edges",
        "give the picture a white border",
        "surround everything with a white frame",
    ),
    ("night", "plain"): (
        "make it day again",
        "turn the night into day",
        "switch on the light",
        "light up the dark picture",
        "show the scene by day",
        "end the night",
    ),
    ("fog", "plain"): (
        "clear the fog",
        "remove the fog",
        "make the foggy picture clear",
        "take the fog away",
        "show the scene without fog",
        "let the fog lift",
    ),
    ("frame", "plain"): (
        "remove the frame",
        "take off the white border",
        "delete the white frame",
        "show the picture without its frame",
        "erase the border",
        "get rid of the white frame",
    ),
}

_T = TypeVar("_T")
_BACKGROUND_WORDS: dict[Background, str] = {"sky": "sky blue"}  # where the name alone reads badly


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit:
    """One edit: instruction, source scene and target scene.

    `subject` is the object added, removed or moved, the object that results from recoloring or replacing, the new
    background, or the new style.
    """

    kind: Kind
    instruction: str
    source: Scene
    target: Scene
    subject: str


def scene_held_out(scene: Scene) -> bool:
    """Returns True if the scene is held out of training, by a hash: about one in `HELD_OUT_SCENES`."""
    digest = hashlib.blake2b(scene.encode().encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SCENES == 0


def combination_held_out(kind: Kind, subject: str) -> bool:
    """Returns True if edits of this kind and subject are held out of training."""
    return any(subject == str(item) for item in HELD_OUT_COMBINATIONS.get(kind, ()))


def novelty_of(edit: Edit) -> Novelty | None:
    """Returns the kind of novelty of an edit relative to training; None if it is of several kinds.

    In a `train` edit, neither scenes nor combination are held out. A `scene` edit starts from a held-out scene; a
    `combination` edit has a held-out combination, with scenes that are not.
    """
    combination = combination_held_out(edit.kind, edit.subject)
    if scene_held_out(edit.source):
        return None if combination else "scene"
    if scene_held_out(edit.target):
        return None
    return "combination" if combination else "train"


def _choose(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    return options[int(rng.integers(len(options)))]


def references(scene: Scene, position: int) -> tuple[str, ...]:
    """Returns every phrase that refers to the object in cell `position` alone; its full name first."""
    item = scene.cells[position]
    if item is None:
        raise UserError(f"the cell at the {POSITIONS[position]} of {scene.encode()!r} is empty: nothing to refer to")
    cell = POSITIONS[position]
    phrases = [f"the {item}", f"the shape at the {cell}", f"the object in the {cell}"]
    if sum(other.shape == item.shape for other in scene.objects) == 1:
        phrases.append(f"the {item.shape}")
    if sum(other.color == item.color for other in scene.objects) == 1:
        phrases.append(f"the {item.color} shape")
    if len(scene.objects) == 1:
        phrases.append("the only shape")  # "the shape" would be a prefix of "the shape at the top left"
    return tuple(phrases)


def _reference(rng: np.random.Generator, phrases: tuple[str, ...]) -> str:
    return phrases[0] if rng.random() < FULL_NAME_SHARE else _choose(rng, phrases)


def _with_cell(scene: Scene, *changes: tuple[int, Object | None]) -> Scene:
    cells = list(scene.cells)
    for position, item in changes:
        cells[position] = item
    return dataclasses.replace(scene, cells=tuple(cells))


def _edit(rng: np.random.Generator, kind: Kind, source: Scene) -> Edit | None:
    """Returns an edit of `source` of this kind; None if the scene allows none or the draw does not fit."""
    occupied = [p for p, item in enumerate(source.cells) if item is not None]
    empty = [p for p, item in enumerate(source.cells) if item is None]
    if kind == "background":
        background = _choose(rng, [name for name in BACKGROUNDS if name != source.background])
        text = _choose(rng, TEMPLATES[kind]).format(color=_BACKGROUND_WORDS.get(background, background))
        target = dataclasses.replace(source, background=background)
        return Edit(kind=kind, instruction=text, source=source, target=target, subject=background)
    if kind == "global":
        style = _choose(rng, [after for before, after in STYLE_TEMPLATES if before == source.style])
        text = _choose(rng, STYLE_TEMPLATES[source.style, style])
        target = dataclasses.replace(source, style=style)
        return Edit(kind=kind, instruction=text, source=source, target=target, subject=style)

    if (kind in ("add", "move") and not empty) or (kind == "remove" and len(occupied) == 1):
        return None  # an empty scene has nothing left to edit, so the last object stays
    position = _choose(rng, empty if kind == "add" else occupied)
    old = source.cells[position]
    words = {} if old is None else {"ref": _reference(rng, references(source, position))}
    changes: list[tuple[int, Object | None]]
    if kind == "move":
        goal = _choose(rng, empty)
        subject, changes = old, [(position, None), (goal, old)]
        words |= {"cell": POSITIONS[goal]}
    elif kind == "remove":
        subject, changes = old, [(position, None)]
    else:
        shape, color = _choose(rng, SHAPES), _choose(rng, COLORS)
        subject = Object(old.shape, color) if kind == "recolor" and old else Object(shape, color)
        if subject in source.objects or (kind == "replace" and old and subject.shape == old.shape):
            return None
        changes = [(position, subject)]
        words |= {"new": f"a {subject}", "color": color, "cell": POSITIONS[position]}
    text = _choose(rng, TEMPLATES[kind]).format(**words)
    return Edit(kind=kind, instruction=text, source=source, target=_with_cell(source, *changes), subject=str(subject))


def random_edit(rng: np.random.Generator, novelty: Novelty = "train") -> Edit:
    """Returns a random edit of the given novelty.

    Kinds are drawn evenly from `TRAINING_KINDS` for `train`, from the five kinds that have held-out combinations for
    `combination`, and from `KINDS` for `scene`. Raises UserError for an unknown novelty.
    """
    if novelty not in NOVELTIES:
        raise UserError(f"unknown novelty {novelty!r}; known are {', '.join(NOVELTIES)}")
    kinds = {"train": TRAINING_KINDS, "scene": KINDS, "combination": tuple(HELD_OUT_COMBINATIONS)}[novelty]
    kind = _choose(rng, kinds)
    while True:
        source = random_scene(rng, style="plain" if rng.random() < PLAIN_SHARE else None)
        edit = _edit(rng, kind, source)
        if edit is not None and novelty_of(edit) == novelty:
            return edit
