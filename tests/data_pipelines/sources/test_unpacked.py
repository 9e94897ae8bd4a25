import bz2
import gzip
import io
import lzma
import pathlib
import random
from collections.abc import Callable

import pytest
import zstandard

from data_pipelines.reasons import Reason
from data_pipelines.sources.archives import Damage, Member, members
from data_pipelines.sources.unpacked import Unpacked, is_compressed
from tests.data_pipelines.sources.layouts import tar

Compress = Callable[[bytes], bytes]
CODECS: dict[str, Compress] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
FIRST, SECOND = (random.Random(seed).randbytes(200_000) for seed in (1, 2))
SKIPPED = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"more"  # a frame of Zstandard without contents


def _read(data: bytes) -> tuple[bytes, dict[int, str]]:
    contents = Unpacked(io.BytesIO(data))
    return contents.read(1 << 30), contents.breaks


@pytest.mark.parametrize("ending", CODECS)
@pytest.mark.parametrize("zeros", [0, 4, 5000])
def test_joined_streams_with_zeros_between_and_behind_are_one(ending: str, zeros: int) -> None:
    pack = CODECS[ending]
    middle = SKIPPED if ending == ".zst" else b""
    data = pack(FIRST) + bytes(zeros) + middle + pack(SECOND) + pack(b"") + bytes(zeros)
    assert is_compressed(data[:16]) and _read(data) == (FIRST + SECOND, {})


@pytest.mark.parametrize("ending", CODECS)
def test_noise_between_streams_and_behind_them_is_told(ending: str) -> None:
    pack, noise = CODECS[ending], random.Random(3).randbytes(3000)
    contents, breaks = _read(pack(FIRST) + noise + pack(SECOND) + noise)
    assert contents == FIRST + SECOND
    assert breaks == dict.fromkeys((len(FIRST), len(FIRST + SECOND)), "other bytes than a compressed stream")


@pytest.mark.parametrize("ending", CODECS)
def test_a_damaged_stream_costs_its_rest_and_a_cut_one_too(ending: str) -> None:
    pack = CODECS[ending]
    for cut in (False, True):
        first = pack(FIRST)[: 100_000 if cut else None]
        first = first if cut else first[:100_000] + bytes(200) + first[100_200:]
        contents, breaks = _read(first + pack(SECOND))
        assert contents.endswith(SECOND) and len(breaks) == 1
        assert ending != ".gz" or contents.startswith(FIRST[:99_000])
    contents, breaks = _read(pack(FIRST)[:-20])
    assert list(breaks.values()) == ["ends inside of a compressed stream"] and FIRST.startswith(contents)


def test_what_is_read_again_is_the_same() -> None:
    file = Unpacked(io.BytesIO(gzip.compress(FIRST * 10)))
    draw = random.Random(0)
    for _ in range(50):
        place, size = draw.randrange(len(FIRST) * 10), draw.choice((1, 512, 100_000))
        file.seek(place)
        assert file.read(size) == (FIRST * 10)[place : place + size]
        assert file.tell() == min(place + size, len(FIRST) * 10)


@pytest.mark.parametrize("ending", CODECS)
def test_joined_archives_are_read_to_their_end(ending: str, tmp_path: pathlib.Path) -> None:
    pack = CODECS[ending]
    path = tmp_path / f"a.tar{ending}"
    files = [(f"{number}.jpg", random.Random(number).randbytes(50_000)) for number in range(6)]
    path.write_bytes(pack(tar(files[:2])) + bytes(100) + pack(tar(files[2:4])) + pack(tar(files[4:])) + b"noise, noise")
    found = list(members([str(path)]))
    assert found[:-1] == [Member(*file) for file in files]
    assert isinstance(found[-1], Damage) and found[-1].reason is Reason.ARCHIVE
    whole = pack(tar(files[2:4]))
    path.write_bytes(pack(tar(files[:2])) + whole[:70_000] + bytes(100) + whole[70_100:] + pack(tar(files[4:])))
    found = list(members([str(path)]))
    sound = [item for item in found if isinstance(item, Member)]
    assert [member for member in sound if member.name in ("0.jpg", "1.jpg", "4.jpg", "5.jpg")] == [
        Member(*file) for file in files[:2] + files[4:]
    ]
    assert len(sound) + len(found[len(sound) :]) == len(found) and len(sound) < len(found)
