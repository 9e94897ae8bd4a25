"""Reasons why a record is left out: one list for sources, decoding and preparation, as reports and lists store them."""

import enum


class Reason(enum.StrEnum):
    """Reason why something that a data set lists is not used. Files hold the values, so those never change."""

    # What a source lists, but is no record.
    ARCHIVE = "damaged archive"  # or table, or list: what it held from there on is lost
    ANNOTATION = "damaged annotation"
    MISSING = "missing image"
    UNSAFE = "unsafe name"  # an absolute path, one that leaves its directory, a link or a device
    SIZE = "absurd size"  # of a file in bytes, or of an image in pixels
    INSTRUCTION = "empty instruction"
    SEVERAL = "several sources"  # an edit of more than one image
    NO_IMAGES = "no images"  # a turn that only says something
    AMBIGUOUS = "ambiguous image"  # the same file stands for two images
    CORRUPT = "known to be corrupt"
    FAILED = "failed edit"  # published as an example of what not to do

    # A record that cannot be used.
    EMPTY = "empty file"
    NOT_AN_IMAGE = "not an image"
    TRUNCATED = "cut short"
    DECODING = "damaged image"
    BOMB = "too many pixels"
    ANIMATED = "several frames"
    COLORS = "unknown colors"
    RECORD = "unreadable record"  # a shard that is missing, short or damaged, or bytes that are no record

    # A sound record that is not wanted.
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
    """A record that is left out."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        """`detail` is for people: what was found, and where."""
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason, self.detail = reason, detail
