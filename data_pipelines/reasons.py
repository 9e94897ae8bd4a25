"""Reasons why a record is left out by sources, decoding and preparation, as reports and lists store them."""

import enum


class Reason(enum.StrEnum):
    """Reason why an entry of a data set is not used. Files hold the values, so these never change."""

    # An entry of a source that is not a record.
    ARCHIVE = "damaged archive"  # or table or list: a part of it is lost
    ANNOTATION = "damaged annotation"
    MISSING = "missing image"
    UNSAFE = "unsafe name"  # an absolute path, one that leaves its directory, a link or a device
    SIZE = "absurd size"  # of a file in bytes, or of an image in pixels
    INSTRUCTION = "empty instruction"
    SEVERAL = "several sources"  # an edit of more than one image
    APART = "members apart"  # files of a sample that are not neighbors in an archive
    NO_IMAGES = "no images"  # a turn of text alone
    AMBIGUOUS = "ambiguous image"  # one file name for two images
    CORRUPT = "known to be corrupt"
    FAILED = "failed edit"  # published as an example of what not to do

    NOT_THERE = "file not there"  # not downloaded, or something else in its place
    SPLIT = "another split"  # a file of the publisher's validation or test data
    TWICE = "read already"  # a directory that is reached in two ways

    # An unusable record.
    EMPTY = "empty file"
    NOT_AN_IMAGE = "not an image"
    TRUNCATED = "cut short"
    DECODING = "damaged image"
    BOMB = "too many pixels"
    ANIMATED = "several frames"
    COLORS = "unknown colors"
    RECORD = "unreadable record"  # a missing, truncated or damaged shard, or bytes that are no record

    # A sound record that a filter drops.
    SMALL = "too small"
    LARGE = "too large"
    RATIO = "too long"
    ASPECT = "sides differ in aspect"
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
        """`detail` tells people the finding and its place."""
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason, self.detail = reason, detail
