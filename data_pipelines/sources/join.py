"""Joins annotations with images of compressed archives, which can only be read sequentially.

All archives are read in parallel. An image that arrives before its partner is held: in memory up to a bound, then in
temporary files up to another bound; beyond that it is dropped, and its pairs are joined in another pass over the
archives. If archives have a similar order (sources and targets packed from directories of the same names), few images
are held and one pass suffices; in the worst case, a pass yields pairs of at least the held bytes. Annotations are in a
temporary SQLite file, so memory does not grow with their number.
"""

import collections
import contextlib
import itertools
import json
import pathlib
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from data_pipelines.reasons import Reason
from data_pipelines.record import clean_text
from data_pipelines.sources.archives import Damage, Member, members
from data_pipelines.sources.entries import Entry, Refused, make_entry
from varedit_jax.errors import UserError

MEMORY_BYTES = 256 * 2**20
DISK_BYTES = 16 * 2**30


class Stream(NamedTuple):
    """Archives read one after the other, in parallel to other streams."""

    archives: Sequence[Sequence[str]]  # parts of each
    # Maps the name of a member to that in annotations; None to skip the member.
    rename: Callable[[str], str | None]


class Wanted(NamedTuple):
    """Images to join."""

    key: str  # returned with them
    images: tuple[tuple[int, str], ...]  # (stream, name)


class Found(NamedTuple):
    """All images of a Wanted."""

    key: str
    images: tuple[bytes, ...]  # in the order of Wanted.images


class Lost(NamedTuple):
    """A Wanted with images that are not in the archives."""

    key: str
    names: tuple[str, ...]  # of the missing images


class _Held:
    """Images waiting for their partners."""

    def __init__(self, directory: pathlib.Path, memory_bytes: int, disk_bytes: int) -> None:
        self._directory, self._limits = directory, (memory_bytes, disk_bytes)
        self._used = [0, 0]  # bytes in memory, on disk
        # Bytes, or the number of a file; size; number of pairs that still need the image.
        self._images: dict[tuple[int, str], tuple[bytes | int, int, int]] = {}
        self._files = itertools.count()
        self.by_stream: collections.Counter[int] = collections.Counter()  # bytes

    def __contains__(self, image: tuple[int, str]) -> bool:
        return image in self._images

    def add(self, image: tuple[int, str], data: bytes, awaited: int) -> bool:
        """Keeps an image; returns False if there is no room."""
        place = next((i for i in (0, 1) if self._used[i] + len(data) <= self._limits[i]), None)
        if place is None:
            return False
        kept: bytes | int = data
        if place == 1:
            kept = next(self._files)
            self._file(kept).write_bytes(data)
        self._used[place] += len(data)
        self._images[image] = (kept, len(data), awaited)
        self.by_stream[image[0]] += len(data)
        return True

    def _file(self, number: int) -> pathlib.Path:
        return self._directory / str(number)

    def read(self, image: tuple[int, str]) -> bytes:
        kept, _, _ = self._images[image]
        return self._file(kept).read_bytes() if isinstance(kept, int) else kept

    def release(self, image: tuple[int, str]) -> None:
        """Drops an image when the last pair that needs it has it."""
        kept, size, awaited = self._images.pop(image)
        if awaited > 1:
            self._images[image] = (kept, size, awaited - 1)
            return
        self._used[int(isinstance(kept, int))] -= size
        self.by_stream[image[0]] -= size
        if isinstance(kept, int):
            self._file(kept).unlink()


def join(
    streams: Sequence[Stream],
    wanted: Iterable[Wanted],
    memory_bytes: int = MEMORY_BYTES,
    disk_bytes: int = DISK_BYTES,
) -> Iterator[Found | Lost | Damage]:
    """Yields joined images in the order in which archives complete them; then the lost ones.

    Keys are unique; several Wanted may share an image. Every Wanted is yielded exactly once, as Found or Lost. The
    temporary directory is below TMPDIR. Raises UserError if it has no room.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="join-", ignore_cleanup_errors=True) as name:
            yield from _join(pathlib.Path(name), streams, wanted, memory_bytes, disk_bytes)
    except (sqlite3.Error, OSError) as error:  # of the temporary directory, as archives raise ReadError
        raise UserError(
            f"what waits for its partners cannot be kept in {tempfile.gettempdir()}: "
            f"{getattr(error, 'strerror', None) or error}; set TMPDIR to a directory with "
            f"{disk_bytes / 2**30:.3g} GiB of room"
        ) from error


def _join(
    directory: pathlib.Path, streams: Sequence[Stream], wanted: Iterable[Wanted], memory_bytes: int, disk_bytes: int
) -> Iterator[Found | Lost | Damage]:
    with contextlib.closing(sqlite3.connect(directory / "wanted.sqlite", isolation_level=None)) as database:
        _store(database, wanted)
        yield from _read_through(database, streams, _Held(directory, memory_bytes, disk_bytes), first=True)
        yield from _lost(database, _UNSEEN)
        found = True
        while found and database.execute("SELECT 1 FROM pair LIMIT 1").fetchone():
            found = False
            for event in _read_through(database, streams, _Held(directory, memory_bytes, disk_bytes), first=False):
                found = True
                yield event
        yield from _lost(database, _ALL)  # seen, but lost to damage of the archive


def joined(
    dataset: str, license: str, streams: Sequence[Stream], annotations: Callable[[], Iterator[Wanted | Refused]]
) -> Iterator[Entry]:
    """Yields records of pairs (source, target), whose keys are the other fields of a record as JSON, and refusals.

    `annotations` is called twice, so that pairs need not be kept in memory.
    """
    yield from (item for item in annotations() if isinstance(item, Refused))
    for event in join(streams, (item for item in annotations() if isinstance(item, Wanted))):
        if isinstance(event, Damage):
            yield Refused(id=event.name, dataset=dataset, reason=event.reason, detail=event.detail)
            continue
        about = json.loads(event.key)
        if isinstance(event, Lost):
            yield Refused(id=about["id"], dataset=dataset, reason=Reason.MISSING, detail=", ".join(event.names))
        else:
            source, target = event.images
            yield make_entry(dataset=dataset, source=source, target=target, license=license, **about)


def _store(database: sqlite3.Connection, wanted: Iterable[Wanted]) -> None:
    database.executescript(
        """
        PRAGMA journal_mode = OFF;
        PRAGMA synchronous = OFF;
        CREATE TABLE pair (id INTEGER PRIMARY KEY, key TEXT NOT NULL);
        CREATE TABLE need (pair INTEGER NOT NULL, place INTEGER NOT NULL, stream INTEGER NOT NULL, name TEXT NOT NULL,
                           PRIMARY KEY (pair, place)) WITHOUT ROWID;
        CREATE TABLE seen (stream INTEGER NOT NULL, name TEXT NOT NULL, PRIMARY KEY (stream, name)) WITHOUT ROWID;
        """
    )
    database.execute("BEGIN")  # never committed, since nothing outlives the join
    for number, pair in enumerate(wanted):
        database.execute("INSERT INTO pair (id, key) VALUES (?, ?)", (number, pair.key))
        database.executemany(
            "INSERT INTO need VALUES (?, ?, ?, ?)",
            [(number, place, stream, clean_text(name)) for place, (stream, name) in enumerate(pair.images)],
        )
    database.execute("CREATE INDEX need_of ON need (stream, name)")


def _read_through(
    database: sqlite3.Connection, streams: Sequence[Stream], held: _Held, first: bool
) -> Iterator[Found | Damage]:
    """Makes a pass over all archives; pairs of an image that found no room are dropped in this pass."""
    dropped: set[int] = set()  # pairs

    def pairs_of(image: tuple[int, str]) -> list[int]:
        """Returns the pairs that still need an image, and marks it as seen."""
        query = "SELECT pair FROM need WHERE stream = ? AND name = ? ORDER BY pair"
        pairs = [pair for (pair,) in database.execute(query, image)]
        if pairs and first:
            database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", image)
        return [pair for pair in pairs if pair not in dropped]

    def known_as(number: int, name: str) -> tuple[int, str] | None:
        renamed = streams[number].rename(name)
        return None if renamed is None else (number, clean_text(renamed))

    def reader(number: int, stream: Stream) -> Iterator[Member | Damage]:
        def is_wanted(name: str) -> bool:
            image = known_as(number, name)
            return image is not None and image not in held and bool(pairs_of(image))

        return itertools.chain.from_iterable(members(files, is_wanted) for files in stream.archives)

    needed = [number for (number,) in database.execute("SELECT DISTINCT stream FROM need ORDER BY stream")]
    readers = {number: reader(number, streams[number]) for number in needed}
    while readers:
        # The stream with the fewest held bytes is behind; reading it keeps archives of similar order in step.
        number = min(readers, key=lambda number: (held.by_stream[number], number))
        member = next(readers[number], None)
        if member is None:
            del readers[number]
        elif isinstance(member, Damage):
            if first:
                yield member
        elif image := known_as(number, member.name):
            yield from _arrived(database, image, member.data, pairs_of(image), held, dropped)


def _arrived(
    database: sqlite3.Connection,
    image: tuple[int, str],
    data: bytes,
    pairs: list[int],
    held: _Held,
    dropped: set[int],
) -> Iterator[Found]:
    """Yields the pairs that an image completes, and holds it for the others."""
    waiting = []
    for pair in pairs:
        needs = database.execute("SELECT stream, name FROM need WHERE pair = ? ORDER BY place", (pair,)).fetchall()
        others = {need for need in needs if need != image}
        if all(other in held for other in others):
            (key,) = database.execute("SELECT key FROM pair WHERE id = ?", (pair,)).fetchone()
            found = tuple(data if need == image else held.read(need) for need in needs)
            _forget(database, pair)
            for other in others:
                held.release(other)
            yield Found(key, found)
        else:
            waiting.append((pair, others))
    if waiting and not held.add(image, data, len(waiting)):
        for pair, others in waiting:
            dropped.add(pair)
            for other in others:
                if other in held:
                    held.release(other)


def _forget(database: sqlite3.Connection, pair: int) -> None:
    database.execute("DELETE FROM need WHERE pair = ?", (pair,))
    database.execute("DELETE FROM pair WHERE id = ?", (pair,))


_ALL = "FROM need JOIN pair ON pair.id = need.pair"
_UNSEEN = f"""{_ALL} LEFT JOIN seen ON seen.stream = need.stream AND seen.name = need.name WHERE seen.name IS NULL"""


def _lost(database: sqlite3.Connection, which: str) -> Iterator[Lost]:
    """Yields the pairs of needs that the clause `which` selects, with their names, and deletes them."""
    rows = database.execute(f"SELECT pair.id, pair.key, need.name {which} ORDER BY need.pair, need.place")
    for (_, key), group in itertools.groupby(rows, key=lambda row: row[:2]):
        yield Lost(key, tuple(name for _, _, name in group))
    database.execute(f"CREATE TEMP TABLE gone AS SELECT DISTINCT need.pair {which}")
    database.execute("DELETE FROM need WHERE pair IN (SELECT pair FROM gone)")
    database.execute("DELETE FROM pair WHERE id IN (SELECT pair FROM gone)")
    database.execute("DROP TABLE gone")
