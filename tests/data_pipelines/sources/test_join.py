import io
import pathlib
import random
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Sequence

import pytest

from data_pipelines.sources import join as join_module
from data_pipelines.sources.archives import Damage, Member
from data_pipelines.sources.join import Found, Lost, Stream, Wanted, join
from tests.data_pipelines.sources.layouts import tar
from varedit_jax.errors import UserError

SIZE = 1000  # bytes of an image


def _image(name: str) -> bytes:
    return (name.encode() * SIZE)[:SIZE]


def _archive(path: pathlib.Path, names: list[str]) -> Stream:
    path.write_bytes(tar([(name, _image(name)) for name in names], "w:gz"))
    return Stream([[str(path)]], lambda name: name)


def _streams(directory: pathlib.Path, count: int, shuffled: bool) -> list[Stream]:
    """Sources in order; targets in the same, or in disorder."""
    targets = [f"t{i}" for i in range(count)]
    if shuffled:
        random.Random(0).shuffle(targets)
    return [
        _archive(directory / "s.tar.gz", [f"s{i}" for i in range(count)]),
        _archive(directory / "t.tar.gz", targets),
    ]


def _pairs(count: int) -> list[Wanted]:
    """Each source with its target; every third source has also the next one's."""
    pairs = [Wanted(f"{i}", ((0, f"s{i}"), (1, f"t{i}"))) for i in range(count)]
    return pairs + [Wanted(f"{i} next", ((0, f"s{i}"), (1, f"t{i + 1}"))) for i in range(0, count - 1, 3)]


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(("memory", "disk"), [(1000 * SIZE, 0), (3 * SIZE, 0), (2 * SIZE, 4 * SIZE), (0, 3 * SIZE)])
def test_every_pair_comes_once_whatever_the_order_and_the_bounds(
    shuffled: bool, memory: int, disk: int, tmp_path: pathlib.Path
) -> None:
    pairs = _pairs(20)
    found = list(join(_streams(tmp_path, 20, shuffled), pairs, memory, disk))
    assert sorted(event.key for event in found if isinstance(event, Found)) == sorted(pair.key for pair in pairs)
    names = {pair.key: tuple(name for _, name in pair.images) for pair in pairs}
    assert all(isinstance(event, Found) for event in found)
    for event in found:
        assert isinstance(event, Found) and event.images == tuple(map(_image, names[event.key]))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the archives that were read, one for each time."""
    names: list[str] = []
    real = join_module.members

    def counted(files: Sequence[str], wanted: Callable[[str], bool]) -> Iterator[Member | Damage]:
        names.append(pathlib.Path(files[0]).name)
        return real(files, wanted)

    monkeypatch.setattr(join_module, "members", counted)
    return names


def test_archives_in_the_same_order_are_read_once_with_little_held(tmp_path: pathlib.Path, opened: list[str]) -> None:
    streams = _streams(tmp_path, 40, shuffled=False)
    found = list(join(streams, [Wanted(f"{i}", ((0, f"s{i}"), (1, f"t{i}"))) for i in range(40)], 2 * SIZE, 0))
    assert [event.key for event in found if isinstance(event, Found)] == [f"{i}" for i in range(40)]
    assert opened == ["s.tar.gz", "t.tar.gz"]


def test_an_archive_that_nothing_is_wanted_of_is_not_read(tmp_path: pathlib.Path, opened: list[str]) -> None:
    assert len(list(join(_streams(tmp_path, 3, shuffled=False), [Wanted("a", ((1, "t0"), (1, "t2")))]))) == 1
    assert opened == ["t.tar.gz"]


def test_all_sources_before_all_targets_in_one_archive_are_read_at_two_places(tmp_path: pathlib.Path) -> None:
    one = _archive(tmp_path / "a.tar.gz", [f"{side}{i}" for side in "st" for i in range(30)])
    pairs = [Wanted(f"{i}", ((0, f"s{i}"), (1, f"t{i}"))) for i in range(30)]
    found = list(join([one, one], pairs, 2 * SIZE, 0))
    assert [event.key for event in found if isinstance(event, Found)] == [f"{i}" for i in range(30)]


def test_what_is_in_no_archive_is_lost_by_name_and_holds_up_nothing(tmp_path: pathlib.Path) -> None:
    streams = _streams(tmp_path, 6, shuffled=True)
    pairs = [*_pairs(6), Wanted("half", ((0, "s1"), (1, "none"))), Wanted("none", ((0, "no"), (1, "nothing")))]
    found = list(join(streams, pairs, SIZE, 0))
    assert [event for event in found if isinstance(event, Lost)] == [
        Lost("half", ("none",)),
        Lost("none", ("no", "nothing")),
    ]
    assert sorted(event.key for event in found if isinstance(event, Found)) == sorted(pair.key for pair in _pairs(6))


@pytest.mark.parametrize("memory", [100 * SIZE, SIZE])
def test_a_damaged_archive_ends_with_its_pairs_lost(memory: int, tmp_path: pathlib.Path) -> None:
    streams = _streams(tmp_path, 12, shuffled=False)
    path = pathlib.Path(streams[1].archives[0][0])
    path.write_bytes(tar([(f"t{i}", _image(f"t{i}")) for i in range(12)])[: 8 * 1536 + 600])  # inside of t8
    pairs = [Wanted(f"{i}", ((0, f"s{i}"), (1, f"t{i}"))) for i in range(12)]
    found = list(join(streams, pairs, memory, 0))
    assert [event.name for event in found if isinstance(event, Damage)] == ["t.tar.gz"]
    assert sorted(event.key for event in found if isinstance(event, Found)) == [f"{i}" for i in range(8)]
    assert sorted(event.key for event in found if isinstance(event, Lost)) == ["10", "11", "8", "9"]


def test_images_that_several_pairs_share_are_let_go_after_the_last(tmp_path: pathlib.Path) -> None:
    stream = _archive(tmp_path / "a.tar.gz", ["p0", "p1", "p2", "p3"])
    turns = [Wanted(f"{i}", ((0, f"p{i}"), (0, f"p{i + 1}"))) for i in range(3)]
    found = list(join([stream], turns, SIZE, 0))  # room for one
    assert [event.key for event in found if isinstance(event, Found)] == ["0", "1", "2"]


def test_names_in_another_encoding_are_no_obstacle(tmp_path: pathlib.Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for name in ("ü.jpg", "plain.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    stream = Stream([[str(tmp_path / "a.tar")]], lambda name: name)
    pairs = [Wanted("1", ((0, "plain.jpg"), (0, "\ud83d.jpg")))]  # as JSON with half of a pair of surrogates has it
    assert list(join([stream], pairs)) == [Found("1", (b"abc", b"abc"))]  # both are ?.jpg


def test_nothing_is_left_in_the_temporary_directory(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = _streams(tmp_path, 8, shuffled=True)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    events = join(streams, _pairs(8), 0, 4 * SIZE)
    next(events)
    assert list((tmp_path / "scratch").iterdir())
    events.close()  # type: ignore[attr-defined]
    assert not list((tmp_path / "scratch").iterdir())


def test_a_full_disk_is_told_to_the_user(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipelines.sources.join._Held._file", lambda *_: pathlib.Path("/dev/full"))
    with pytest.raises(UserError, match="No space left on device; set TMPDIR to a directory with 2 GiB of room"):
        list(join(_streams(tmp_path, 3, shuffled=True), _pairs(3), 0, 2 * 2**30))


def test_memory_does_not_grow_with_the_number_of_pairs(tmp_path: pathlib.Path) -> None:
    peaks = []
    for count in (500, 2000):  # the smaller already fills all buffers
        streams = _streams(tmp_path, count, shuffled=False)
        pairs = (Wanted(f"{i}", ((0, f"s{i}"), (1, f"t{i}"))) for i in range(count))
        tracemalloc.start()
        assert sum(1 for _ in join(streams, pairs, 20 * SIZE, 0)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 150_000  # bytes: threads vary by half of it; names of the pairs alone take twice that


def test_what_waits_keeps_its_bounds(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    streams = _streams(tmp_path, 60, shuffled=True)
    most = 0
    for _ in join(streams, _pairs(60), 0, 10 * SIZE):
        waiting = [path for path in (tmp_path / "scratch").rglob("*") if path.name.isdecimal()]
        most = max(most, sum(path.stat().st_size for path in waiting))
    assert 5 * SIZE < most <= 10 * SIZE
