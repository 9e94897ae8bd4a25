"""Batches of prepared records: the same whatever reads them, whole in spite of damage."""

import dataclasses
import io
import itertools
import pathlib
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_pipelines import bad_records, datasets, loader
from data_pipelines.record import Record
from data_pipelines.shards import Records, ShardWriter, shard_path, write_index
from tests.data_pipelines.images import DAMAGE
from varedit_jax.config import DataConfig, EditorConfig
from varedit_jax.errors import UserError
from varedit_jax.storage.jsonl import read_lines

SIZES = ((64, 64), (96, 64), (60, 100))  # pixels, width and height: of three templates
ASPECTS = ("1.0", "0.666", "1.75")
MODEL = EditorConfig(pixel_budget="0.06M")
COUNT = 60
ROOT = pathlib.Path(__file__).parents[2]


class Lengths:
    """A vocabulary whose one token is the number in an instruction."""

    def encode(self, instructions: Sequence[str], length: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        ids = np.zeros((len(instructions), length), np.int32)
        ids[:, 0] = [int(text.split()[-1]) for text in instructions]
        return ids, np.ones(len(instructions), np.int32)


def _image(number: int, side: int) -> bytes:
    """A ramp, so that mirroring shows, whose blue says which image it is."""
    width, height = SIZES[number % len(SIZES)]
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0] = np.linspace(0, 255, width)
    pixels[:, :, 2] = (number * 2 + side) % 256
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _record(number: int, dataset: str) -> Record:
    word = "right" if number % 4 == 0 else "red"
    return Record(
        id=f"{number:03d}",
        dataset=dataset,
        source=_image(number, 0),
        target=_image(number, 1),
        instructions=(f"make it {word} {number}",),
    )


def _write(directory: pathlib.Path, records: Sequence[Record], split: str = "train", shards: int = 3) -> None:
    for shard in range(shards):
        with ShardWriter(shard_path(directory / split, directory.name, shard, shards)) as writer:
            for record in records[len(records) * shard // shards : len(records) * (shard + 1) // shards]:
                writer.write(record, SIZES[int(record.id) % len(SIZES)])


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two prepared data sets."""
    root = tmp_path_factory.mktemp("prepared")
    for name, numbers in (("one", range(40)), ("two", range(40, COUNT))):
        records = [_record(number, name) for number in numbers]
        _write(root / name, records)
        _write(root / name, records[:9], "validation", 1)
        write_index(root / name)
    return str(root / "one"), str(root / "two")


def _data(directories: Sequence[str], **fields: Any) -> DataConfig:
    given: dict[str, Any] = {
        "name": "records",
        "mixture": tuple((directory, 1.0) for directory in directories),
        "aspects": ASPECTS,
        "batch_size": 4,
        "text_tokens": 2,
        "flip": True,
    }
    return DataConfig(**given | fields)


def _batches(data: DataConfig, process: int = 0, processes: int = 1, **options: Any) -> loader.Batches:
    source = loader.open_records(data, "train", MODEL)
    return loader.training_batches(data, Lengths(), source, process_index=process, process_count=processes, **options)


def _same(one: loader.HostBatch, other: loader.HostBatch) -> None:
    assert set(one) == set(other)
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name])


def _joined(parts: Sequence[loader.HostBatch]) -> loader.HostBatch:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.fixture(scope="module")
def whole(directories: tuple[str, str]) -> list[loader.HostBatch]:
    """The batches of two epochs, read by the process itself."""
    return list(itertools.islice(_batches(_data(directories, read_threads=0)), 2 * COUNT // 4))


def test_images_are_of_their_record_in_one_shape_a_batch(whole: list[loader.HostBatch]) -> None:
    shapes = Counter(batch["source"].shape for batch in whole)
    assert len(shapes) == 3 and (4, 256, 256, 3) in shapes
    for batch in whole:
        assert batch["source"].shape == batch["target"].shape and batch["source"].dtype == np.uint8
        numbers = batch["text_ids"][:, 0]
        assert len(set(numbers % 3)) == 1  # of one aspect
        np.testing.assert_array_equal(batch["example_ids"], numbers)  # as the first directory comes first
        for row, number in enumerate(numbers):
            assert (batch["source"][row, :, :, 2] == number * 2).all()
            assert (batch["target"][row, :, :, 2] == number * 2 + 1).all()
    ids = [index for batch in whole for index in batch["example_ids"].tolist()]
    assert sorted(ids) == sorted([*range(COUNT)] * 2)


def test_source_and_target_are_mirrored_together_and_only_where_it_may_be(whole: list[loader.HostBatch]) -> None:
    mirrored: dict[int, list[bool]] = {number: [] for number in range(COUNT)}
    for batch in whole:
        for row, number in enumerate(batch["text_ids"][:, 0].tolist()):
            source, target = batch["source"][row, 0, :, 0], batch["target"][row, 0, :, 0]
            np.testing.assert_array_equal(source, target)
            mirrored[number].append(bool(source[0] > source[-1]))
    assert not any(any(mirrored[number]) for number in range(0, COUNT, 4))  # they say "right"
    others = [flips for number, flips in mirrored.items() if number % 4]
    assert {tuple(flips) for flips in others} == {(a, b) for a in (False, True) for b in (False, True)}


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_have_the_rows_of_one(
    directories: tuple[str, str], whole: list[loader.HostBatch], processes: int
) -> None:
    parts = [_batches(_data(directories), process, processes) for process in range(processes)]
    for batch in whole[:20]:
        _same(batch, _joined([next(part) for part in parts]))


def test_workers_give_the_same_batches_and_each_goes_on_where_another_was(
    directories: tuple[str, str], whole: list[loader.HostBatch]
) -> None:
    four = _batches(_data(directories, workers=4, read_threads=1))
    for batch in whole[:7]:
        _same(batch, next(four))
    state = four.get_state()
    four.close()
    two = [_batches(_data(directories), process, 2) for process in range(2)]
    for part in two:
        part.set_state(state)
    for batch in whole[7:12]:
        _same(batch, _joined([next(part) for part in two]))
    assert two[0].get_state() == two[1].get_state()


_STOPPED = """
import sys
from absl import flags
from data_pipelines import loader
from varedit_jax.config import DataConfig, EditorConfig
from varedit_jax.text.vocabulary import Vocabulary

flags.FLAGS(sys.argv[:1])
data = DataConfig(name="records", mixture=((sys.argv[1], 1.0),), batch_size=4, workers=2, read_threads=1)
source = loader.open_records(data, "train", EditorConfig(pixel_budget="0.06M"))
batches = loader.training_batches(data, Vocabulary.load(), source)
shared = [type(next(batches)["source"]).__name__ for _ in range(3)]
batches.close()
print(*shared)
"""


@pytest.mark.subprocess
def test_workers_that_are_stopped_leave_no_shared_memory(directories: tuple[str, str]) -> None:
    command = [sys.executable, "-c", _STOPPED, directories[0]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["SharedMemoryArray"] * 3
    assert "leaked shared_memory" not in done.stderr  # Python's, of blocks that nobody removed


def test_kills_at_random_moments_change_nothing(directories: tuple[str, str], whole: list[loader.HostBatch]) -> None:
    draw = np.random.default_rng(0)
    state: dict[str, Any] | None = None
    step = 0
    while step < len(whole):
        threads, ahead = (int(number) for number in draw.integers(1, 9, 2))
        iterator = _batches(_data(directories, read_threads=threads, prefetch_batches=ahead))
        if state is not None:
            iterator.set_state(state)
        iterator.start_prefetch()
        for batch in whole[step : step + int(draw.integers(1, 9))]:
            _same(batch, next(iterator))
            step += 1
        state = iterator.get_state()
        iterator.close()  # whatever it had read ahead


def test_a_mixture_counts_passes_and_zero_leaves_out(directories: tuple[str, str]) -> None:
    data = _data(directories, mixture=((directories[0], 0.5), (directories[1], 3.0)), aspects=("1.0",), flip=False)
    batches = list(itertools.islice(_batches(data), 20))  # one epoch: 20 + 60 examples
    counts = Counter(int(index) >= 40 for batch in batches for index in batch["example_ids"])
    assert counts == {False: 20, True: 60}
    assert all(batch["source"].shape == (4, 256, 256, 3) for batch in batches)


def test_evaluation_is_of_fixed_examples_in_their_order(directories: tuple[str, str]) -> None:
    data = _data(directories)
    source = loader.open_records(data, "test", MODEL)
    assert len(source) == 18
    ids = [[b["example_ids"].tolist() for b in loader.evaluation_batches(data, Lengths(), source)] for _ in range(2)]
    assert ids[0] == ids[1] == [[1, 4, 7, 9], [2, 5, 8, 10], [0, 3, 6, 11]]


def test_few_held_out_examples_are_one_batch(directories: tuple[str, str], tmp_path: pathlib.Path) -> None:
    records = [_record(number, "small") for number in range(40)]
    _write(tmp_path / "small", records)
    _write(tmp_path / "small", records[:4], "validation", 1)  # 0 and 3 are of one aspect
    _write(tmp_path / "none", records)
    for name in ("small", "none"):
        write_index(tmp_path / name)
    data = _data([str(tmp_path / "none"), str(tmp_path / "small")], batch_size=5)
    source = loader.open_records(data, "test", MODEL)
    assert [records.directory.name for records in source.parts] == ["small"]
    for count, share in ((1, [slice(0, 5)]), (5, [slice(row, row + 1) for row in range(5)])):
        for process in range(count):
            [batch] = loader.evaluation_batches(data, Lengths(), source, None, process, count)
            assert batch["example_ids"].tolist() == [0, 3, 0, 3, 0][share[process]]
    with pytest.raises(UserError, match="larger --validation"):
        loader.open_records(_data([str(tmp_path / "none")]), "test", MODEL)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """240 records, some damaged in every way; and the reasons by id."""
    directory = tmp_path_factory.mktemp("damaged") / "set"
    records = [_record(number, "set") for number in range(240)]
    reasons = {}
    for place, (data, fault) in enumerate([*DAMAGE.values(), (b"", None)]):
        number = 7 + 17 * place
        fields = {"source" if place % 2 else "target": data} if fault else {"instructions": (" ",)}
        records[number] = dataclasses.replace(records[number], **fields)
        reasons[records[number].id] = str(fault or "empty instruction")
    _write(directory, records)
    write_index(directory)
    return str(directory), reasons


def test_damage_is_passed_over_by_all_processes_alike_and_written_down(
    damaged: tuple[str, dict[str, str]], tmp_path: pathlib.Path
) -> None:
    directory, reasons = damaged
    data = _data([directory], bad_share=0.2)
    parts = [_batches(data, process, 2, quarantine=tmp_path / f"{process}.jsonl") for process in range(2)]
    one = _batches(data, quarantine=tmp_path / "one.jsonl")
    ids = []
    for _ in range(240 // 4):  # an epoch, as 80 records of each aspect are whole batches
        batch = next(one)
        _same(batch, _joined([next(part) for part in parts]))
        ids += batch["example_ids"].tolist()
        shown = np.where(batch["example_ids"] < 0, ~batch["example_ids"], batch["example_ids"])
        np.testing.assert_array_equal(batch["source"][:, 0, 0, 2], shown * 2 % 256)
    bad = {int(name) for name in reasons}
    assert sorted(index for index in ids if index >= 0) == sorted(set(range(240)) - bad)
    assert sum(index < 0 for index in ids) == len(bad)
    lines = read_lines(tmp_path / "one.jsonl")
    assert {line["id"]: line["reason"] for line in lines} == reasons
    of_parts = [line["id"] for part in range(2) for line in read_lines(tmp_path / f"{part}.jsonl")]
    assert sorted(of_parts) == sorted(reasons)
    assert one.metrics() == {
        f"data/bad/{reason.replace(' ', '_')}": count for reason, count in sorted(Counter(reasons.values()).items())
    }


def test_a_batch_of_one_bad_example_does_not_end_a_run(damaged: tuple[str, dict[str, str]]) -> None:
    directory, reasons = damaged
    batches = _batches(_data([directory], batch_size=1, bad_share=0.2))
    found = [next(batches) for _ in range(240)]
    ids = [int(batch["example_ids"][0]) for batch in found]
    assert sorted(index for index in ids if index >= 0) == sorted(set(range(240)) - {int(name) for name in reasons})
    assert all((batch["source"][:, 0, 0, 2] == max(i, ~i) * 2 % 256).all() for i, batch in zip(ids, found, strict=True))
    assert sum(batches.metrics().values()) == len(reasons)
    restored = _batches(_data([directory], batch_size=1, bad_share=0.2))
    step = next(step for step, index in enumerate(ids) if index < 0)
    restored.set_state(batches.get_state() | {"next_step": step})
    _same(next(restored), found[step])


def test_shards_that_are_short_or_gone_cost_their_own_records(tmp_path: pathlib.Path) -> None:
    directory = tmp_path / "set"
    _write(directory, [_record(number, "set") for number in range(48)], shards=6)
    write_index(directory)
    short, gone = (shard_path(directory / "train", "set", shard, 6) for shard in (1, 4))
    short.write_bytes(short.read_bytes()[:-200])
    gone.unlink()
    bad = {*range(8, 16), *range(32, 40)}
    batches = _batches(_data([str(directory)], bad_share=0.5), quarantine=tmp_path / "bad.jsonl")
    ids = [index for batch in itertools.islice(batches, 48 // 4) for index in batch["example_ids"].tolist()]
    assert sorted(index for index in ids if index >= 0) == sorted(set(range(48)) - bad)
    lines = {int(line["id"]): line for line in read_lines(tmp_path / "bad.jsonl")}
    assert set(lines) == bad
    assert {line["reason"] for line in lines.values()} == {"unreadable record"}
    assert all(f"set-0000{1 if number < 16 else 4}-of-00006" in line["detail"] for number, line in lines.items())


def test_too_much_damage_ends_the_run_with_a_summary(damaged: tuple[str, dict[str, str]]) -> None:
    batches = _batches(_data([damaged[0]], bad_share=0.01))
    with pytest.raises(UserError, match=r"11 of 220 examples .*\d empty instruction.*data.bad_share=0.01.*check"):
        list(itertools.islice(batches, 100))


def test_samples_are_of_examples_that_can_be_shown(damaged: tuple[str, dict[str, str]]) -> None:
    directory, reasons = damaged
    source = loader.open_records(_data([directory]), "train", MODEL)
    shown = loader.shown_examples(source, 8)
    assert [int(example["instruction"].split()[-1]) for example in shown] == [0, 3, 6, 9, 12, 15, 18, 21]
    assert len(loader.shown_examples(source, 999)) == 80 - sum(int(name) % 3 == 0 for name in reasons)
    assert loader.shown_examples(loader.open_records(_data([directory], aspects=("1.75",)), "train", MODEL), 8) == []


def test_what_a_check_finds_is_never_met(damaged: tuple[str, dict[str, str]], tmp_path: pathlib.Path) -> None:
    directory, reasons = damaged
    before = _batches(_data([directory], batch_size=1)).get_state()
    assert bad_records.check_split(directory, "train") == Counter(reasons.values())
    batches = _batches(_data([directory], batch_size=1, bad_share=0.0))
    with pytest.raises(UserError, match=f"{len(reasons)} examples of the split 'train' .*--apply_bad_records"):
        batches.set_state(before)
    batches = _batches(_data([directory], batch_size=1, bad_share=0.0))
    good = sorted(set(range(240)) - {int(name) for name in reasons})
    for _ in range(2):
        assert sorted(int(next(batches)["example_ids"][0]) for _ in good) == good  # an epoch
    index = pathlib.Path(directory) / "index.json"
    index.write_text(index.read_text() + "\n")
    with pytest.raises(UserError, match="bad.jsonl is of data that were prepared anew"):
        _batches(_data([directory]))


def test_a_list_of_bad_records_holds_any_id(tmp_path: pathlib.Path) -> None:
    records = [dataclasses.replace(_record(number, "set"), id=f"{number}\u2028\x85") for number in range(3)]
    records[1] = dataclasses.replace(records[1], target=b"")
    _write(tmp_path, records)
    write_index(tmp_path)
    assert bad_records.check_split(tmp_path, "train") == Counter({"empty file": 1})
    assert bad_records.kept_records(Records(tmp_path, "train")).tolist() == [True, False, True]


def test_other_shapes_than_the_model_has_are_refused(directories: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="data.aspects has '1.1'; templates are"):
        loader.open_records(_data(directories, aspects=("1.1",)), "train", MODEL)
    own = dataclasses.replace(MODEL, pixel_budget="", grids=((1, 1), (2, 2)))
    with pytest.raises(UserError, match="3 templates, but a model with grids of its own"):
        loader.open_records(_data(directories), "train", own)
    with pytest.raises(UserError, match="no split 'dev'"):
        loader.open_records(_data(directories), "dev", MODEL)


def test_the_commonest_kinds_of_all_parts_are_numbered(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, over data sets that number them each in its own way; records without a kind have none."""
    monkeypatch.setattr(datasets, "_MOST_KINDS", 2)
    kinds = {"one": ["remove", "add", "", "remove", "style"], "two": ["add", "add", "rare", "", "zoom"]}
    for name, of_records in kinds.items():
        records = [dataclasses.replace(_record(i, name), kind=kind) for i, kind in enumerate(of_records)]
        _write(tmp_path / name, records)
        write_index(tmp_path / name)
    data = _data([str(tmp_path / name) for name in kinds])
    source = loader.open_records(data, "train", MODEL)
    assert source.kinds == ("add", "remove")
    expected = [{"add": 0, "remove": 1}.get(kind, -1) for name in kinds for kind in kinds[name]]
    assert [source.kind(index) for index in range(len(source))] == expected
