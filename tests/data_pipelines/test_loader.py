"""Batches: right examples, shuffled by seed and epoch, shared among processes, resumed exactly."""

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipelines import loader
from data_pipelines.features import Features
from varedit_jax.config import DataConfig
from varedit_jax.errors import UserError
from varedit_jax.text.vocabulary import Vocabulary

COUNT = 22
DATA = DataConfig(batch_size=4, text_tokens=6)


class Numbered(loader.ExampleSource):
    """Example i has images of level i and 100 + i, and an instruction that names it."""

    def __init__(self, count: int = COUNT) -> None:
        self.count = count
        self.decoded = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.decoded += 1
        source, target = (np.full((2, 3, 3), level, np.uint8) for level in (index, 100 + index))
        return {"source": source, "target": target, "instruction": self.instruction(index)}

    def instruction(self, index: int) -> str:
        return f"{index} " * (index % 3 + 1)


class Numbers:
    """A vocabulary of numbers: the id of n is n + 1, and 1000 ends a text."""

    def encode(self, instructions: Sequence[str], length: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        rows = [[int(word) + 1 for word in text.split()] + [1000] for text in instructions]
        ids = np.zeros((len(rows), length), np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        return ids, np.array([len(row) for row in rows], np.int32)


class Levels(Features):
    """Features of level i and 100 + i."""

    def __init__(self, count: int = COUNT) -> None:
        self.kept = np.ones(count, np.bool_)

    def rows(self, indices: Sequence[int]) -> dict[str, NDArray[Any]]:
        values = np.array(indices, np.float32)[:, None, None, None] * np.ones((2, 2, 3), np.float32)
        return {"source_features": values, "target_features": values + 100}


def indices(batch: loader.HostBatch) -> list[int]:
    return (batch["text_ids"][:, 0] - 1).tolist()


def take(count: int, data: DataConfig = DATA, **kwargs: Any) -> list[loader.HostBatch]:
    return list(itertools.islice(loader.training_batches(data, Numbers(), Numbered(), **kwargs), count))


@pytest.mark.parametrize("make", [loader.training_batches, loader.evaluation_batches])
def test_images_and_text_of_an_example_stay_together(make: Any) -> None:
    for batch in itertools.islice(make(DATA, Numbers(), Numbered()), 5):
        assert set(batch) == {"source", "target", "text_ids", "text_length", "example_ids"}
        assert batch["example_ids"].dtype == np.int64 and batch["example_ids"].tolist() == indices(batch)
        assert batch["source"].shape == (4, 2, 3, 3) and batch["source"].dtype == np.uint8
        assert batch["text_ids"].shape == (4, 6) and batch["text_ids"].dtype == np.int32
        assert batch["text_length"].shape == (4,) and batch["text_length"].dtype == np.int32
        for row, index in enumerate(indices(batch)):
            assert (batch["source"][row] == index).all() and (batch["target"][row] == 100 + index).all()
            words = index % 3 + 1
            assert batch["text_length"][row] == words + 1
            assert batch["text_ids"][row].tolist() == [index + 1] * words + [1000] + [0] * (5 - words)


@pytest.mark.parametrize("make", [loader.training_batches, loader.evaluation_batches])
def test_features_replace_images_which_are_then_not_decoded(make: Any) -> None:
    source = Numbered()
    with_images = list(itertools.islice(make(DATA, Numbers(), Numbered()), 5))
    with_features = list(itertools.islice(make(DATA, Numbers(), source, Levels()), 5))
    for plain, batch in zip(with_images, with_features, strict=True):
        assert set(batch) == {"source_features", "target_features", "text_ids", "text_length", "example_ids"}
        assert batch["source_features"].shape == (4, 2, 2, 3) and batch["source_features"].dtype == np.float32
        np.testing.assert_array_equal(batch["source_features"][:, 0, 0, 0], plain["source"][:, 0, 0, 0])
        np.testing.assert_array_equal(batch["target_features"][:, 0, 0, 0], plain["target"][:, 0, 0, 0])
        for name in ("text_ids", "text_length", "example_ids"):
            np.testing.assert_array_equal(batch[name], plain[name])
    assert source.decoded == 0


def test_each_epoch_holds_every_example_once_in_an_order_of_its_own() -> None:
    seen = [index for batch in take(11) for index in indices(batch)]  # 44 examples: two epochs of 22
    first, second = seen[:COUNT], seen[COUNT:]
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert first != second and first != sorted(first)


def test_the_seed_gives_the_order() -> None:
    def order(seed: int) -> list[list[int]]:
        return [indices(batch) for batch in take(8, dataclasses.replace(DATA, seed=seed))]

    assert order(0) == order(0) != order(1)


@pytest.mark.parametrize("threads", [0, 4])
def test_threads_do_not_change_the_order(threads: int) -> None:
    data = dataclasses.replace(DATA, read_threads=threads)
    assert [indices(batch) for batch in take(12, data)] == [indices(batch) for batch in take(12)]


def test_processes_share_the_batches_of_one() -> None:
    whole = take(12)
    parts = [take(12, process_index=process, process_count=2) for process in range(2)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert all(len(share["source"]) == 2 for share in shares)
        assert indices(batch) == indices(shares[0]) + indices(shares[1])


def test_evaluation_is_in_order_once_and_without_the_remainder() -> None:
    batches = list(loader.evaluation_batches(DATA, Numbers(), Numbered()))
    assert [indices(batch) for batch in batches] == [[4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3] for i in range(5)]
    shares = [list(loader.evaluation_batches(DATA, Numbers(), Numbered(), None, process, 4)) for process in range(4)]
    assert [len(share) for share in shares] == [5] * 4  # although 22 examples would give two processes 6
    assert sorted(i for share in shares for batch in share for i in indices(batch)) == list(range(20))


@pytest.mark.parametrize("features", [None, Levels()])
def test_a_restored_state_goes_on_exactly_across_an_epoch(features: Features | None) -> None:
    iterator = loader.training_batches(DATA, Numbers(), Numbered(), features)
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(12)]  # beyond the end of the second epoch
    for fresh in (iterator, loader.training_batches(DATA, Numbers(), Numbered(), features)):
        fresh.set_state(state)
        for batch in expected:
            restored = next(fresh)
            assert set(restored) == set(batch)
            for name, value in batch.items():
                np.testing.assert_array_equal(restored[name], value)


def test_grain_finds_every_checkpoint_exact() -> None:
    iterator = loader.evaluation_batches(DATA, Numbers(), Numbered())
    grain.experimental.assert_equal_output_after_checkpoint(iterator)


def test_long_instructions_are_cut_as_the_vocabulary_does() -> None:
    data = dataclasses.replace(DATA, text_tokens=3)
    batch = next(loader.evaluation_batches(data, Vocabulary(), Numbered()))
    ids, lengths = Vocabulary().encode([Numbered().instruction(i) for i in range(4)], 3)
    np.testing.assert_array_equal(batch["text_ids"], ids)
    np.testing.assert_array_equal(batch["text_length"], lengths)
    assert lengths.max() == 3


@pytest.mark.parametrize("features", [None, Levels()])
def test_texts_are_padded_to_the_first_bucket_that_holds_all_of_a_batch(features: Features | None) -> None:
    """Processes agree on it although each has some of the prompts; nothing is cut that was not cut before."""
    data = dataclasses.replace(DATA, text_tokens=9, text_buckets=(2, 3))  # a prompt has 2 to 4 tokens
    plain = take(40, dataclasses.replace(data, text_buckets=()), features=features)
    parts = [take(40, data, features=features, process_index=process, process_count=4) for process in range(4)]
    rooms = set()
    for whole, *shares in zip(plain, *parts, strict=True):
        assert whole["text_ids"].shape[1] == 9
        longest = int(whole["text_length"].max())
        room = next((bucket for bucket in (2, 3) if bucket >= longest), 9)
        rooms.add(room)
        assert {share["text_ids"].shape for share in shares} == {(1, room)}
        np.testing.assert_array_equal(
            np.concatenate([share["text_ids"] for share in shares]), whole["text_ids"][:, :room]
        )
        assert [int(share["text_length"][0]) for share in shares] == whole["text_length"].tolist()
    assert len(rooms) >= 2  # with 4 prompts of 3 lengths, few batches have only short ones
    assert next(loader.evaluation_batches(data, Numbers(), Numbered()))["text_ids"].shape == (4, 9)


def test_held_out_batches_number_the_kinds_of_edits() -> None:
    class Sorted(Numbered):
        kinds = ("even", "odd")

        def kind(self, index: int) -> int:
            return -1 if index == 3 else index % 2

    for batches in (loader.evaluation_batches(DATA, Numbers(), Sorted(), each) for each in (None, Levels())):
        batch = next(batches)
        assert batch["kinds"].dtype == np.int32 and batch["kinds"].tolist() == [0, 1, 0, -1]
    assert "kinds" not in next(loader.training_batches(DATA, Numbers(), Sorted()))


def test_impossible_requests_say_what_to_change() -> None:
    with pytest.raises(UserError, match="batch_size 4 does not divide over 3 processes"):
        take(1, process_index=0, process_count=3)
    with pytest.raises(UserError, match="batch_size is 23, but shapes has only 22 examples"):
        take(1, dataclasses.replace(DATA, batch_size=23))
    with pytest.raises(UserError, match="features of 21 examples, but 22 examples"):
        take(1, features=Levels(21))
    with pytest.raises(ValueError, match="process 2 of 2"):
        take(1, process_index=2, process_count=2)


def test_shapes_are_prepared_on_first_use_and_read_as_text_and_images(tmp_path: pathlib.Path) -> None:
    data = DataConfig(directory=str(tmp_path), train_examples=12, eval_examples=6, batch_size=4, text_tokens=24)
    train, test = loader.open_split(data, "train"), loader.open_split(data, "test")
    assert (len(train), len(test)) == (12, 6)
    record = train[5]
    assert record["source"].shape == (32, 32, 3) and record["source"].dtype == np.uint8
    assert isinstance(record["instruction"], str) and record["instruction"] == train.instruction(5)
    assert record["novelty"] == "train" and test[0]["novelty"] == "scene"
    batch = next(loader.training_batches(data, Vocabulary(), train))
    assert batch["source"].shape == (4, 32, 32, 3) and (batch["text_length"] > 2).all()


def test_unknown_splits_and_unwritable_directories_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="no split 'dev'; it has train, test"):
        loader.open_split(DataConfig(directory=str(tmp_path)), "dev")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot prepare shapes under .*file"):
        loader.open_split(DataConfig(directory=str(tmp_path / "file"), train_examples=4, eval_examples=4), "train")
