"""WebDataset tars: neighboring members with the same key, such as `0001.src.jpg` and `0001.txt`, are a sample.

A large tar without compression is read in parts, each of which finds its beginning by itself. A sample's id has the
name of its archive and its key. A key that stands there before gets a number, `0001#2`: published tars are tars joined,
each with the same names. What stands before is remembered for NAMES_BYTES; in those that follow the first, the name of
the archive has their number, `1.tar#1/0001`, so that no id depends on anything further away, or on the parts.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from data_pipelines.reasons import Reason
from data_pipelines.sources.archives import PATTERNS, Damage, Item, Member, bytes_to_share, group_parts, items_from
from data_pipelines.sources.entries import Entry, Part, Refused, SourceFormat
from data_pipelines.sources.files import find, relative_name
from varedit_jax.errors import UserError

PART_BYTES = 4 << 30  # of an archive, in one part
NAMES_BYTES = 4 << 30  # of an archive, within which names are told apart; ids depend on it
MARGIN = 16 << 20  # bytes, more than most samples have

_IMAGES = ("jpg", "jpeg", "png", "webp")


@dataclasses.dataclass
class Sample:
    """Neighboring members of an archive with the same key."""

    start: int  # position of its first member
    key: str
    is_certain: bool  # False if it may be the rest of a sample that begins before the bytes that were read
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)  # by what follows the key
    last: Member | None = None
    is_known: bool = False  # one of its files has a suffix of the format
    is_broken: bool = False  # it begins or ends at a damaged place

    def precedes(self, key: str) -> bool:
        """Returns True if its files, all of suffixes unknown to the format, belong to a sample of this key."""
        names = [f"{self.key}.{suffix}".lower() for suffix in self.files]
        return not self.is_known and all(name.startswith(f"{key.lower()}.") for name in names)


def tar_source(
    name: str, license: str, suffixes: Iterable[str], convert: Callable[[str, Mapping[str, bytes]], Entry]
) -> SourceFormat:
    """Returns the format of a data set of tars, whose samples are records.

    `suffixes` are what the format has behind keys. `convert` gets an id and a sample's files by suffix.
    """
    longest_first = sorted(suffixes, key=len, reverse=True)

    def parts(inputs: Sequence[str], options: Mapping[str, str]) -> list[Part]:
        archives = group_parts(find(inputs, *PATTERNS))
        if not archives:
            raise UserError(f"there is no *.tar under {', '.join(inputs)}; give the tars of {name}")
        return [
            part
            for archive, files in archives.items()
            for part in _parts_of(Part(source=name, name=relative_name(archive, inputs), files=tuple(files)))
        ]

    def read(part: Part) -> Iterator[Entry]:
        return _entries(part, longest_first, convert)

    return SourceFormat(name=name, license=license, parts=parts, read=read)


def images(side: str) -> tuple[str, ...]:
    """Returns the suffixes that an image may have: `side`.jpg and others."""
    return tuple(f"{side}.{kind}" for kind in _IMAGES)


def image(files: Mapping[str, bytes], side: str) -> bytes | None:
    """Returns the image `side`.jpg of a sample, or one with another suffix; None if there is none."""
    return next((files[suffix] for suffix in images(side) if suffix in files), None)


def _parts_of(whole: Part) -> list[Part]:
    """Returns the parts of an archive: samples that begin between two positions."""
    starts = range(0, bytes_to_share(whole.files), PART_BYTES)
    if len(starts) < 2:
        return [whole]
    parts = []
    for start in starts:
        options = {"archive": whole.name, "start": str(start), "stop": str(start + PART_BYTES)}
        if start == starts[-1]:
            del options["stop"]
        parts.append(dataclasses.replace(whole, name=f"{whole.name}@{start}" if start else whole.name, options=options))
    return parts


def _entries(
    part: Part, suffixes: Sequence[str], convert: Callable[[str, Mapping[str, bytes]], Entry]
) -> Iterator[Entry]:
    """Yields the entries of a part; refused samples behind the others of the same NAMES_BYTES."""
    archive = part.options.get("archive", part.name)
    start, stop = int(part.options.get("start", 0)), int(part.options.get("stop", sys.maxsize))
    last = -(-stop // NAMES_BYTES) * NAMES_BYTES
    found = samples_from(part.files, suffixes, start // NAMES_BYTES * NAMES_BYTES)
    found = itertools.takewhile(lambda item: item.start < last, found)
    for number, near in itertools.groupby(found, lambda item: item.start // NAMES_BYTES):
        for place, entry in _named(f"{archive}#{number}" if number else archive, part.source, near, convert):
            if start <= place < stop:
                yield entry


def _named(
    archive: str,
    dataset: str,
    found: Iterable[Sample | Item],
    convert: Callable[[str, Mapping[str, bytes]], Entry],
) -> Iterator[tuple[int, Entry]]:
    """Yields entries with their positions."""
    known: dict[str, int] = {}  # names, and how often a key stood there
    refused: dict[str, _Incomplete] = {}  # by key
    for item in found:
        if isinstance(item, Item):
            assert isinstance(item.what, Damage)
            name, reason, detail = item.what
            yield item.start, Refused(id=name, dataset=dataset, reason=reason, detail=detail)
            continue
        entry = convert(f"{archive}/{_number(item.key, known)}", item.files)
        if isinstance(entry, Refused):
            refused.setdefault(item.key, _Incomplete()).add(item, entry)
        else:
            yield item.start, entry
    counted = itertools.chain.from_iterable(incomplete.entries() for incomplete in refused.values())
    yield from sorted(counted, key=lambda pair: pair[0])


def _number(key: str, known: dict[str, int]) -> str:
    """Returns a key, with its number if it is not the first."""
    number = known.get(key, 0) + 1
    while number > 1 and f"{key}#{number}" in known:
        number += 1
    name = f"{key}#{number}" if number > 1 else key
    known[key] = number
    known.setdefault(name, 1)
    return name


class _Incomplete:
    """Refused samples of one key; those that lack what another has are one, whose files lie apart."""

    def __init__(self) -> None:
        self._first: list[tuple[Sample, Refused]] = []  # of each
        self._places: list[int] = []  # at how many the files of each are
        self._seen: dict[str, int] = {}  # how many have a file with a suffix

    def add(self, sample: Sample, entry: Refused) -> None:
        which = max((self._seen.get(suffix, 0) for suffix in sample.files), default=0)
        self._seen |= dict.fromkeys(sample.files, which + 1)
        sample.files.clear()
        if which == len(self._first):
            self._first.append((sample, entry))
            self._places.append(1)
        else:
            self._first[which][0].is_broken |= sample.is_broken
            self._places[which] += 1

    def entries(self) -> Iterator[tuple[int, Refused]]:
        for (sample, entry), places in zip(self._first, self._places, strict=True):
            if places > 1 and not sample.is_broken:
                detail = f"its files are at {places} places of the archive; pack them side by side: tar --sort=name"
                entry = dataclasses.replace(entry, reason=Reason.APART, detail=detail)
            yield sample.start, entry


def samples_from(files: Sequence[str], suffixes: Sequence[str], offset: int) -> Iterator[Sample | Item]:
    """Yields samples and damage that begin at or behind a position, as reading from the beginning yields them."""
    margin = MARGIN
    while True:
        found = samples(items_from(files, offset, margin), suffixes)
        is_certain, first = True, list[Sample | Item]()
        for item in found:
            first += [item] if item.start >= offset else []
            if isinstance(item, Sample):
                is_certain = item.is_certain and (is_certain or item.start < offset)
                if first:
                    break
        if is_certain:
            yield from itertools.chain(first, found)
            return
        margin *= 2


def samples(found: Iterable[Item], suffixes: Sequence[str]) -> Iterator[Sample | Item]:
    """Yields samples and damage, by position; one sample is in memory at a time.

    A sample ends where the key is another, at an end mark and at damage. Joined tars may have samples of the same key
    next to each other: one also ends before a file that it has already, or that the first of this key began with. The
    same file twice in a row is there once.
    """
    sample: Sample | None = None
    behind: list[Item] = []  # refused members between those of the sample
    openings: set[str] = set()  # roles of the files with which samples of this key begin, as far as they are known
    last_key: str | None = None  # of the sample before an end mark
    is_certain, is_broken = False, True  # what begins in the middle of an archive may begin behind damage
    for item in found:
        member = item.what
        if isinstance(member, Damage) and member.reason is not Reason.ARCHIVE:
            behind.append(item)
            continue
        key, suffix, is_known = _split(member.name, suffixes, sample) if isinstance(member, Member) else ("", "", False)
        role = _role(suffix)
        goes_on = False
        if sample and isinstance(member, Member) and sample.key == key:
            if sample.last == member:
                continue
            roles = [_role(suffix) for suffix in sample.files]
            goes_on = role not in roles and (role not in openings if openings else role > roles[-1])
        elif sample and is_known and sample.precedes(key):
            sample.key, goes_on = key, True
        elif isinstance(member, Member) and not is_broken and not (sample and sample.is_broken):
            # A sample certainly begins here, and what begins it is known. Behind damage, a name may be cut short. Zeros
            # in place of members look like an end mark.
            if key == last_key:
                openings = openings | {role}
            else:
                openings, is_certain = {role}, True
        if sample and not goes_on:
            sample.is_broken |= isinstance(member, Damage)
            yield sample
            last_key, sample = sample.key if member is None else None, None
        if not sample:
            yield from behind
            behind = []
        if isinstance(member, Member):
            sample = sample or Sample(item.start, key, is_certain, is_broken=is_broken)
            sample.last, sample.is_known = member, sample.is_known or is_known
            sample.files[suffix] = member.data
            last_key, is_broken = None, False
        elif isinstance(member, Damage):
            is_broken = True
            yield item
        elif not item.start:  # nothing is before it
            is_certain, is_broken = True, False
    if sample:
        yield sample
    yield from behind


def _role(suffix: str) -> str:
    """Returns a suffix without the kind of an image."""
    role, _, kind = suffix.rpartition(".")
    return role if kind in _IMAGES else suffix


def _split(name: str, suffixes: Sequence[str], sample: Sample | None) -> tuple[str, str, bool]:
    """Returns key and suffix of a member, and True if the format has the suffix.

    Other members belong to the sample before them if their names say so. Otherwise the key ends at the first dot.
    """
    directory, slash, file = name.rpartition("/")
    for suffix in suffixes:
        if file.lower().endswith(f".{suffix}"):
            key = f"{directory}{slash}{file[: -len(suffix) - 1].rstrip('.')}"  # some names have two dots
            return key, suffix, True
    if sample and name.startswith(f"{sample.key}."):
        return sample.key, name[len(sample.key) + 1 :].lower(), False
    stem, _, suffix = file.partition(".")
    return f"{directory}{slash}{stem}", suffix.lower(), False
