"""Features beside records: of every good one, by any number of processes, refused where other weights made them."""

import concurrent.futures
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipelines import features as features_lib
from data_pipelines import loader
from data_pipelines.features import Features, MadeBy, precompute
from data_pipelines.local_files import LocalFiles
from data_pipelines.record import Record
from data_pipelines.shards import ShardWriter, StoredSplit, shard_path, write_index
from tests.data_pipelines.images import encoded
from varedit_jax.config import DataConfig, EditorConfig
from varedit_jax.errors import UserError

MODEL = EditorConfig(pixel_budget="0.06M")
COUNT = 22
SIZES = ((32, 32), (64, 32))  # pixels, width and height
MADE_BY = MadeBy(tokenizer="w1", text="t1", text_tokens=6, sizes={"1.0": (256, 256), "0.5": (176, 352)}, resize="crop")


class Words:
    """A vocabulary that counts words."""

    def encode(self, instructions: Sequence[str], length: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        return np.zeros((len(instructions), length), np.int32), np.array(
            [len(x.split()) for x in instructions], np.int32
        )


def encode(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A cell for every 16 pixels: their mean, and a third that bfloat16 cannot hold."""
    assert len(images) == 4
    b, h, w, _ = images.shape
    cells = images.reshape(b, h // 16, 16, w // 16, 16, 3).mean((2, 4)).astype(np.float32)
    return np.concatenate([cells, np.full_like(cells[..., :1], 1 / 3)], axis=-1)


def encode_text(instructions: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Every token is its place and the number that ends the instruction."""
    lengths = np.array([len(text.split()) for text in instructions], np.int32)
    numbers = np.array([int(text.split()[-1]) for text in instructions], np.float32)
    tokens = np.stack(np.broadcast_arrays(np.arange(6, dtype=np.float32), numbers[:, None]), axis=-1)
    return tokens, lengths


@pytest.fixture
def source(tmp_path: pathlib.Path) -> loader.RecordSource:
    """22 records of two shapes in three shards; the eighth is broken."""
    for shard in range(3):
        with ShardWriter(shard_path(tmp_path / "train", "made", shard, 3)) as writer:
            for number in range(COUNT * shard // 3, COUNT * (shard + 1) // 3):
                size = SIZES[number % 2]
                image = b"broken" if number == 7 else encoded(size, "PNG", seed=number)
                text = " ".join(["word"] * (number % 3) + [str(number)])
                record = Record(id=str(number), dataset="d", source=image, target=image, instructions=(text,))
                writer.write(record, size)
    write_index(tmp_path)
    return loader.open_records(_data(tmp_path), "train", MODEL)


def _data(directory: pathlib.Path, **fields: Any) -> DataConfig:
    return DataConfig(
        name="records", mixture=((str(directory), 1.0),), aspects=("1.0", "0.5"), batch_size=3, text_tokens=6, **fields
    )


def test_what_is_read_is_what_was_made_whoever_made_it(source: loader.RecordSource) -> None:
    assert [precompute(source, MADE_BY, encode, encode_text, 4, process, 2) for process in (0, 1)] == [2, 1]
    assert precompute(source, MADE_BY, encode, encode_text, 4) == 0  # nothing is left to do
    features = Features(source, MADE_BY)
    assert len(features.kept) == COUNT and np.flatnonzero(~features.kept).tolist() == [7]
    for index in (0, 1, 8, 21):
        rows = features.rows([index])
        example = source[index]
        for side in ("source", "target"):
            expected = encode(np.stack([example[side]] * 4))[0]
            found = rows[f"{side}_features"][0]
            assert found.dtype == np.float32 and found.shape == expected.shape
            np.testing.assert_allclose(found, expected, rtol=2**-8)  # bfloat16
            assert not np.array_equal(found, expected)
        text = rows["text_features"][0].astype(np.float32)
        words = index % 3 + 1
        assert text.tolist() == [[float(t), float(index)] if t < words else [0.0, 0.0] for t in range(6)]


def test_the_loader_gives_features_of_good_examples_alone(source: loader.RecordSource) -> None:
    precompute(source, MADE_BY, encode, encode_text, 4)
    data = dataclasses.replace(source.data, features="precomputed", batch_size=1)
    batches = loader.training_batches(data, Words(), source, Features(source, MADE_BY))
    seen = []
    for _ in range(COUNT - 1):
        batch = next(batches)
        assert set(batch) == {
            "source_features", "target_features", "text_features", "text_ids", "text_length", "example_ids"
        }  # fmt: skip
        [index] = batch["example_ids"].tolist()
        assert batch["source_features"].shape == ((1, 16, 16, 4) if index % 2 == 0 else (1, 11, 22, 4))
        seen.append(index)
    assert sorted(seen) == [index for index in range(COUNT) if index != 7]


def test_features_of_other_weights_settings_and_records_are_refused(source: loader.RecordSource) -> None:
    with pytest.raises(UserError, match="no features of tokenizer weights w1 and text weights t1.*there are none"):
        Features(source, MADE_BY)
    precompute(source, MADE_BY, encode, encode_text, 4)
    for other in ({"tokenizer": "w2"}, {"text": "t2"}, {"text_tokens": 5}, {"resize": "pad"}):
        with pytest.raises(UserError, match=f"there are {MADE_BY.name}"):
            Features(source, dataclasses.replace(MADE_BY, **other))
    directory = source.parts[0].directory / "features" / MADE_BY.name
    manifest = directory / "features.json"
    written = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(written) | {"tokenizer": "w2"}))
    with pytest.raises(UserError, match="has tokenizer 'w2', not 'w1'"):
        Features(source, MADE_BY)
    manifest.write_text(written)
    (directory / "train" / "made-00001-of-00003.npy").unlink()
    with pytest.raises(UserError, match="made-00001-of-00003 are missing"):
        Features(source, MADE_BY)
    assert precompute(source, MADE_BY, encode, encode_text, 4) == 1
    index = source.parts[0].directory / "index.json"
    index.write_text(index.read_text() + "\n")
    source = loader.open_records(source.data, "train", MODEL)
    with pytest.raises(UserError, match="has index"):
        Features(source, MADE_BY)
    with pytest.raises(UserError, match="has index"):  # nor are some of these records put beside some of those
        precompute(source, MADE_BY, encode, encode_text, 4)


def test_an_interrupted_job_resumes_with_the_shards_that_are_missing(source: loader.RecordSource) -> None:
    calls: list[int] = []

    def failing(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        calls.append(1)
        if len(calls) == 6:  # two sides of two batches are a shard
            raise KeyboardInterrupt
        return encode(images)

    with pytest.raises(KeyboardInterrupt):
        precompute(source, MADE_BY, failing, encode_text, 4)
    with pytest.raises(UserError, match="are missing"):
        Features(source, MADE_BY)
    assert precompute(source, MADE_BY, encode, encode_text, 4) == 2
    assert len(Features(source, MADE_BY).kept) == COUNT


def test_features_written_before_they_had_a_type_have_the_same_name() -> None:
    assert MADE_BY.name == "32df5428f4dc7bb2"


class Generated(loader.ExampleSource):
    """Random images in memory, of which files lie in a directory."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.images = np.random.default_rng(0).integers(0, 256, (11, 2, 32, 32, 3), dtype=np.uint8)
        self.stored = (StoredSplit(LocalFiles(directory, "digest"), "test", (("test", 11),)),)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, target = self.images[index]
        return {"source": source, "target": target, "instruction": self.instruction(index)}

    def instruction(self, index: int) -> str:
        return f"number {index}"


def test_features_in_float32_are_exact(tmp_path: pathlib.Path) -> None:
    source, made_by = Generated(tmp_path), dataclasses.replace(MADE_BY, text="", dtype="float32")
    assert precompute(source, made_by, encode, None, 4) == 1
    rows = Features(source, made_by).rows(range(11))
    assert set(rows) == {"source_features", "target_features"}
    for side, name in enumerate(("source_features", "target_features")):
        exact = np.concatenate([encode(np.stack([image] * 4))[:1] for image in source.images[:, side]])
        np.testing.assert_array_equal(rows[name], exact)


def test_many_processes_may_begin_at_once(source: loader.RecordSource) -> None:
    for _ in range(20):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: features_lib._write_manifest(source.stored[0], MADE_BY), range(8)))
        [manifest] = (source.parts[0].directory / "features" / MADE_BY.name).iterdir()
        manifest.unlink()


def test_features_that_are_cut_short_are_told_at_once(source: loader.RecordSource) -> None:
    precompute(source, MADE_BY, encode, encode_text, 4)
    path = source.parts[0].directory / "features" / MADE_BY.name / "train" / "made-00001-of-00003.bfloat16"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"have \d+ bytes, not \d+; delete made-00001-of-00003.npy"):
        Features(source, MADE_BY)


def test_shards_whose_names_have_dots_keep_apart(tmp_path: pathlib.Path) -> None:
    for shard in range(2):
        with ShardWriter(shard_path(tmp_path / "train", "made.v2", shard, 2)) as writer:
            image = encoded(SIZES[0], "PNG", seed=shard)
            texts = (f"word {shard}",)
            writer.write(Record(id=str(shard), dataset="d", source=image, target=image, instructions=texts), SIZES[0])
    write_index(tmp_path)
    source = loader.open_records(_data(tmp_path), "train", MODEL)
    assert precompute(source, MADE_BY, encode, encode_text, 4) == 2
    rows = Features(source, MADE_BY).rows([0, 1])
    assert rows["text_features"][:, 0, 1].astype(np.float32).tolist() == [0.0, 1.0]


def test_features_that_are_no_numbers_end_the_job_and_leave_no_shard(source: loader.RecordSource) -> None:
    with pytest.raises(UserError, match="features of example 0 are not finite"):
        precompute(source, MADE_BY, lambda images: encode(images) * np.float32(np.nan), None, 4)
    assert not list(source.parts[0].directory.rglob("*.npy.*")) and not list(
        source.parts[0].directory.rglob("*.bfloat16")
    )
