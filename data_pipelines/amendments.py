"""Examples that a run leaves out, each from a step on: what a check finds can be applied to a running run.

WORKDIR/left_out.json has the lists of each split in order of their steps, indices of examples as half-open ranges:

    {"train": [{"from_step": 0, "left_out": []}, {"from_step": 90, "left_out": [[8, 16], [40, 41]]}], "test": [...]}

Steps before 90 keep their batches, also where the run resumes from an older checkpoint. Applying a list voids those of
the same and of later steps.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from varedit_jax.errors import UserError
from varedit_jax.storage.disk import explained, read_explained
from varedit_jax.storage.files import make_directory, write_text
from varedit_jax.storage.paths import PathLike, resolve

FILE = "left_out.json"

Kept = NDArray[np.bool_]  # [n], False for examples that are left out


class Since(NamedTuple):
    """The examples of a split that are used from a step on."""

    from_step: int
    kept: Kept


class Amendments:
    """The lists of a run. Every process has its own, of the same files."""

    def __init__(
        self,
        now: Mapping[str, Kept],
        workdir: PathLike | None = None,
        *,
        apply: bool = False,
        writes: bool = True,
        say: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        """Begins as for a new run; `resume` takes up an older one.

        Args:
          now: by split, the examples that the data on disk would have used.
          workdir: of the run; None records nothing.
          apply: True to go on with them where the run began with others.
          writes: False for processes that leave the recording to another.
          say: shows a line to the user.
        """
        self._now, self._apply, self._writes, self._say = now, apply, writes, say
        self._path = None if workdir is None else resolve(workdir) / FILE
        self.lists = {split: [Since(0, kept)] for split, kept in now.items()}

    def resume(self, step: int, unchecked: Kept, fits: Callable[[list[Since]], bool]) -> None:
        """Takes up the recorded lists, and applies those of the data on disk from `step` on.

        Args:
          step: the next one.
          unchecked: training examples without any check; with them or those of now began a run without a record.
          fits: returns True if lists of the training split are those of the checkpoint.

        Raises UserError if the record does not fit, or if the lists differ from now and are not to be applied.
        """
        recorded = self._read()
        begun = [recorded["train"]] if "train" in recorded else [[Since(0, self._now["train"])], [Since(0, unchecked)]]
        found = next(filter(fits, begun), None)
        if found is None:
            raise UserError(
                f"the data or the mixture are not those of the checkpoint, or {self._path or FILE} is not that of the "
                f"run: no one can say which batch comes next; bring them back, or start a new run from it, with "
                f"init_from"
            )
        self.lists |= recorded | {"train": found}
        for split, now in self._now.items():
            self._amend(split, step, now)

    def _amend(self, split: str, step: int, now: Kept) -> None:
        first, *later = self.lists[split]
        last = [first, *later][-1].kept
        if np.array_equal(last, now):
            return
        more, fewer = np.count_nonzero(last & ~now), np.count_nonzero(now & ~last)
        if not self._apply:
            raise UserError(
                f"{more} examples of the split {split!r} that this run uses are bad now or have no features, and "
                f"{fewer} that it leaves out are good; give --apply_bad_records to go on from step {step} with what "
                f"is good, or bring the data and bad.jsonl back"
            )
        self.lists[split] = [first, *(since for since in later if since.from_step < step), Since(step, now)]
        self._say(f"from step {step} on, {more} more and {fewer} fewer examples of the split {split!r} are left out")

    def kept(self, split: str, step: int) -> Kept:
        """Returns the examples that are used in a step."""
        return [since.kept for since in self.lists[split] if since.from_step <= step][-1]

    def text(self) -> str:
        """Returns the content of the file."""
        lines = {
            split: [{"from_step": step, "left_out": _ranges(~kept)} for step, kept in lists]
            for split, lists in self.lists.items()
        }
        return json.dumps(lines) + "\n"

    def write(self) -> None:
        """Records the lists, before the first batch. Raises UserError if that fails."""
        if self._path is None or not self._writes or self._read_text() == self.text():
            return
        make_directory(self._path.parent)
        with explained(FILE, self._path.parent):
            write_text(self._path, self.text())

    def _read_text(self) -> str:
        """Returns the content of the file on disk; "" if there is none."""
        if self._path is None or not self._path.exists():
            return ""
        with read_explained(str(self._path)):
            return self._path.read_text()

    def _read(self) -> dict[str, list[Since]]:
        """Returns the recorded lists by split; none for a run of an earlier version. Raises UserError for damage."""
        try:
            lists = json.loads(self._read_text() or "{}")
            return {
                split: [Since(int(line["from_step"]), _kept(line["left_out"], len(now))) for line in lists[split]]
                for split, now in self._now.items()
                if lists.get(split)
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self._path} is damaged: {error!r}; bring it back from a copy") from error


def _ranges(values: NDArray[np.bool_]) -> list[list[int]]:
    """Returns half-open ranges of the places that are True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], values, [False]]).astype(np.int8)))
    return edges.reshape(-1, 2).tolist()


def _kept(left_out: list[Any], count: int) -> Kept:
    kept = np.ones(count, np.bool_)
    for start, stop in left_out:
        kept[start:stop] = False
    return kept
