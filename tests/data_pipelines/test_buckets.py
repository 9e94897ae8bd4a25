"""Prepared data in an object store: read through copies on a local disk, checked, browsed, and featured there."""

import concurrent.futures
import itertools
import pathlib
from typing import Any

import numpy as np
import pytest

from data_pipelines import bad_records, loader, local_files
from data_pipelines.browse import write_page
from data_pipelines.features import Features, precompute
from data_pipelines.record import BrokenRecord
from data_pipelines.shards import Records, write_index
from tests.data_pipelines.test_features import MADE_BY, encode
from tests.data_pipelines.test_records import MODEL, Lengths, _data, _record, _same, _write
from tests.emulators import gs_bucket, gs_server, s3_bucket, s3_server
from varedit_jax.errors import UserError
from varedit_jax.storage.files import upload
from varedit_jax.storage.paths import child_names, resolve

__all__ = ["gs_bucket", "gs_server", "s3_bucket", "s3_server"]

COUNT = 24


@pytest.fixture
def prepared(tmp_path: pathlib.Path) -> pathlib.Path:
    """A local data set; the eighth record is damaged."""
    records = [_record(number, "set") for number in range(COUNT)]
    records[7] = type(records[7])(**(vars(records[7]) | {"target": b"broken"}))
    _write(tmp_path / "set", records)
    write_index(tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture(params=["gs", "s3"])
def bucket(request: pytest.FixtureRequest, prepared: pathlib.Path) -> str:
    """The same in a bucket."""
    directory = f"{request.getfixturevalue(f'{request.param}_bucket')}/a directory/set"
    upload(prepared, resolve(directory))
    return directory


@pytest.fixture
def cache(tmp_path: pathlib.Path) -> str:
    return str(tmp_path / "cache")


def _batches(directory: str, **fields: Any) -> loader.Batches:
    data = _data([directory], bad_share=0.5, **fields)
    return loader.training_batches(data, Lengths(), loader.open_records(data, "train", MODEL))


def test_batches_and_lists_are_those_of_a_local_data_set(bucket: str, prepared: pathlib.Path, cache: str) -> None:
    for checked in (0, 1):
        local, remote = _batches(str(prepared)), _batches(bucket, cache_directory=cache, workers=checked)
        assert local.get_state() == remote.get_state()
        for one, other in itertools.islice(zip(local, remote, strict=True), 6):
            _same(one, other)
        if not checked:
            found = [bad_records.check_split(place, "train", cache_directory=cache) for place in (prepared, bucket)]
            assert found[0] == found[1] and found[0].total() == 1
    assert (resolve(bucket) / "train" / "bad.jsonl").read_bytes() == (prepared / "train" / "bad.jsonl").read_bytes()
    assert "set-00000-of-00003.array_record" in child_names(pathlib.Path(cache) / _digest(prepared) / "train")


def _digest(prepared: pathlib.Path) -> str:
    return Records(prepared, "train").stored.files.digest


def test_a_bucket_needs_a_directory_for_copies(bucket: str) -> None:
    with pytest.raises(UserError, match=r"--config.data.cache_directory, .* or mount the bucket .*gcsfuse"):
        Records(bucket, "train")
    with pytest.raises(UserError, match="the directory for copies is gs://b/c, but it has to be on a local disk"):
        Records(bucket, "train", "gs://b/c")


def test_each_file_comes_once_whoever_asks(bucket: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copies, copy = [], local_files.copy

    def counted(source: pathlib.Path, target: pathlib.Path) -> None:
        copies.append(str(source))
        copy(source, target)

    monkeypatch.setattr(local_files, "copy", counted)
    opened = [Records(bucket, "train", cache) for _ in range(2)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda number: opened[number % 2][number // 2].id, range(2 * COUNT)))
    assert ids == [f"{number // 2:03d}" for number in range(2 * COUNT)]
    assert len(copies) == len(set(copies)) and sum(".array_record" in name for name in copies) == 3


def test_shards_of_another_size_and_missing_ones_cost_their_own_records(bucket: str, cache: str) -> None:
    shards = [resolve(bucket) / "train" / f"set-0000{number}-of-00003.array_record" for number in range(2)]
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    shards[1].unlink()
    records = Records(bucket, "train", cache)
    for index in (0, 8):
        with pytest.raises(BrokenRecord, match=f"set-0000{index // 8}-of-00003.array_record cannot be read"):
            records[index]
    assert records[16].id == "016"


def test_a_copy_that_ends_early_is_no_damage(bucket: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records, copy = Records(bucket, "train", cache), local_files.copy
    monkeypatch.setattr(local_files, "copy", lambda source, target: target.write_bytes(b"half"))
    with pytest.raises(UserError, match="writing the copy of .* failed in .*: 4 of .* bytes came; .*run the same"):
        records[0]
    monkeypatch.setattr(local_files, "copy", copy)
    assert records[0].id == "000"


def test_features_and_pages_are_written_to_a_bucket(bucket: str, prepared: pathlib.Path, cache: str) -> None:
    sources = [
        loader.open_records(_data([place], cache_directory=cache), "train", MODEL) for place in (bucket, str(prepared))
    ]
    made = type(MADE_BY)(**(vars(MADE_BY) | {"text": ""}))
    rows = []
    for source in sources:
        assert precompute(source, made, encode, None, 4) == 3 and precompute(source, made, encode, None, 4) == 0
        rows.append(Features(source, made).rows([0, 3, 9]))
    _same(*rows)
    assert np.flatnonzero(~Features(sources[0], made).kept).tolist() == [7]
    assert write_page(bucket, f"{bucket}-page", side=64, cache_directory=cache) == COUNT - 1
    assert child_names(resolve(f"{bucket}-page")) == ["images", "index.html"]
