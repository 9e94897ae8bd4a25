import dataclasses
import hashlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
from PIL import Image

from data_pipelines.geometry import SIZES
from data_pipelines.preparation import pipeline, scan, staged
from data_pipelines.preparation.pipeline import prepare
from data_pipelines.preparation.settings import Settings
from data_pipelines.reasons import Reason
from data_pipelines.record import Record
from data_pipelines.shards import Records, read_index
from data_pipelines.sources import files as input_files
from tests.data_pipelines.preparation.corpus import SETTINGS, write_corpus
from tests.data_pipelines.sources import layouts
from tests.data_pipelines.sources.test_machine_errors import Disk
from varedit_jax.errors import UserError
from varedit_jax.storage.jsonl import read_lines

OPTIONS = {"dataset": "made"}


class Corpus:
    """A made download, and the output of prepare."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.inputs, self.stay, self.left = write_corpus(directory / "in")
        self.output = directory / "out"
        self.prepare(self.output, workers=2)

    def prepare(self, output: pathlib.Path, settings: Settings = SETTINGS, **options: int) -> None:
        prepare("manifest", list(map(str, self.inputs)), output, settings, source_options=OPTIONS, **options)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("corpus"))


def _all(directory: pathlib.Path) -> Iterator[tuple[str, Record]]:
    for split in read_index(directory)["splits"]:
        records = Records(directory, split)
        yield from ((split, records[index]) for index in range(len(records)))


def _files(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_each_record_stays_or_leaves_for_its_reason(corpus: Corpus) -> None:
    left = {line["id"]: line["reason"] for line in read_lines(corpus.output / "report" / "quarantine.jsonl")}
    stay = {record.id for _, record in _all(corpus.output)}
    assert stay.isdisjoint(left) and stay | left.keys() == corpus.stay | corpus.left.keys()
    copies = {id: left.pop(id) for id in left.keys() - corpus.left.keys()}
    assert left == corpus.left
    # Of each pair of copies one stays: that of the lower key.
    assert set(copies) <= {"good-3", "exact-copy", "good-4", "near-copy"}
    assert sorted(copies.values()) == sorted([Reason.EXACT, Reason.NEAR])


def test_a_duplicate_names_the_record_that_it_is_like(corpus: Corpus) -> None:
    lines = {line["reason"]: line for line in read_lines(corpus.output / "report" / "quarantine.jsonl")}
    pair = {lines[Reason.EXACT]["id"], lines[Reason.EXACT]["detail"].removeprefix("of made/")}
    assert pair == {"good-3", "exact-copy"}
    assert {lines[Reason.NEAR]["id"], lines[Reason.NEAR]["detail"].removeprefix("of made/")} == {"good-4", "near-copy"}


def test_records_are_as_they_were_published_and_know_their_image(corpus: Corpus) -> None:
    directory = corpus.inputs[0].parent
    published = {path.read_bytes() for path in directory.glob("*.jpg")}
    records = [record for _, record in _all(corpus.output)]
    assert all(record.source in published and record.target in published for record in records)
    assert all(len(record.original) == 64 for record in records)


def test_sizes_and_turns_of_both_sides_are_recorded(corpus: Corpus) -> None:
    found = {}
    for split in ("train", "validation"):
        records = Records(corpus.output, split)
        names = (*SIZES, "source_turn", "target_turn")
        rows = zip(*(getattr(records.columns, name).tolist() for name in names), strict=True)
        found |= {records.id(number): row for number, row in enumerate(rows)}
    assert found["good-0"] == (64, 48, 64, 48, 1, 1)
    assert found["square"] == (64, 48, 60, 60, 1, 1)
    assert found["by-exif"] == (64, 48, 64, 48, 1, 8)
    report = (corpus.output / "report" / "report.md").read_text()
    same = len(corpus.stay) - 3  # two copies left, one has another aspect
    assert f"{same} same size, 0 same aspect, 1 other aspect, 1 turned by EXIF" in report


def test_turns_are_those_of_the_files_though_loading_a_tiff_turns_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, upright = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (64, 48)).save(turned, "TIFF", exif=exif)
    Image.new("RGB", (48, 64)).save(upright, "TIFF")
    record = Record(
        id="1", dataset="made", source=turned.getvalue(), target=upright.getvalue(), instructions=("make it blue",)
    )
    row = scan.examine(record, Settings())  # and is not left out as one of which a side is turned
    assert [int(row[name]) for name in (*SIZES, "source_turn", "target_turn")] == [48, 64, 48, 64, 6, 1]


def test_no_image_is_in_training_and_in_validation(corpus: Corpus) -> None:
    images: dict[str, set[str]] = {"train": set(), "validation": set()}
    for split, record in _all(corpus.output):
        images[split] |= {record.original, hashlib.sha256(record.target).hexdigest()}
    assert images["train"] and images["validation"]
    assert images["train"].isdisjoint(images["validation"])
    same = {record.id: split for split, record in _all(corpus.output) if record.id in ("good-5", "same-source")}
    assert len(same) == 2 and len(set(same.values())) == 1


def test_the_report_adds_up_and_shows_images(corpus: Corpus) -> None:
    report = json.loads((corpus.output / "report" / "report.json").read_text())["made"]
    index = read_index(corpus.output)["splits"]
    assert report["read"] == len(corpus.stay) + len(corpus.left)
    assert {split: report[split] for split in index} == {split: index[split]["records"] for split in index}
    assert report["read"] == report["train"] + report["validation"] + sum(report["left"].values())
    assert f"| {Reason.UNCHANGED} | 1 |" in (corpus.output / "report" / "report.md").read_text()
    with Image.open(corpus.output / "report" / "samples.png") as sheet:
        assert sheet.height > 5 * 144 and len(set(sheet.convert("L").get_flattened_data())) > 100


def test_a_job_that_was_ended_goes_on_and_one_process_writes_the_same_bytes_as_two(
    corpus: Corpus, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"  # a file, since tasks run on copies of what they were given
    log.write_text("")
    original = {name: getattr(pipeline, name) for name in ("scan", "write")}

    def limit(name: str, allowed: int) -> None:
        work = original[name]

        def limited(task: object) -> None:
            if len(log.read_text().split()) == allowed:
                raise KeyError("the power went out")
            work(task)
            with log.open("a") as file:
                file.write(f"{name}\n")

        monkeypatch.setattr(pipeline, name, limited)

    output = tmp_path / "out"
    for name, allowed in (("scan", 2), ("write", 4)):
        limit(name, allowed)
        with pytest.raises(KeyError, match="the power went out"):
            corpus.prepare(output)
        assert len(log.read_text().split()) == allowed and not output.exists()
        limit(name, -1)
    corpus.prepare(output)
    shards = sum(len(split["shards"]) for split in read_index(output)["splits"].values())
    assert log.read_text().split() == ["scan"] * len(corpus.inputs) + ["write"] * shards  # nothing was done twice
    assert _files(output) == _files(corpus.output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "out"]


def test_other_settings_begin_anew_and_mistakes_are_told(corpus: Corpus, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(UserError) as caught:
        corpus.prepare(output, dataclasses.replace(SETTINGS, min_side=90))
    said = str(caught.value)
    assert said.startswith("nothing is left of 36 records: 32 too small (made/good-0: source: 64 x 48 pixels); 1 ")
    assert "; 1 empty instruction (made/silent); " in said and "1 low score (made/poor: quality is 4.5, below 5" in said
    report = tmp_path / "out.report"
    assert f"{report / 'quarantine.jsonl'} names each" in said and "\n" not in said
    assert len(list(read_lines(report / "quarantine.jsonl"))) == 36 and (report / "samples.png").exists()
    with pytest.raises(UserError, match="nothing is left of 36 records: 35 too large .*; 1 empty instruction "):
        corpus.prepare(output, Settings(max_side=20))
    assert "too small" not in (report / "report.md").read_text()
    everything = Settings(decode=False, exact=False, validation=0, max_aspect_change=0)
    corpus.prepare(output, everything)
    left = {line["id"]: line["reason"] for line in read_lines(output / "report" / "quarantine.jsonl")}
    assert left == {"silent": "empty instruction"}
    assert list(read_index(output)["splits"]) == ["train"]
    assert not report.exists()
    with pytest.raises(UserError, match="exists; give a new directory"):
        corpus.prepare(output)
    with pytest.raises(UserError, match="no runner 'Nope'"):
        prepare("manifest", [str(corpus.inputs[0])], tmp_path / "other", SETTINGS, runner="Nope")


def test_what_stops_a_worker_is_one_sentence_for_the_user(tmp_path: pathlib.Path) -> None:
    layout = layouts.magicbrush(tmp_path / "in")
    with pytest.raises(UserError, match="omni_edit_id") as caught:
        prepare("omniedit", [str(path) for path in layout.inputs], tmp_path / "out", SETTINGS)
    assert "\n" not in str(caught.value)


def test_nothing_read_is_told_as_well(tmp_path: pathlib.Path) -> None:
    (tmp_path / "list.jsonl").write_text("\n")
    with pytest.raises(UserError, match="nothing is left of 0 records: the data set is empty; "):
        prepare("manifest", [str(tmp_path / "list.jsonl")], tmp_path / "out", SETTINGS, source_options=OPTIONS)


def test_a_full_disk_is_one_sentence_for_the_user(
    corpus: Corpus, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged, "_path", lambda part, bucket: pathlib.Path("/dev/full"))
    with pytest.raises(UserError, match="writing the data set failed in .*: No space left on device; .*; make room"):
        prepare("manifest", [str(corpus.inputs[0])], tmp_path / "out", SETTINGS)


def test_a_disk_that_fails_while_it_is_read_is_one_sentence_and_no_damage(
    corpus: Corpus, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(input_files, "open", Disk(fails_at=30).open, raising=False)
        with pytest.raises(
            UserError, match="cannot read .*: Input/output error; put it right and run the same command"
        ):
            corpus.prepare(tmp_path / "out")
    corpus.prepare(tmp_path / "out")
    assert _files(tmp_path / "out") == _files(corpus.output)


def test_an_output_inside_of_the_input_is_told_to_the_user(corpus: Corpus) -> None:
    directory = corpus.inputs[0].parent
    with pytest.raises(UserError, match="lies below .*; give a directory beside it"):
        prepare("manifest", [str(directory)], directory / "new" / "out", SETTINGS)
    assert not (directory / "new").exists()


def test_ids_that_come_twice_are_kept_once(tmp_path: pathlib.Path) -> None:
    inputs, stay, _ = write_corpus(tmp_path / "in", lists=1)
    other, _, _ = write_corpus(tmp_path / "again", lists=1)
    shutil.move(other[0], inputs[0].with_name("second.jsonl"))
    settings = Settings(validation=0)
    prepare("manifest", [str(inputs[0].parent)], tmp_path / "out", settings, source_options=OPTIONS)
    ids = Records(tmp_path / "out", "train").columns.id
    names = [ids[index] for index in range(len(ids))]
    assert len(names) == len(set(names))
    lines = read_lines(tmp_path / "out" / "report" / "quarantine.jsonl")
    again = {line["id"] for line in lines if line["reason"] == Reason.SAME_ID}
    assert again >= set(names) and again >= stay


def _program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_pipelines.prepare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


@pytest.mark.subprocess
def test_the_program_prepares_and_tells_mistakes_in_one_line(corpus: Corpus, tmp_path: pathlib.Path) -> None:
    inputs = ",".join(map(str, corpus.inputs))
    arguments = ["--source=manifest", f"--input={inputs}", f"--output={tmp_path / 'out'}", "--workers=1"]
    done = _program(*arguments, "--source_options=dataset=made", "--min_score=quality:6", "--validation=0")
    assert done.returncode == 0 and "26 for train; report/report.md" in done.stdout
    failed = _program(*arguments, "--min_score=quality")
    assert failed.returncode == 1
    assert failed.stderr == "error: --min_score is 'quality'; it must be like NAME:VALUE\n"


@pytest.mark.subprocess
def test_texts_are_utf_8_whatever_the_machine_takes_for_usual(corpus: Corpus, tmp_path: pathlib.Path) -> None:
    names = {side: str(corpus.inputs[0].with_name(f"0-{side}.jpg")) for side in ("source", "target")}
    lines = [{"id": "猫", "instruction": "remove 猫", **names}, {"id": "狗", "instruction": "", **names}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = _program(
        "--source=manifest",
        f"--input={tmp_path / 'list.jsonl'}",
        f"--source_options=root={corpus.inputs[0].parent}",
        f"--output={tmp_path / 'out'}",
        LC_ALL="C",
        PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
    )
    assert done.returncode == 0, done.stderr
    [line] = read_lines(tmp_path / "out" / "report" / "quarantine.jsonl")
    assert line["id"] == "狗"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"min_side": -1}, "min_side is -1"),
        ({"min_side": 9, "max_side": 8}, "max_side is 8, less than min_side, 9"),
        ({"max_ratio": 0.5}, "max_ratio is 0.5"),
        ({"max_aspect_change": 0.9}, "max_aspect_change is 0.9"),
        ({"near_bits": 8}, "near_bits is 8"),
        ({"validation": 1.0}, "validation is 1.0"),
        ({"decode": False, "min_change": 1.0}, "leave decode on"),
        ({"shard_bytes": 0}, "shards of 0 bytes"),
    ],
)
def test_settings_that_make_no_sense_are_told(fields: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Settings(**fields)
