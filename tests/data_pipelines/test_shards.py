import dataclasses
import hashlib
import json
import pathlib
import pickle
import time
import uuid
from typing import BinaryIO

import numpy as np
import pytest

from data_pipelines.record import BrokenRecord, Record
from data_pipelines.shards import (
    Records,
    ShardWriter,
    is_written,
    read_index,
    shard_path,
    write_index,
)  # fmt: skip
from varedit_jax.errors import UserError
from varedit_jax.scales import aspect_templates

COUNTS = (3, 0, 2)  # records of each shard


def _record(number: int) -> Record:
    return Record(
        id=f"n{number}",
        dataset="odd" if number % 2 else "even",
        source=b"source%d" % number * 50,
        target=b"target%d" % number * 50,
        instructions=(f"edit {number} ü", "another wording"),
        kind="add" if number < 4 else "remove",
        turn=number % 3,
    )


def _write(directory: pathlib.Path) -> pathlib.Path:
    numbers = iter(range(sum(COUNTS)))
    for shard, count in enumerate(COUNTS):
        with ShardWriter(shard_path(directory / "train", "made", shard, len(COUNTS))) as writer:
            for _ in range(count):
                number = next(numbers)
                writer.write(_record(number), (100 + number, 50), (100, 50), (1, 1 + number))
    return directory


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    assert write_index(_write(tmp_path / "out")) == {"train": 5}
    return tmp_path / "out"


def _files(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_records_come_back_in_order_with_their_columns(directory: pathlib.Path) -> None:
    records = Records(directory, "train")
    assert [records[i] for i in range(len(records))] == [_record(number) for number in range(5)]
    assert [records.instruction(i) for i in range(5)] == [f"edit {number} ü" for number in range(5)]
    assert [records.id(i) for i in range(5)] == ["n0", "n1", "n2", "n3", "n4"]
    assert [records.dataset(i) for i in range(5)] == ["even", "odd", "even", "odd", "even"]
    columns = records.columns
    np.testing.assert_array_equal(columns.width, [100, 101, 102, 103, 104])
    np.testing.assert_array_equal(columns.height, [50] * 5)
    np.testing.assert_array_equal(columns.turn, [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(columns.target_width, [100] * 5)
    np.testing.assert_array_equal(columns.target_height, [50] * 5)
    np.testing.assert_array_equal(columns.source_turn, [1] * 5)
    np.testing.assert_array_equal(columns.target_turn, [1, 2, 3, 4, 5])
    assert [columns.kinds[code] for code in columns.kind] == ["add"] * 4 + ["remove"]
    assert {aspect_templates()[code] for code in columns.aspect} == {"0.5"}
    with pytest.raises(IndexError):
        records[5]


def test_index_counts_and_checksums_are_of_the_files(directory: pathlib.Path) -> None:
    split = read_index(directory)["splits"]["train"]
    assert [shard["records"] for shard in split["shards"]] == list(COUNTS)
    assert split["datasets"] == {"even": 3, "odd": 2} and split["records"] == 5
    assert split["pairs"] == {"same size": 1, "same aspect": 1, "other aspect": 3}  # 101 x 50 is within a pixel
    for shard in split["shards"]:
        data = (directory / "train" / shard["file"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_data_prepared_before_both_sizes_were_recorded_are_read(directory: pathlib.Path) -> None:
    for name in ("target_width", "target_height", "source_turn", "target_turn"):
        (directory / "train" / "columns" / f"{name}.npy").unlink()
    index = read_index(directory)
    del index["splits"]["train"]["pairs"]
    (directory / "index.json").write_text(json.dumps(index))
    records = Records(directory, "train")
    assert records[4] == _record(4)
    np.testing.assert_array_equal(records.columns.target_width, [100, 101, 102, 103, 104])
    np.testing.assert_array_equal(records.columns.target_turn, [1] * 5)


def test_same_records_are_the_same_bytes_and_nothing_else_is_left(
    directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    write_index(_write(tmp_path / "again"))
    files = _files(directory)
    assert files == _files(tmp_path / "again")
    assert not [name for name in files if "/." in name]


def test_another_process_opens_its_own_readers(directory: pathlib.Path) -> None:
    records = Records(directory, "train")
    assert records[4] == pickle.loads(pickle.dumps(records))[4]


def test_a_shard_that_fails_leaves_nothing_and_one_that_is_finished_says_so(tmp_path: pathlib.Path) -> None:
    path = shard_path(tmp_path / "train", "made", 0, 1)
    with pytest.raises(KeyError), ShardWriter(path) as writer:
        writer.write(_record(0), (10, 10))
        raise KeyError
    assert not _files(tmp_path) and not is_written(path)
    with ShardWriter(path) as writer:
        writer.write(_record(0), (10, 10))
    assert is_written(path)


def test_two_that_write_the_same_shard_leave_one_whole(tmp_path: pathlib.Path) -> None:
    path, alone = shard_path(tmp_path, "made", 0, 1), shard_path(tmp_path, "alone", 0, 1)
    with ShardWriter(path) as slow:
        slow.write(_record(0), (64, 48))
        for each in (path, alone):
            with ShardWriter(each) as fast:
                for number in range(2):
                    fast.write(_record(number), (64, 48))
        assert path.read_bytes() == alone.read_bytes()
        slow.write(_record(1), (64, 48))
    assert path.read_bytes() == alone.read_bytes() and not list(tmp_path.glob(".*.partial"))


def test_a_full_disk_is_told_to_the_user_and_leaves_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shard_path(tmp_path, "made", 0, 1)
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=0))
    (tmp_path / f".{path.name}.{uuid.UUID(int=0).hex}.partial").symlink_to("/dev/full")
    says = "writing .*made-00000-of-00001.array_record failed.*make room"
    with pytest.raises(UserError, match=says), ShardWriter(path) as writer:
        for number in range(5000):
            writer.write(_record(number), (10, 10))
    assert not is_written(path) and not list(tmp_path.iterdir())


def test_half_of_the_notes_do_not_make_a_shard_whole(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: BinaryIO, **notes: object) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    path = _write(tmp_path) / "train" / "made-00000-of-00003.array_record"
    path.with_name(f".{path.name}.npz").unlink()  # of a job that ended while it cleared up
    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(UserError, match="make room"), ShardWriter(path) as writer:
        writer.write(_record(0), (10, 10))
    assert path.exists() and not is_written(path)
    assert not [name for name in _files(tmp_path) if "partial" in name or "draft" in name]


def test_as_many_kinds_as_records_cost_no_more_than_few(tmp_path: pathlib.Path) -> None:
    count = 30_000
    began = time.process_time()
    with ShardWriter(shard_path(tmp_path / "train", "made", 0, 1)) as writer:
        for number in range(count):
            writer.write(dataclasses.replace(_record(0), id=str(number), kind=f"kind {number:05d}"), (10, 10))
    write_index(tmp_path)
    assert time.process_time() - began < 6  # more than twice as long if each were looked up in a list
    columns = Records(tmp_path, "train").columns
    assert len(columns.kinds) == count and columns.kinds[columns.kind[-1]] == "kind 29999"


def test_a_missing_shard_is_told_before_an_index_is_written(tmp_path: pathlib.Path) -> None:
    _write(tmp_path)
    shard_path(tmp_path / "train", "made", 1, 3).unlink()
    with pytest.raises(UserError, match="00001-of-00003.*missing or unfinished, as are 0 more"):
        write_index(tmp_path)
    assert not (tmp_path / "index.json").exists()


def test_damage_costs_the_records_it_is_in(directory: pathlib.Path) -> None:
    broken = shard_path(directory / "train", "made", 0, 3)
    data = bytearray(broken.read_bytes())
    at = data.index(b"source1source1")
    data[at : at + 4] = b"sour"[::-1]
    broken.write_bytes(data)
    shard_path(directory / "train", "made", 2, 3).unlink()
    records = Records(directory, "train")
    lost = []
    for i in range(5):
        try:
            assert records[i] == _record(i)
        except BrokenRecord as error:
            lost.append((records.id(i), "cannot be read" in str(error)))
    assert lost == [("n1", True), ("n3", True), ("n4", True)]


@pytest.mark.parametrize("text", ["", "{}", '{"version": 1, "splits": {"train": {}}}'])
def test_a_damaged_index_is_told_to_the_user(directory: pathlib.Path, text: str) -> None:
    (directory / "index.json").write_text(text)
    with pytest.raises(UserError, match="damaged.*prepare the data set again"):
        Records(directory, "train")


def test_unknown_directories_splits_and_versions_are_told_to_the_user(directory: pathlib.Path) -> None:
    with pytest.raises(UserError, match="no split 'test'; it has train"):
        Records(directory, "test")
    with pytest.raises(UserError, match="index.json is missing"):
        Records(directory / "train", "train")
    (directory / "index.json").write_text('{"version": 2, "splits": {}}')
    with pytest.raises(UserError, match="version 2"):
        Records(directory, "train")
