"""The split into training and validation, with no image in both."""

import numpy as np
from numpy.typing import NDArray

from data_pipelines.preparation.duplicates import Pairs, left
from data_pipelines.preparation.fingerprints import Facts
from data_pipelines.preparation.perceptual_hash import alike

SPLITS = ("train", "validation")
_SIDES = ("source", "target")


def in_validation(images: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Returns True where images, given by hashes of their identity, belong to validation.

    The hash alone decides, so that an image shared by two data sets, by name or bytes, is in the same split of both,
    and stays there when a data set grows.
    """
    return images < np.uint64(min(round(share * 2**64), 2**64 - 1))


def _columns(side: str) -> tuple[str, str, str]:
    return side, f"{side}_shape", f"{side}_colors"


def find_leaks(facts: Facts, verdicts: NDArray[np.uint8], share: float, near_bits: int) -> Pairs:
    """Returns training records that share an image with validation under another name, with such a validation record.

    Sources and targets are compared with each other, since some data sets list an edit and its reverse. Images match
    if they are the same file or, with `near_bits` of at least 0, have the same perceptual hash and similar colors.
    Memory grows with validation only.
    """
    kept: list[list[NDArray]] = []
    for numbers, rows in left(facts, verdicts):
        mine = in_validation(rows["original"], share)
        kept += [[numbers[mine], *(rows[name][mine] for name in _columns(side))] for side in _SIDES]
    if not kept:
        return np.zeros((0, 2), np.int64)
    there, *known = (np.concatenate(column) for column in zip(*kept, strict=True))
    found = [np.zeros((0, 2), np.int64)]
    if not len(there):
        return found[0]
    orders = [np.argsort(values, kind="stable") for values in known[:2]]  # of files, of shapes
    for numbers, rows in left(facts, verdicts):
        mine = ~in_validation(rows["original"], share)
        numbers, rows = numbers[mine], rows[mine]
        twin = np.full(len(numbers), -1, np.int64)
        for column, order in enumerate(orders if near_bits >= 0 else orders[:1]):
            for side in _SIDES:
                values = rows[_columns(side)[column]]
                at = np.searchsorted(known[column], values, sorter=order)
                other = order[np.minimum(at, len(order) - 1)]
                same = known[column][other] == values
                if column == 1:
                    same &= alike(values, known[1][other], rows[f"{side}_colors"], known[2][other], 0)
                twin = np.where((twin < 0) & same, there[other], twin)
        found.append(np.stack([numbers, twin], axis=1)[twin >= 0])
    return np.concatenate(found)
