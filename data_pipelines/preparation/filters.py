"""Why a record that can be read is left out all the same, and the steps that look at one record alone."""

import enum

from data_pipelines.preparation.perceptual_hash import Look, change
from data_pipelines.preparation.settings import Settings
from data_pipelines.record import Record


class Cause(enum.StrEnum):
    """Why a sound record is left out."""

    SMALL = "too small"
    LARGE = "too large"
    RATIO = "too long"
    SCORE = "low score"
    TURN = "later turn"
    UNCHANGED = "nothing changed"
    SAME_ID = "id twice"
    EXACT = "exact duplicate"
    NEAR = "near-duplicate"
    LEAK = "image of validation"
    NOT_DONE = "edit not done"
    NOT_KEPT = "rest not kept"
    UNCLEAR = "no clear answer"


class LeftOut(Exception):
    """A record that a step leaves out."""

    def __init__(self, cause: Cause, detail: str) -> None:
        """`detail` is for people: what was found, and what the limit is."""
        super().__init__(f"{cause}: {detail}")
        self.cause, self.detail = cause, detail


def check_text(record: Record, settings: Settings) -> None:
    """What can be seen without opening an image: the turn and the scores. Raises LeftOut."""
    if settings.first_turn and record.turn > 0:
        raise LeftOut(Cause.TURN, f"turn {record.turn}")
    for name, least in settings.min_scores:
        if name in record.scores and record.scores[name] < least:
            raise LeftOut(Cause.SCORE, f"{name} is {record.scores[name]:g}, below {least:g}")


def check_size(side: str, size: tuple[int, int], settings: Settings) -> None:
    """The size of an image, (width, height) in pixels; `side` is source or target. Raises LeftOut."""
    short, long = sorted(size)
    text = f"{side}: {size[0]} x {size[1]} pixels"
    if short < settings.min_side:
        raise LeftOut(Cause.SMALL, text)
    if settings.max_side and long > settings.max_side:
        raise LeftOut(Cause.LARGE, text)
    if settings.max_ratio and long > settings.max_ratio * short:
        raise LeftOut(Cause.RATIO, text)


def check_change(source: Look, target: Look, settings: Settings) -> None:
    """Whether the edit shows. Raises LeftOut."""
    levels = change(source, target)
    if levels < settings.min_change:
        raise LeftOut(Cause.UNCHANGED, f"by {levels:.2f} levels, below {settings.min_change:g}")
