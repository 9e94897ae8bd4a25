import io
import pathlib
import string
import tarfile
import tracemalloc
from collections.abc import Iterator

import pytest

from data_pipelines.reasons import Reason
from data_pipelines.sources.archives import Damage, Member, TarIndex, Volume, group_parts, members
from data_pipelines.sources.entries import MAX_FILE_BYTES, Refused, make_entry
from data_pipelines.sources.webdataset import Sample, samples_from
from tests.data_pipelines.sources.layouts import split, tar
from varedit_jax.errors import UserError

FILES = [(f"top/{name}.jpg", name.encode() * 1000) for name in ("one", "two", "three")]


def _write(path: pathlib.Path, data: bytes) -> list[str]:
    path.write_bytes(data)
    return [str(path)]


def _names(found: Iterator[Member | Damage]) -> list[tuple[str, str]]:
    """Names with reasons; members must have the bytes that were packed."""
    result = []
    for member in found:
        if isinstance(member, Member):
            assert member.data == dict(FILES)[member.name]
        result.append((member.name, "" if isinstance(member, Member) else str(member.reason)))
    return result


WHOLE = [(name, "") for name, _ in FILES]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("parts", [1, 3, 40])
def test_split_archives_read_as_one_compressed_or_not(mode: str, parts: int, tmp_path: pathlib.Path) -> None:
    split(tmp_path / "a.tar", tar(FILES, mode), parts, ".split.{number}")
    [(name, files)] = group_parts([str(path) for path in tmp_path.iterdir()]).items()
    assert name == str(tmp_path / "a.tar") and len(files) == parts
    assert _names(members(files)) == WHOLE
    assert _names(members(files, wanted=lambda name: "two" in name)) == WHOLE[1:2]


def test_parts_are_in_order_of_numbers_or_letters_and_archives_apart(tmp_path: pathlib.Path) -> None:
    names = [
        *(f"b.tar.split.{number:03d}" for number in range(10, -1, -1)),
        "a.tar.gz.part-ab",
        "a.tar.gz.part-aa",
        "c.tar",
        "d.tgz",
        "notes.txt",
    ]
    names += [f"e.tar.gz.part{number}" for number in range(1, 12)]
    found = group_parts([str(tmp_path / name) for name in names])
    assert {pathlib.Path(name).name: [pathlib.Path(file).name for file in files] for name, files in found.items()} == {
        "a.tar.gz": ["a.tar.gz.part-aa", "a.tar.gz.part-ab"],
        "b.tar": [f"b.tar.split.{number:03d}" for number in range(11)],
        "c.tar": ["c.tar"],
        "d.tgz": ["d.tgz"],
        "e.tar.gz": [f"e.tar.gz.part{number}" for number in range(1, 12)],
    }


@pytest.mark.parametrize("missing", ["a.tar.gz.part-ba", "b.tar.split.1"])
def test_a_part_that_was_not_downloaded_is_told_to_the_user(missing: str, tmp_path: pathlib.Path) -> None:
    letters = [f"a.tar.gz.part-a{letter}" for letter in string.ascii_lowercase]
    names = [*letters, "a.tar.gz.part-ba", "a.tar.gz.part-bb"] + [f"b.tar.split.{i}" for i in range(3)]
    assert len(group_parts([str(tmp_path / name) for name in names])) == 2
    with pytest.raises(UserError, match="the one after .*(part-az|split.0) is missing; download it too"):
        group_parts([str(tmp_path / name) for name in names if name != missing])


@pytest.mark.parametrize("there", ["a.tar.gz.part-ab", "a.tar.gz.part002", "a.tar.split.010"])
def test_a_first_part_that_was_not_downloaded_is_told_to_the_user(there: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=f"begin with {there}; download those before it too"):
        group_parts([str(tmp_path / there)])


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("left", [0.0, 0.3, 0.6, 0.9])
def test_an_archive_that_is_cut_short_gives_what_is_whole_and_says_so(
    mode: str, left: float, tmp_path: pathlib.Path
) -> None:
    data = tar(FILES, mode)
    end = len(data) if mode == "w:gz" else data.rindex(b"three") + 5
    found = _names(members(_write(tmp_path / "a.tar", data[: int(end * left)])))
    assert found[:-1] == WHOLE[: len(found) - 1]
    assert len(found) <= 3 or (mode, left) == ("w:gz", 0.9)  # of which only the end mark is lost
    assert found[-1] == ("a.tar", "damaged archive")


def test_an_archive_cut_between_members_is_noticed(tmp_path: pathlib.Path) -> None:
    data = tar(FILES)
    files = _write(tmp_path / "a.tar", data[: data.index(b"top/three.jpg")])
    assert _names(members(files)) == [*WHOLE[:2], ("a.tar", "damaged archive")]
    with TarIndex(files) as index:
        assert [damage.reason for damage in index.damage] == ["damaged archive"]
        assert index.read("two.jpg") == "missing image" and index.read("top/two.jpg") == FILES[1][1]


def test_a_damaged_header_costs_its_member_and_says_where(tmp_path: pathlib.Path) -> None:
    data = bytearray(tar(FILES))
    data[data.index(b"top/two.jpg")] ^= 1
    found = list(members(_write(tmp_path / "a.tar", bytes(data))))
    assert _names(iter(found)) == [WHOLE[0], ("a.tar", "damaged archive"), WHOLE[2]]
    assert found[1] == Damage("a.tar", Reason.ARCHIVE, "bytes 3584 to 7168: no sound header")


def test_damage_inside_of_a_compressed_archive_is_noticed(tmp_path: pathlib.Path) -> None:
    data = bytearray(tar(FILES, "w:gz"))
    data[-6] ^= 255  # the checksum of all of it
    assert _names(members(_write(tmp_path / "a.tar", bytes(data))))[-1] == ("a.tar", "damaged archive")


def test_names_that_leave_the_directory_are_refused(tmp_path: pathlib.Path) -> None:
    evil = ["../a.jpg", "top/../../a.jpg", "/etc/passwd", "link.jpg", "C:/a.jpg", "..\\a.jpg"]
    files = _write(tmp_path / "a.tar", tar(FILES, evil=evil))
    assert _names(members(files)) == [(name, "unsafe name") for name in evil] + WHOLE
    with TarIndex(files) as index:
        assert [damage.name for damage in index.damage] == evil
        assert index.read("top/one.jpg") == FILES[0][1]
        assert index.read("../a.jpg") == "missing image"


def test_links_devices_and_bombs_are_refused_by_their_headers(tmp_path: pathlib.Path) -> None:
    data = io.BytesIO()
    for name, kind in (("hard", tarfile.LNKTYPE), ("device", tarfile.CHRTYPE), ("pipe", tarfile.FIFOTYPE)):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "one.jpg"
        data.write(info.tobuf())
    info = tarfile.TarInfo("bomb.jpg")
    info.size = MAX_FILE_BYTES + 1
    data.write(info.tobuf())  # and nothing of what it promises
    found = _names(members(_write(tmp_path / "a.tar", data.getvalue())))
    assert found == [*((name, "unsafe name") for name in ("hard", "device", "pipe")), ("bomb.jpg", "absurd size"), (
        "a.tar", "damaged archive")]  # fmt: skip


def test_an_index_reads_in_any_order_and_tells_names_that_stand_twice(tmp_path: pathlib.Path) -> None:
    twice = [*FILES, ("other/top/one.jpg", b"another")]
    split(tmp_path / "a.tar", tar(twice), 7, ".split.{number:03d}")
    with TarIndex(group_parts([str(path) for path in tmp_path.iterdir()])[str(tmp_path / "a.tar")]) as index:
        assert index.read("top/three.jpg") == FILES[2][1]
        assert index.read("anything/above/top/two.jpg") == FILES[1][1]
        assert index.read("top/one.jpg") == "ambiguous image"
        assert index.read("top/four.jpg") == "missing image"


def test_long_names_are_read(tmp_path: pathlib.Path) -> None:
    name = "/".join(["directory" * 10] * 5) + "/ü.jpg"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=form) as archive:
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
        assert list(members([str(tmp_path / "a.tar")])) == [Member(name, b"abc")]


def test_names_in_another_encoding_can_be_written_down(tmp_path: pathlib.Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for name in ("ü.jpg", "../ü.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    for item in members([str(tmp_path / "a.tar")]):
        entry = make_entry(id=item.name, dataset="d", source=b"s", target=b"t", instructions=["a"])
        refused = Refused(id=item.name, dataset="d", reason=Reason.UNSAFE)
        assert entry.id.encode() == refused.id.encode() in (b"../?.jpg", b"?.jpg")


def test_a_volume_is_its_files_one_after_the_other(tmp_path: pathlib.Path) -> None:
    for number, data in enumerate((b"abc", b"", b"defg")):
        (tmp_path / str(number)).write_bytes(data)
    with Volume([str(tmp_path / str(number)) for number in range(3)]) as volume:
        assert volume.read() == b"abcdefg" and volume.read(1) == b""
        assert volume.seek(-3, io.SEEK_END) == 4 and volume.read(9) == b"efg"
        assert volume.seek(2) == 2 and volume.read(1) == b"c"


def _triples(path: pathlib.Path, count: int) -> list[str]:
    """A tar of so many triples with 20 kB each, made as it is written."""
    image = bytes(10_000)
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            for name, data in (("src.jpg", image), ("tgt.jpg", image), ("txt", b"edit")):
                info = tarfile.TarInfo(f"{number:06d}.{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            archive.members.clear()  # it would remember them all
    return [str(path)]


def test_memory_does_not_grow_with_an_archive(tmp_path: pathlib.Path) -> None:
    peaks = []
    for count in (100, 1600):
        files = _triples(tmp_path / "a.tar", count)
        tracemalloc.start()
        assert sum(isinstance(item, Sample) for item in samples_from(files, ["src.jpg", "tgt.jpg", "txt"], 0)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000 < 1_000_000  # bytes; remembering the headers alone would take 5 MB
