"""Samples of tars: which members belong together, what they are called, and what is refused once."""

import os
import pathlib
import tarfile

import pytest

from data_pipelines.reasons import Reason
from data_pipelines.record import Record
from data_pipelines.sources import Entry, Refused, find_parts, read, webdataset
from data_pipelines.sources.archives import TarIndex
from data_pipelines.sources.files import is_clutter
from data_pipelines.sources.join import Found, Stream, Wanted, join
from tests.data_pipelines.sources.layouts import draw, tar

Files = list[tuple[str, bytes]]


def _sample(key: str, mark: str = "", kinds: str = "src tgt txt") -> Files:
    files = [(f"{key}.src.jpg", draw(f"s{key}{mark}")), (f"{key}.tgt.jpg", draw(f"t{key}{mark}")), (
        f"{key}.txt", f"edit {key}{mark}".encode())]  # fmt: skip
    return [file for file in files if file[0].split(".")[-2 if file[0].endswith("jpg") else -1] in kinds.split()]


def _read(directory: pathlib.Path, *archives: Files, source: str = "varedit") -> tuple[dict[str, str], list[Refused]]:
    """Returns the instructions of records by id, each with the images of its instruction, and what is refused."""
    (directory / "a.tar").write_bytes(b"".join(map(tar, archives)))
    entries: list[Entry] = list(read(source, [directory]))
    records = [entry for entry in entries if isinstance(entry, Record)]
    for record in records:
        name = record.instructions[0].removeprefix("edit ")
        assert (record.source, record.target) == (draw(f"s{name}"), draw(f"t{name}"))
    assert len({record.id for record in records}) == len(records)
    return {record.id: record.instructions[0] for record in records}, [
        entry for entry in entries if isinstance(entry, Refused)
    ]


def test_joined_tars_with_the_same_names_are_all_there_under_numbers(tmp_path: pathlib.Path) -> None:
    tars = [[file for number in range(15) for file in _sample(f"{number}", mark)] for mark in ("", " again")]
    records, refused = _read(tmp_path, *tars)
    assert records == {f"a.tar/{i}": f"edit {i}" for i in range(15)} | {
        f"a.tar/{i}#2": f"edit {i} again" for i in range(15)
    }
    assert refused == []


def test_a_number_is_never_the_name_of_another(tmp_path: pathlib.Path) -> None:
    records, refused = _read(
        tmp_path, [*_sample("a#2"), *_sample("a")], [*_sample("a", "!"), *_sample("a#2", "!")], _sample("a#3", "!")
    )
    assert len(records) == 5 and not refused


def test_x2edit_has_its_own_suffixes_and_dots_in_keys(tmp_path: pathlib.Path) -> None:
    files = [
        (f"{key}.{suffix}", draw(f"{side}{key}"))
        for key in ("12.1", "12.2", "v1.0.3")
        for suffix, side in (("1.0.jpg", "s"), ("1.1.jpg", "m"), ("2.jpg", "t"))
    ]
    files += [(f"{key}.txt", f"edit {key}".encode()) for key in ("12.1", "12.2", "v1.0.3")]
    files.sort(key=lambda file: [file[0].startswith(key) for key in ("v", "12.2", "12.1")])
    records, refused = _read(tmp_path, files, source="x2edit")
    assert set(records) == {"a.tar/12.1", "a.tar/12.2", "a.tar/v1.0.3"} and not refused


@pytest.mark.parametrize("at", range(3))
def test_files_of_other_suffixes_belong_to_the_sample_beside_them(at: int, tmp_path: pathlib.Path) -> None:
    files: Files = []
    for key in ("photo.0", "photo.1", "plain"):
        own = _sample(key)
        files += [*own[:at], (f"{key}.mask.png", draw("mask")), (f"{key}.a.cls", b"1"), *own[at:]]
    records, refused = _read(tmp_path, files)
    assert len(records) == 3 and refused == []


def test_a_file_twice_in_a_row_is_there_once(tmp_path: pathlib.Path) -> None:
    records, refused = _read(tmp_path, [file for file in _sample("a") + _sample("b") for _ in (0, 1)])
    assert records == {"a.tar/a": "edit a", "a.tar/b": "edit b"} and not refused
    records, refused = _read(tmp_path, _sample("a")[:1] + _sample("a", "!"))  # not when it differs
    assert records == {"a.tar/a#2": "edit a!"} and [entry.id for entry in refused] == ["a.tar/a"]


def test_samples_of_one_key_that_lack_a_file_take_none_of_their_neighbors(tmp_path: pathlib.Path) -> None:
    files = _sample("a", "1") + _sample("a", "2", "tgt txt") + _sample("a", "3") + _sample("a", "4", "src txt")
    records, refused = _read(tmp_path, files + _sample("a", "5"))
    assert list(records.values()) == ["edit a1", "edit a3", "edit a5"]
    assert sum(entry.reason is Reason.MISSING for entry in refused) == len(refused) == 2
    first, *rest = _sample("a", "1") + _sample("a", "2") + _sample("a", "3")
    data = bytearray(tar([first, *rest]))
    data[0] ^= 1  # how samples begin is not known then
    (tmp_path / "a.tar").write_bytes(data)
    texts = [entry.instructions for entry in read("varedit", [tmp_path]) if isinstance(entry, Record)]
    assert texts == [("edit a2",), ("edit a3",)]


def test_samples_whose_files_lie_apart_are_counted_once_with_the_way_out(tmp_path: pathlib.Path) -> None:
    samples = [_sample(f"{number}") for number in range(4)]
    sorted_by_kind = [sample[kind] for kind in range(3) for sample in samples]
    records, refused = _read(tmp_path, sorted_by_kind, _sample("whole"), sorted_by_kind)
    assert records == {"a.tar/whole": "edit whole"}
    assert len(refused) == 8 and {entry.reason for entry in refused} == {Reason.APART}
    assert [entry.id for entry in refused[:4]] == [f"a.tar/{number}" for number in range(4)]
    assert all("3 places" in entry.detail and "tar --sort=name" in entry.detail for entry in refused)
    _, [refusal] = _read(tmp_path, _sample("a", kinds="src tgt"))
    assert refusal.reason is Reason.INSTRUCTION


def test_what_systems_leave_in_archives_is_passed_over(tmp_path: pathlib.Path) -> None:
    clutter = ["._a.src.jpg", ".DS_Store", "__MACOSX/._a.txt", "x/._a.jpg", "x/Thumbs.db", "PaxHeaders.123/a.src.jpg"]
    assert all(map(is_clutter, clutter)) and not any(map(is_clutter, ["a._b", "x/.hidden", "DS_Store", "PaxHeadersX"]))
    files = [(name, b"\0\x05\x16\x07") for name in clutter]
    sample = _sample("a")
    records, refused = _read(tmp_path, [*files, sample[0], *files, *sample[1:], *files])
    assert records == {"a.tar/a": "edit a"} and not refused


def test_a_lost_file_is_not_called_apart(tmp_path: pathlib.Path) -> None:
    data = bytearray(tar(_sample("a") + _sample("b")))
    data[data.index(b"a.tgt.jpg")] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    refused = [entry for entry in read("varedit", [tmp_path]) if isinstance(entry, Refused)]
    assert [(entry.id, entry.reason) for entry in refused] == [
        ("a.tar", Reason.ARCHIVE), ("a.tar/a", Reason.MISSING)]  # fmt: skip


def test_an_index_and_a_join_go_on_behind_end_marks_too(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar([("x/1.jpg", b"one"), ("x/1.jpg", b"one")]) + tar([("x/2.jpg", b"two")]) + b"noise")
    with TarIndex([str(path)]) as index:
        assert [index.read(f"x/{number}.jpg") for number in (1, 2)] == [b"one", b"two"]
        assert [damage.reason for damage in index.damage] == [Reason.ARCHIVE]
    found = list(join([Stream([[str(path)]], lambda name: name)], [Wanted("", ((0, "x/1.jpg"), (0, "x/2.jpg")))]))
    assert Found("", (b"one", b"two")) in found and len(found) == 2


def test_a_huge_archive_has_parts_by_offsets_of_which_nothing_is_read(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar(_sample("a")))
    os.truncate(path, 200 * 10**9)  # all but the beginning takes no room on disk
    parts = find_parts("varedit", [tmp_path])
    assert len(parts) == 47 and [part.name for part in parts[:2]] == ["a.tar", f"a.tar@{4 << 30}"]
    assert parts[0].options == {"archive": "a.tar", "start": "0", "stop": f"{4 << 30}"}
    assert parts[-1].options == {"archive": "a.tar", "start": f"{46 * (4 << 30)}"}
    monkeypatch.setattr(webdataset, "PART_BYTES", 1000)
    path.write_bytes(tar(_sample("a"), "w:gz"))
    assert [part.options for part in find_parts("varedit", [tmp_path])] == [{}]  # reading begins at the beginning


def test_an_archive_of_the_oldest_format_is_one_part_and_goes_on_behind_damage(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(tar(_sample("a") + _sample("b") + _sample("c")))
    for place in range(0, len(data), 512):
        if data[place + 257 : place + 262] == b"ustar":
            data[place + 257 : place + 265] = bytes(8)
            info = bytes(data[place : place + 148]) + b" " * 8 + bytes(data[place + 156 : place + 512])
            data[place + 148 : place + 156] = b"%06o\0 " % sum(info)
    assert tarfile.TarInfo.frombuf(bytes(data[:512]), "utf-8", "strict").name == "a.src.jpg"
    data[data.index(b"b.src.jpg")] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    monkeypatch.setattr(webdataset, "PART_BYTES", 1000)
    [part] = find_parts("varedit", [tmp_path])
    assert part.options == {}
    found = [entry.id for entry in read("varedit", [tmp_path])]
    assert found == ["a.tar/a", "a.tar", "a.tar/c", "a.tar/b"]
