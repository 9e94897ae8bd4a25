"""Filters of single records, which drop sound but unwanted ones."""

from data_pipelines.geometry import aspect_change, is_turned
from data_pipelines.preparation.perceptual_hash import Look, change
from data_pipelines.preparation.settings import Settings
from data_pipelines.reasons import LeftOut, Reason
from data_pipelines.record import Record


def check_text(record: Record, settings: Settings) -> None:
    """Checks the turn and the scores, which need no image. Raises LeftOut."""
    if settings.first_turn and record.turn > 0:
        raise LeftOut(Reason.TURN, f"turn {record.turn}")
    for name, least in settings.min_scores:
        if name in record.scores and record.scores[name] < least:
            raise LeftOut(Reason.SCORE, f"{name} is {record.scores[name]:g}, below {least:g}")


def check_size(side: str, size: tuple[int, int], settings: Settings) -> None:
    """Checks the size of an image, (width, height) in pixels; `side` is source or target. Raises LeftOut."""
    short, long = sorted(size)
    text = f"{side}: {size[0]} x {size[1]} pixels"
    if short < settings.min_side:
        raise LeftOut(Reason.SMALL, text)
    if settings.max_side and long > settings.max_side:
        raise LeftOut(Reason.LARGE, text)
    if settings.max_ratio and long > settings.max_ratio * short:
        raise LeftOut(Reason.RATIO, text)


def check_aspects(source: tuple[int, int], target: tuple[int, int], settings: Settings) -> None:
    """Checks that a target can be brought to its source's size; sizes are (width, height) in pixels. Raises LeftOut."""
    text = f"{source[0]} x {source[1]} against {target[0]} x {target[1]} pixels"
    if settings.max_aspect_change and is_turned(*source, *target):
        raise LeftOut(Reason.ASPECT, f"{text}: one side is turned")
    if settings.max_aspect_change and aspect_change(*source, *target) > settings.max_aspect_change:
        raise LeftOut(Reason.ASPECT, text)


def check_change(source: Look, target: Look, settings: Settings) -> None:
    """Checks that the edit changes the image visibly. Raises LeftOut."""
    levels = change(source, target)
    if levels < settings.min_change:
        raise LeftOut(Reason.UNCHANGED, f"by {levels:.2f} levels, below {settings.min_change:g}")
