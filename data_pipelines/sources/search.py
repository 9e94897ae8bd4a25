"""A search of the inputs, and what it leaves out: files of other splits, and files that are not there.

Files given by name are taken as they are. For those below directories, a split is what Hugging Face's `datasets` takes
for one: a word such as `dev` between separators, in the name of a file or else of a directory above it.
"""

import collections
import contextlib
import contextvars
import dataclasses
import itertools
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence

from data_pipelines.reasons import Reason
from data_pipelines.sources.entries import Refused
from varedit_jax.errors import UserError

ALL = "all"
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLITS = {word: split for split, words in _WORDS.items() for word in words}
_WORD = re.compile(rf"(?:^|[-._ \d])({'|'.join(_SPLITS)})(?=[-._ \d]|$)", re.IGNORECASE)
_NUMBERED = re.compile(r"(?P<before>.*?)(?P<number>\d+)-of-(?P<total>\d+)(?P<behind>\D.*|)")
_SHOWN = 3  # entries of each reason in a sentence


def split_of(name: str) -> str | None:
    """Returns the split that a relative path names: train, validation or test; None if it names none."""
    for piece in reversed(name.split("/")):
        if found := _WORD.search(piece):
            return _SPLITS[found[1].lower()]
    return None


def check_splits(splits: Iterable[str]) -> frozenset[str]:
    """Returns the splits that names mean, empty for all. Raises UserError for another name."""
    names = [name.strip().lower() for name in splits]
    for name in names:
        if name != ALL and name not in _SPLITS:
            raise UserError(f"there is no split {name!r}; splits are {', '.join(_WORDS)} and {ALL}")
    return frozenset() if ALL in names or not names else frozenset(_SPLITS[name] for name in names)


@dataclasses.dataclass
class Search:
    """One search of the inputs of a data set."""

    dataset: str = ""
    splits: frozenset[str] = frozenset()  # of files to take; empty for all
    left_out: dict[str, Refused] = dataclasses.field(default_factory=dict)  # by path
    sound: set[str] = dataclasses.field(default_factory=set)  # files whose beginnings have been looked at

    def leave(self, path: str, name: str, reason: Reason, detail: str) -> None:
        """Lists what is left out."""
        self.left_out.setdefault(path, Refused(id=name, dataset=self.dataset, reason=reason, detail=detail))

    def is_of_splits(self, path: str, name: str) -> bool:
        """Returns True if a file is of one of the splits, or of none."""
        split = split_of(name)
        if not self.splits or split is None or split in self.splits:
            return True
        more = ",".join(each for each in _WORDS if each in (*self.splits, split))
        self.leave(path, name, Reason.SPLIT, f"{split}; --splits={more} takes it")
        return False

    def look_for_missing(self, names: Iterable[str]) -> None:
        """Lists what is missing of sets of files that are numbered, such as NAME-00003-of-00071.parquet."""
        sets: dict[tuple[str, ...], dict[int, str]] = collections.defaultdict(dict)
        for name in names:
            directory, file = posixpath.split(name)
            if found := _NUMBERED.fullmatch(file):
                key = (directory, found["before"], found["total"], found["behind"])
                sets[key][int(found["number"])] = found["number"]
        for (directory, before, total, behind), numbers in sets.items():
            count, width = int(total), len(next(iter(numbers.values())))
            first = int(0 not in numbers and count in numbers)
            missing = [number for number in range(first, first + count) if number not in numbers]
            if missing:
                name = posixpath.join(directory, f"{before}*-of-{total}{behind}")
                which = f"{len(missing)} of {count} files are missing: {_ranges(missing, width)}; download them"
                self.leave(name, name, Reason.NOT_THERE, which)


def _ranges(numbers: Sequence[int], width: int) -> str:
    """Returns sorted numbers as text: 00002-00004, 00007."""
    runs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ", ".join(
        f"{run[0]:0{width}d}" if len(run) == 1 else f"{run[0]:0{width}d}-{run[-1]:0{width}d}" for run in ends
    )


_CURRENT: contextvars.ContextVar[Search | None] = contextvars.ContextVar("search", default=None)


@contextlib.contextmanager
def searching(dataset: str, splits: frozenset[str]) -> Iterator[Search]:
    """Yields the search of which every `files.find` in the block is a part."""
    search = Search(dataset, splits)
    token = _CURRENT.set(search)
    try:
        yield search
    finally:
        _CURRENT.reset(token)


def current() -> Search:
    """Returns the search around; outside of one, a search of all splits."""
    return _CURRENT.get() or Search()


def sentences(left_out: Iterable[Refused]) -> list[str]:
    """Returns what is left out in sentences, one for each reason, with the first few names."""
    by_reason: dict[Reason, list[Refused]] = collections.defaultdict(list)
    for refused in left_out:
        by_reason[refused.reason].append(refused)
    found = []
    for reason, group in by_reason.items():
        shown = [f"{refused.id} ({refused.detail})" for refused in group[:_SHOWN]]
        more = [f"{len(group) - _SHOWN} more"] if len(group) > _SHOWN else []
        found.append(f"left out, {reason}: {', '.join([*shown, *more])}")
    return found
