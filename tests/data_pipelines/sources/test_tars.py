"""Random archives: joined, damaged, with archives inside, and read in parts of any size."""

import io
import pathlib
import random
import tarfile
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from data_pipelines.record import Record
from data_pipelines.sources import Entry, Refused, find_parts, read_part, tars, webdataset

LARGEST = 8 << 10  # bytes of a file that is read, here
FORMATS = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)


class Planted(NamedTuple):
    source: bytes
    target: bytes
    instruction: str


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is small, so that parts of small archives begin far behind their beginning."""
    monkeypatch.setattr(tars, "MAX_FILE_BYTES", LARGEST)
    monkeypatch.setattr(tars, "_LONGEST_HEADER", 4 << 10)
    monkeypatch.setattr(tars, "LONGEST", (4 << 10) + LARGEST + 512)
    monkeypatch.setattr(tars, "_CHUNK", 3 << 10)
    monkeypatch.setattr(webdataset, "MARGIN", 8 << 10)


def _pack(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def _tar(draw: random.Random, names: Sequence[str], extras: bool) -> tuple[bytes, list[tuple[Planted, int, int]]]:
    """Returns a tar, and its samples with their first and last positions; some hold tars and headers of others."""
    data, samples = io.BytesIO(), []
    with tarfile.open(fileobj=data, mode="w", format=draw.choice(FORMATS)) as archive:
        for name in names:
            sides = [b"%d " % side + draw.randbytes(draw.choice((5, 500, 2000, LARGEST - 1100))) for side in (0, 1)]
            if extras and draw.random() < 0.2:
                sides[1] += bytes(-len(sides[1]) % 512) + _header(draw, f"{name}.txt")
            files = [("src.jpg", sides[0]), ("tgt.jpg", sides[1]), ("txt", f"edit {draw.random()}".encode())]
            if extras and draw.random() < 0.2:
                files.append(("extra.tar", _tar(draw, ["inner"], False)[0] + bytes(1024)))
            begin = archive.offset
            for suffix, content in files[: 3 + (len(files[-1][1]) <= LARGEST)]:
                _pack(archive, f"{name}.{suffix}", content)
            samples.append((Planted(sides[0], sides[1], files[2][1].decode()), begin, archive.offset))
    return data.getvalue()[: samples[-1][2]], samples


def _header(draw: random.Random, name: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = draw.choice((0, 700, LARGEST))
    return info.tobuf(tarfile.USTAR_FORMAT)


def _joined(draw: random.Random, extras: bool = False) -> tuple[bytes, list[tuple[Planted, int, int]]]:
    data, samples = b"", []
    for _ in range(draw.randint(1, 4)):
        prefix = draw.choice(("", "top/", "directory/" * 15, "ü"))
        names = [f"{prefix}{draw.choice(('', 'dotted.'))}{number}" for number in range(draw.randint(1, 6))]
        names = draw.choice((names, names, [f"{prefix}image"] * len(names)))
        own, placed = _tar(draw, names, extras)
        samples += [(sample, len(data) + begin, len(data) + end) for sample, begin, end in placed]
        data += own + bytes(512 * draw.choice((1, 2, 7, 40)))
    return data, samples


def _entries(directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch, part_bytes: int) -> list[Entry]:
    monkeypatch.setattr(webdataset, "PART_BYTES", part_bytes)
    return [entry for part in find_parts("varedit", [directory]) for entry in read_part(part)]


def _records(entries: Sequence[Entry]) -> list[tuple[str, Planted]]:
    return [
        (entry.id, Planted(entry.source, entry.target, entry.instructions[0]))
        for entry in entries
        if isinstance(entry, Record)
    ]


def _refused(entries: Sequence[Entry]) -> list[tuple[str, str, str]]:
    return sorted((entry.id, entry.reason, entry.detail) for entry in entries if isinstance(entry, Refused))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("names_bytes", [1 << 30, 30_000])
def test_joined_tars_come_back_whole_in_any_number_of_parts(
    seed: int, names_bytes: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webdataset, "NAMES_BYTES", names_bytes)
    draw = random.Random(seed)
    data, samples = _joined(draw, extras=True)
    (tmp_path / "a.tar").write_bytes(data)
    whole = _entries(tmp_path, monkeypatch, 1 << 30)
    assert [planted for _, planted in _records(whole)] == [planted for planted, _, _ in samples]
    assert _refused(whole) == [] and len({entry.id for entry in whole}) == len(samples)
    for part_bytes in (draw.randint(1, 20) * 1000, draw.randint(1, 300) * 512, len(data) - 1):
        parts = _entries(tmp_path, monkeypatch, part_bytes)
        assert len(find_parts("varedit", [tmp_path])) == -(-len(data) // part_bytes)
        assert parts == whole


def _damaged(draw: random.Random, data: bytes) -> tuple[bytes, int, int]:
    """Returns an archive with bytes that are zeroed, overwritten, missing or put between; and which these were."""
    start, size = draw.randrange(len(data)), draw.choice((1, 100, 512, 3000, 20_000))
    kind = draw.choice(("zeros", "noise", "missing", "more"))
    if kind == "zeros":
        start -= start % 512
        size += -size % 512
    end = min(len(data), start + size)
    if kind == "more":
        return data[:start] + draw.randbytes(size) + data[start:], start, start
    new = {"zeros": bytes(end - start), "noise": draw.randbytes(end - start), "missing": b""}[kind]
    return data[:start] + new + data[end:], start, end


# Beyond the first, seeds at which a faulty version failed.
@pytest.mark.parametrize("seed", [*range(8), 14, 18, 19, 23, 25, 1006, 1048, 1129, 1151, 1160])
def test_damage_costs_what_it_hits_and_is_told(
    seed: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    data, samples = _joined(draw)
    data, start, end = _damaged(draw, data)
    (tmp_path / "a.tar").write_bytes(data)
    whole = _entries(tmp_path, monkeypatch, 1 << 30)
    records = [planted for _, planted in _records(whole)]
    sound = [planted for planted, begin, stop in samples if not (begin <= end and start < stop)]
    assert [planted for planted in records if planted in sound] == sound
    for record in records:  # never one's source with another's target or words
        of = [[number for number, (planted, _, _) in enumerate(samples) if planted[i] == record[i]] for i in range(3)]
        assert len({number for numbers in of for number in numbers}) <= 1
    # One that lies between end marks and becomes zeros, or leaves nothing at all, leaves no trace.
    left = [planted for planted, begin, stop in samples if not (start <= begin and stop <= end)]
    assert len(records) >= len(left) or _refused(whole)
    for part_bytes in (draw.randint(1, 20) * 1000, draw.randint(1, 300) * 512):
        parts = _entries(tmp_path, monkeypatch, part_bytes)
        assert _records(parts) == _records(whole) and _refused(parts) == _refused(whole)


def _deceptive(draw: random.Random, chained: bool) -> bytes:
    """An archive whose files hold headers that lead from one to the next, or else whole tars."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for number in range(20):
            if chained:
                header = tarfile.TarInfo(f"{number}.none.jpg")
                header.size = 4096
                content = draw.randbytes(1024) + header.tobuf() + draw.randbytes(2560)
            else:
                names = [f"{number}inner{place}" for place in range(draw.randint(1, 2))]
                content = _tar(draw, names, False)[0][: LARGEST - 512]
                content += bytes(-len(content) % 512)
            _pack(archive, f"{number}.src.jpg", content)
    return data.getvalue()


@pytest.mark.parametrize("chained", [True, False])
def test_no_header_inside_of_a_file_is_taken_for_a_beginning(chained: bool) -> None:
    tar = tars.Tar(io.BytesIO(_deceptive(random.Random(0), chained)), {})
    true = {found.start for found in tar.walk(0, lambda _: False)}
    heads = list(tar.heads(0))
    assert len(heads) > 1.9 * len(true) > 30
    entries = [
        tar.entry(first, first + tars.LONGEST + 9 * 1024) for first in range(0, heads[-1] - 2 * tars.LONGEST, 512)
    ]
    assert true.issuperset(entry for entry in entries if entry is not None)
    assert all(entry is None for entry in entries) == chained  # nothing but the beginning tells


def test_a_shifted_archive_is_told_though_zeros_end_before_its_headers(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, samples = _tar(random.Random(1), ["0", "1"], False)
    (tmp_path / "a.tar").write_bytes(data[:600] + b"+" + data[600:] + bytes(1024))
    entries = _entries(tmp_path, monkeypatch, 1 << 30)
    assert [planted for _, planted in _records(entries)] == [samples[1][0]]
    assert ("a.tar", "damaged archive") in [refused[:2] for refused in _refused(entries)]


def test_names_for_all_members_behind_are_those_of_none(tmp_path: pathlib.Path) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"path": "x"}) as archive:
        _pack(archive, "0.src.jpg", b"0")
        _pack(archive, "1.src.jpg", b"1")
    tar = tars.Tar(data, {})
    assert [getattr(found.what, "name", None) for found in tar.walk(0, lambda _: True)][1] == "1.src.jpg"
