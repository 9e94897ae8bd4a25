import numpy as np

from data_pipelines.preparation.fingerprints import FACTS, digest
from data_pipelines.preparation.split import find_leaks, in_validation


class Rows:
    """Facts of made rows, in pieces."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def pieces(self):  # type: ignore[no-untyped-def]
        for first in range(0, len(self.rows), 7):
            yield first, self.rows[first : first + 7]


def test_a_share_of_images_is_for_validation_and_stays_there_when_the_share_grows() -> None:
    images = np.array([digest(b"%d" % number) for number in range(20_000)], np.uint64)
    small, large = in_validation(images, 0.01), in_validation(images, 0.05)
    assert 150 < small.sum() < 250 and 900 < large.sum() < 1100
    assert large[small].all()
    assert not in_validation(images, 0.0).any()


def test_a_image_of_validation_under_another_name_leaves_training() -> None:
    rows = np.zeros(40, FACTS)
    rows["original"] = 2**63  # training
    rows["original"][::10] = 0  # validation
    rows["source"] = rows["source_shape"] = np.arange(40)
    rows["target"] = rows["target_shape"] = 1000 + np.arange(40)
    rows["source"][13] = 10  # the same file
    rows["source_shape"][25] = 20  # the same look
    rows["source_shape"][36] = 30
    rows["source_colors"][36] = 100  # the same shape in other colors
    verdicts = np.zeros(40, np.uint8)
    assert find_leaks(Rows(rows), verdicts, 0.5, near_bits=3).tolist() == [[13, 10], [25, 20]]
    assert find_leaks(Rows(rows), verdicts, 0.5, near_bits=-1).tolist() == [[13, 10]]
    assert find_leaks(Rows(rows), verdicts, 0.0, near_bits=3).tolist() == []
    verdicts[[10, 25]] = 1  # what has left leaks nothing
    assert find_leaks(Rows(rows), verdicts, 0.5, near_bits=3).tolist() == []


def test_an_edit_of_validation_is_not_trained_on_turned_around() -> None:
    rows = np.zeros(40, FACTS)
    rows["original"] = 2**63  # training
    rows["original"][::10] = 0  # validation
    for side, first in (("source", 0), ("target", 1000)):
        rows[side] = rows[f"{side}_shape"] = first + np.arange(40)
    rows["source"][13] = 1010  # the target of an edit of validation
    rows["target"][14] = 10  # the source of one
    rows["target"][15] = 1020  # another edit that ends in the same image
    rows["target_shape"][26] = 30  # looks like the source of one
    verdicts = np.zeros(40, np.uint8)
    found = [[13, 10], [14, 10], [15, 20]]
    assert find_leaks(Rows(rows), verdicts, 0.5, near_bits=-1).tolist() == found
    assert find_leaks(Rows(rows), verdicts, 0.5, near_bits=0).tolist() == [*found, [26, 30]]
