"""A failure of the machine is never taken for damage of the data: nothing is marked bad, and one sentence says why."""

import errno
import functools
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from typing import Any

import pytest

from data_pipelines import bad_records, loader, shards
from data_pipelines.shards import Records, ShardWriter, shard_path, write_index
from tests.data_pipelines.test_records import COUNT, MODEL, SIZES, Lengths, _data, _record
from varedit_jax.errors import UserError


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    """A data set of a shard for each record."""
    for number in range(COUNT):
        with ShardWriter(shard_path(tmp_path / "set" / "train", "set", number, COUNT)) as writer:
            writer.write(_record(number, "set"), SIZES[number % len(SIZES)])
    write_index(tmp_path / "set")
    return tmp_path / "set"


def _epoch(directory: pathlib.Path, **fields: Any) -> list[int]:
    """Ids of one epoch, negative where an example stands in for another."""
    data = _data([str(directory)], **fields)
    batches = loader.training_batches(data, Lengths(), loader.open_records(data, "train", MODEL))
    return sorted(int(index) for _ in range(COUNT // 4) for index in next(batches)["example_ids"])


# The files open so far, and 20 more.
LIMITED = """
import os, pathlib, resource, sys
from tests.data_pipelines import test_machine_errors as tests
from data_pipelines import bad_records
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20,) * 2)
directory = pathlib.Path(sys.argv[1])
"""


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("work", "said"),
    [
        ("print(dict(bad_records.check_split(directory, 'train')))", "{}"),
        ("print(tests._epoch(directory, read_threads=0))", str(list(range(COUNT)))),
    ],
)
def test_more_shards_than_files_may_be_open_are_read_all_the_same(
    directory: pathlib.Path, work: str, said: str
) -> None:
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-c", LIMITED + work, str(directory)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, said), done.stderr


def test_few_readers_are_open_at_a_time(directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_reader", functools.lru_cache(3)(shards._reader.__wrapped__))
    records, before = Records(directory, "train"), len(os.listdir("/proc/self/fd"))
    for index in (*range(COUNT), *range(COUNT)):
        assert records[index] == _record(index, "set")
        assert len(os.listdir("/proc/self/fd")) <= before + 3


@pytest.fixture(params=[errno.EIO, errno.EACCES, errno.EMFILE, errno.ESTALE])
def failing(request: pytest.FixtureRequest, directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes reading fail for every shard but the first; returns the system's message."""
    words = os.strerror(request.param)
    reader = shards.ArrayRecordReader

    class Failing:
        def __init__(self, path: str, *arguments: Any, **options: Any) -> None:
            self._path, self._reader = path, reader(path, *arguments, **options)

        def read(self, rows: list[int]) -> list[bytes]:
            if "00000-of" not in self._path:
                raise RuntimeError(f"pread() failed: {words}; reading {self._path}; at byte 9")
            return self._reader.read(rows)

    monkeypatch.setattr(shards, "ArrayRecordReader", Failing)
    monkeypatch.setattr(shards, "_reader", functools.lru_cache(3)(shards._reader.__wrapped__))
    return words


def test_a_check_marks_nothing_where_the_machine_fails(directory: pathlib.Path, failing: str) -> None:
    with pytest.raises(UserError, match=f"cannot read .*set-00001-of-00060.array_record: {failing}; put that right"):
        bad_records.check_split(directory, "train")
    assert not (directory / "train" / bad_records.BAD).exists()
    assert bad_records.kept_records(Records(directory, "train")).all()


def test_training_ends_in_one_sentence_where_the_machine_fails(directory: pathlib.Path, failing: str) -> None:
    with pytest.raises(UserError, match=f"cannot read .*array_record: {failing}; put that right"):
        _epoch(directory)


def test_a_worker_hands_its_sentence_on(directory: pathlib.Path) -> None:
    """A socket takes the place of a shard: the system cannot open it, so nothing is known about the records."""
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{short}/s")
        os.replace(f"{short}/s", shard_path(directory / "train", "set", 20, COUNT))
        with pytest.raises(UserError, match="cannot read .*00020-of-.*: No such device or address; put that right"):
            _epoch(directory, workers=1)


@pytest.mark.subprocess
def test_processes_that_check_hand_their_sentence_on(directory: pathlib.Path) -> None:
    last = shard_path(directory / "train", "set", COUNT - 1, COUNT)
    content = last.read_bytes()
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{short}/s")
        os.replace(f"{short}/s", last)
        with pytest.raises(UserError, match="cannot read .*00059-of-.*: No such device or address; put that right"):
            bad_records.check_split(directory, "train", processes=2)
    last.unlink()
    last.write_bytes(content[:-1])
    assert bad_records.check_split(directory, "train", processes=2) == {"unreadable record": 1}


def test_a_check_resumes_after_a_failure(directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_records, "CHUNK", 20)
    read, seen = Records.__getitem__, []

    def fail(self: Records, index: int) -> Any:
        seen.append(index)
        if len(seen) == 50:
            raise UserError("the network is gone")
        return read(self, index)

    monkeypatch.setattr(Records, "__getitem__", fail)
    with pytest.raises(UserError, match="network"):
        bad_records.check_split(directory, "train")
    assert not bad_records.check_split(directory, "train")
    assert seen == [*range(50), *range(40, COUNT)]


def test_lists_and_indices_that_may_not_be_read_are_not_taken_for_absent_or_damaged(
    directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(directory, "train")
    bad_records.check_split(directory, "train")

    def denied(path: pathlib.Path, *_: Any, **__: Any) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(pathlib.Path, "read_bytes", denied)
    with pytest.raises(UserError, match="cannot read .*bad.jsonl: Permission denied"):
        bad_records.kept_records(records)
    monkeypatch.setattr(pathlib.Path, "read_text", denied)
    with pytest.raises(UserError, match="cannot read .*index.json: Permission denied"):
        Records(directory, "train")
