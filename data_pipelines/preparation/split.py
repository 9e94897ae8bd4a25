"""Training and validation: which pictures are in which, and that none is in both."""

import numpy as np
from numpy.typing import NDArray

from data_pipelines.preparation.duplicates import Pairs, left
from data_pipelines.preparation.facts import Facts
from data_pipelines.preparation.looks import alike

SPLITS = ("train", "validation")


def in_validation(pictures: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Whether pictures, known by the hash of their identity, are for validation.

    The hash alone decides, so that a picture that two data sets have under one name, or the same bytes, is in the same
    split of both, and stays there when a data set grows.
    """
    return pictures < np.uint64(min(round(share * 2**64), 2**64 - 1))


def find_leaks(facts: Facts, verdicts: NDArray[np.uint8], share: float, near_bits: int) -> Pairs:
    """Records of training whose source is one of validation's under another name; and a record that has it there.

    The same file, or, where near-duplicates are looked for (`near_bits` of at least 0), one of the same shape and like
    colours. Memory is that of validation.
    """
    columns = ("source", "source_shape", "source_colours")
    kept: list[list[NDArray]] = []
    for numbers, rows in left(facts, verdicts):
        mine = in_validation(rows["picture"], share)
        kept.append([numbers[mine], *(rows[name][mine] for name in columns)])
    if not kept:
        return np.zeros((0, 2), np.int64)
    there, *known = (np.concatenate(column) for column in zip(*kept, strict=True))
    found = [np.zeros((0, 2), np.int64)]
    if not len(there):
        return found[0]
    for numbers, rows in left(facts, verdicts):
        mine = ~in_validation(rows["picture"], share)
        numbers, rows = numbers[mine], rows[mine]
        twin = np.full(len(numbers), -1, np.int64)
        for name, values in zip(columns[: 2 if near_bits >= 0 else 1], known, strict=False):
            order = np.argsort(values, kind="stable")
            at = np.minimum(np.searchsorted(values[order], rows[name]), len(order) - 1)
            other = order[at]
            same = values[other] == rows[name]
            if name == "source_shape":
                same &= alike(rows[name], values[other], rows["source_colours"], known[2][other], 0)
            twin = np.where((twin < 0) & same, there[other], twin)
        found.append(np.stack([numbers, twin], axis=1)[twin >= 0])
    return np.concatenate(found)
