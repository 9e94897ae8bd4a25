"""A run that loses records goes on from a checkpoint without them, and every step before keeps its batch."""

import dataclasses
import itertools
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from data_pipelines import loader
from data_pipelines import shards as shards_lib
from data_pipelines.amendments import FILE, Amendments, Since
from data_pipelines.bad_records import check_split
from data_pipelines.features import Features, precompute
from data_pipelines.shards import shard_path, write_index
from tests.data_pipelines.test_features import MADE_BY, encode
from tests.data_pipelines.test_records import ASPECTS, MODEL, Lengths, _data, _joined, _record, _same, _write
from varedit_jax.errors import UserError

COUNT, SHARDS = 96, 8  # 12 records a shard
GONE = range(24, 36)
SIZES = {"1.0": (256, 256), "0.666": (208, 312), "1.75": (336, 192)}


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    """A data set of eight shards, and a split that is held out."""
    directory = tmp_path / "set"
    _write(directory, [_record(number, "set") for number in range(COUNT)], shards=SHARDS)
    _write(directory, [_record(number, "set") for number in range(30)], "validation", 3)
    write_index(directory)
    return directory


def _lose(directory: pathlib.Path, shard: int, split: str = "train", shards: int = SHARDS) -> None:
    shard_path(directory / split, directory.name, shard, shards).unlink()
    shards_lib._reader.cache_clear()  # another process has no open file of it


@dataclasses.dataclass
class Run:
    """A run in a work directory, whose every start is a new process."""

    directory: pathlib.Path
    workdir: pathlib.Path
    said: list[str] = dataclasses.field(default_factory=list)

    def __call__(
        self, state: dict[str, Any] | None = None, part: tuple[int, int] = (0, 1), apply: bool = False, **fields: Any
    ) -> tuple[loader.Batches, Amendments]:
        """Returns the batches from a state on, and the lists."""
        given = {"read_threads": 0, "bad_share": 1.0, "flip": False}
        data = _data([str(self.directory)], **given | fields)
        train, held_out = (loader.open_records(data, split, MODEL) for split in ("train", "test"))
        features = Features(train, _made_by()) if data.features == "precomputed" else None
        amendments = Amendments(
            {"train": loader.kept_examples(train, features), "test": loader.kept_examples(held_out, None)},
            self.workdir,
            apply=apply,
            writes=part[0] == 0,
            say=self.said.append,
        )
        batches = loader.training_batches(data, Lengths(), train, features, *part, amendments=amendments)
        if state is not None:
            batches.set_state(state)
        return batches, amendments

    def take(self, count: int, state: dict[str, Any] | None = None, **options: Any) -> tuple[list[Any], dict[str, Any]]:
        """Returns batches and the state behind them, of a process that then dies with what it had read ahead."""
        batches, _ = self(state, **options)
        found = list(itertools.islice(batches, count))
        state = batches.get_state()
        batches.close()
        return found, json.loads(json.dumps(state))  # as a checkpoint has it


@pytest.fixture
def run(directory: pathlib.Path, tmp_path: pathlib.Path) -> Run:
    return Run(directory, tmp_path / "run")


def _made_by() -> Any:
    return dataclasses.replace(MADE_BY, text="", sizes={name: SIZES[name] for name in ASPECTS})


def _ids(batches: list[Any]) -> list[int]:
    return [int(index) for batch in batches for index in batch["example_ids"]]


def _all_same(one: list[Any], other: list[Any]) -> None:
    for batch, expected in zip(one, other, strict=True):
        _same(batch, expected)


def test_a_run_that_lost_a_shard_goes_on_without_it(run: Run) -> None:
    whole, _ = run.take(24)
    before, state = run.take(7)
    _all_same(before, whole[:7])
    _lose(run.directory, 2)
    stand_ins, _ = run.take(17, state)  # stand-ins take their rows
    assert [index < 0 for index in _ids(stand_ins)] == [index in GONE for index in _ids(whole[7:])]
    assert check_split(run.directory, "train") == {"unreadable record": 12}
    with pytest.raises(UserError, match="12 examples of the split 'train' .*and 0 that.*--apply_bad_records.*step 7"):
        run(state)
    amended, after = run.take(30, state, apply=True)
    assert run.said == ["from step 7 on, 12 more and 0 fewer examples of the split 'train' are left out"]
    ids = _ids(amended)
    assert min(ids) >= 0 and not set(ids) & set(GONE)
    rest = set(range(COUNT)) - set(GONE) - set(_ids(before))
    steps = sum(sum(number % 3 == bucket for number in rest) // 4 for bucket in range(3))  # left of the epoch
    assert len(set(ids[: 4 * steps])) == 4 * steps and set(ids[: 4 * steps]) <= rest
    # Killed behind the amendment, before and after its next checkpoint: without the flag from then on, by any threads
    # (workers: test_lost_shard.py), in any number of processes.
    for options in ({}, {"apply": True}, {"read_threads": 3, "prefetch_batches": 3}):
        again, _ = run.take(30, state, **options)
        _all_same(again, amended)
    first, middle = run.take(11, state)
    second, end = run.take(19, middle)
    _all_same(first + second, amended)
    assert end == after
    parts = [run.take(30, state, part=(process, 4))[0] for process in range(4)]
    _all_same([_joined(rows) for rows in zip(*parts, strict=True)], amended)
    # From a checkpoint before the amendment: what was planned, with stand-ins, then what is left.
    from_early, _ = run.take(34, state | {"next_step": 3})
    early = zip(_ids(from_early[:4]), _ids(whole[3:7]), strict=True)
    assert all(index < 0 if planned in GONE else index == planned for index, planned in early)
    _all_same(from_early[4:], amended)


def test_later_amendments_follow_and_replace(run: Run) -> None:
    _, state = run.take(5)
    _lose(run.directory, 2)
    check_split(run.directory, "train")
    first, middle = run.take(6, state, apply=True)
    _lose(run.directory, 6)
    check_split(run.directory, "train")
    second, _ = run.take(20, middle, apply=True)
    assert not set(_ids(second)) & {*GONE, *range(72, 84)}
    record = json.loads((run.workdir / FILE).read_text())
    assert record["train"] == [
        {"from_step": 0, "left_out": []},
        {"from_step": 5, "left_out": [[24, 36]]},
        {"from_step": 11, "left_out": [[24, 36], [72, 84]]},
    ]
    from_first, _ = run.take(26, state)  # an older checkpoint: the second shard's examples have stand-ins until step 11
    _all_same(from_first[6:], second)
    assert [index for index in _ids(from_first[:6]) if index >= 0] == [
        index for index in _ids(first) if index not in range(72, 84)
    ]
    # From the older checkpoint with another list, what was applied later is void.
    _lose(run.directory, 0)
    check_split(run.directory, "train")
    third, third_state = run.take(20, state, apply=True)
    assert len(json.loads((run.workdir / FILE).read_text())["train"]) == 2
    _all_same(run.take(20, state)[0], third)
    with pytest.raises(UserError, match="left_out.json is not that of the run"):
        run(middle)
    run(third_state)


def test_records_that_come_back_are_shown_again(run: Run) -> None:
    path = shard_path(run.directory / "train", "set", 2, SHARDS)
    shard = path.read_bytes()
    path.write_bytes(shard[: len(shard) // 3])
    shards_lib._reader.cache_clear()
    assert check_split(run.directory, "train") == {"unreadable record": 12}
    _, state = run.take(5)  # a run that never had them
    path.write_bytes(shard)
    shards_lib._reader.cache_clear()
    check_split(run.directory, "train")
    with pytest.raises(UserError, match="0 examples of .* and 12 that it leaves out are good"):
        run(state)
    amended, _ = run.take(70, state, apply=True)
    assert set(_ids(amended)) >= set(GONE)
    _all_same(run.take(70, state)[0], amended)


def test_runs_of_earlier_versions_have_no_record(run: Run) -> None:
    data = _data([str(run.directory)], read_threads=0, flip=False)
    batches = loader.training_batches(data, Lengths(), loader.open_records(data, "train", MODEL))
    for _ in range(5):
        next(batches)
    state = batches.get_state()
    assert not run.workdir.exists()
    plain, _ = run.take(8, state)
    _all_same(plain, list(itertools.islice(batches, 8)))
    (run.workdir / FILE).unlink()
    _lose(run.directory, 2)
    check_split(run.directory, "train")
    amended, _ = run.take(8, state, apply=True)
    assert json.loads((run.workdir / FILE).read_text())["train"][1] == {"from_step": 5, "left_out": [[24, 36]]}
    _all_same(run.take(8, state)[0], amended)


def test_other_data_and_a_damaged_record_are_refused(run: Run) -> None:
    _, state = run.take(5)
    with pytest.raises(UserError, match="the data or the mixture are not those of the checkpoint"):
        run(state | {"plan": "0123456789abcdef"})
    with pytest.raises(UserError, match="the data or the mixture are not those of the checkpoint"):
        run(state, batch_size=8)
    (run.workdir / FILE).write_text('{"train": [{"from_step": 0}]}')
    with pytest.raises(UserError, match=f"{FILE} is damaged: KeyError.*bring it back"):
        run(state)


def test_processes_that_read_other_lists_say_so(run: Run) -> None:
    _, state = run.take(5)
    _lose(run.directory, 2)
    older = run(state, (1, 2))[0]  # as on a host whose file system shows the files of before
    check_split(run.directory, "train")
    newer, same = (run(state, (process, 2), apply=True)[0] for process in (0, 1))
    assert newer.digest() == same.digest() != older.digest()
    next(newer)
    state = newer.get_state()
    (run.workdir / FILE).write_text('{"train": [{"from_step": 0, "left_out": []}], "test": []}')
    with pytest.raises(UserError, match="left_out.json is not that of the run"):
        run(state, (1, 2))


def test_the_held_out_split_is_amended_likewise(run: Run) -> None:
    _, state = run.take(5)
    _lose(run.directory, 1, "validation", 3)
    assert check_split(run.directory, "validation") == {"unreadable record": 10}
    with pytest.raises(UserError, match="10 examples of the split 'test'"):
        run(state)
    _, amendments = run(state, apply=True)
    assert amendments.kept("test", 4).all() and not amendments.kept("test", 5)[10:20].any()
    data = _data([str(run.directory)], flip=False)
    source = loader.open_records(data, "test", MODEL)
    batches = loader.evaluation_batches(data, Lengths(), source, kept=amendments.kept("test", 5))
    ids = _ids(list(batches))
    assert len(ids) > 8 and min(ids) >= 0 and not set(ids) & set(range(10, 20))


def test_a_check_while_a_run_evaluates_changes_nothing(run: Run) -> None:
    data = _data([str(run.directory)], flip=False, bad_share=1.0)
    source = loader.open_records(data, "test", MODEL)
    before = _ids(list(loader.evaluation_batches(data, Lengths(), source)))
    _lose(run.directory, 1, "validation", 3)
    check_split(run.directory, "validation")
    after = _ids(list(loader.evaluation_batches(data, Lengths(), source)))
    assert [len(after), sum(index < 0 for index in after)] == [len(before), sum(10 <= index < 20 for index in before)]


def test_features_are_amended_with_the_records(run: Run) -> None:
    data = _data([str(run.directory)], flip=False)
    source = loader.open_records(data, "train", MODEL)
    precompute(source, _made_by(), encode, None, 4)
    whole, _ = run.take(20, features="precomputed")
    _, state = run.take(5, features="precomputed")
    _lose(run.directory, 2)
    _all_same(run.take(15, state, features="precomputed")[0], whole[5:])  # they do not need it
    # Features that are lost, too, cannot be made again, and so are no examples any longer.
    for file in source.parts[0].directory.glob("features/*/train/set-00002-*"):
        file.unlink()
    with pytest.raises(UserError, match="set-00002-of-00008 are missing"):
        run(state, features="precomputed")
    assert precompute(source, _made_by(), encode, None, 4) == 1
    with pytest.raises(UserError, match="12 examples .*have no features"):
        run(state, features="precomputed")
    amended, _ = run.take(20, state, features="precomputed", apply=True)
    assert not set(_ids(amended)) & set(GONE)
    _all_same(run.take(20, state, features="precomputed")[0], amended)


def test_features_that_are_lost_while_a_run_reads_are_one_sentence(run: Run) -> None:
    source = loader.open_records(_data([str(run.directory)], flip=False), "train", MODEL)
    precompute(source, _made_by(), encode, None, 4)
    features = Features(source, _made_by())
    for file in source.parts[0].directory.glob("features/*/train/set-00002-*.bfloat16"):
        file.unlink()
    with pytest.raises(UserError, match="set-00002-of-00008 have 0 bytes, not .*; delete set-00002-of-00008.npy"):
        features.rows([GONE[0]])


def test_lists_are_written_as_ranges(tmp_path: pathlib.Path) -> None:
    kept = np.ones(10, np.bool_)
    kept[[0, 1, 4, 8, 9]] = False
    amendments = Amendments({"train": kept}, tmp_path)
    amendments.write()
    record = json.loads((tmp_path / FILE).read_text())
    assert record == {"train": [{"from_step": 0, "left_out": [[0, 2], [4, 5], [8, 10]]}]}
    again = Amendments({"train": kept}, tmp_path)
    again.lists = {}
    again.resume(3, kept, lambda lists: True)
    assert [since.from_step for since in again.lists["train"]] == [0]
    assert isinstance(again.lists["train"][0], Since) and (again.kept("train", 9) == kept).all()
