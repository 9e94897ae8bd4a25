"""What lies below the inputs is read once, and what is left out of it is said."""

import json
import os
import pathlib
from collections.abc import Sequence

import pytest

from data_pipelines.damage import Damaged, check_record
from data_pipelines.reasons import Reason
from data_pipelines.record import Record
from data_pipelines.sources import Refused, find_parts, read
from data_pipelines.sources.files import find, is_clutter, read_below
from data_pipelines.sources.search import sentences, split_of
from tests.data_pipelines.sources.layouts import draw, embedded, table
from tests.data_pipelines.sources.test_to_batch import WRITERS
from varedit_jax.errors import UserError

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 44\n"


def _write(directory: pathlib.Path, *names: str, text: str = "{}") -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


def _found(*inputs: pathlib.Path) -> list[str]:
    return [path.removeprefix(f"{inputs[0]}/") for path in find([str(path) for path in inputs], "*.jsonl")]


def _listed(path: pathlib.Path, names: Sequence[tuple[object, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"source": s, "target": t, "instruction": f"make it {i}"}) for i, (s, t) in enumerate(names)]
    path.write_text("\n".join(lines))


def _refused(entries: Sequence[object]) -> dict[str, str]:
    return {entry.id: f"{entry.reason}: {entry.detail}" for entry in entries if isinstance(entry, Refused)}


def test_linked_directories_are_followed(tmp_path: pathlib.Path) -> None:
    _write(tmp_path, "in/a.jsonl", "out/b.jsonl", "out/deep/c.jsonl", "far/d.jsonl")
    (tmp_path / "in/linked").symlink_to("../out")
    (tmp_path / "out/deep/on").symlink_to(tmp_path / "far")
    assert _found(tmp_path / "in") == [
        "a.jsonl", "linked/b.jsonl", "linked/deep/c.jsonl", "linked/deep/on/d.jsonl"
    ]  # fmt: skip


def test_a_directory_reached_in_two_ways_is_read_once_and_named(tmp_path: pathlib.Path) -> None:
    for name in ("real/b", "c"):
        _listed(tmp_path / "in" / name / f"{name[0]}.jsonl", [("x.jpg", "x.jpg")])
        (tmp_path / "in" / name / "x.jpg").write_bytes(draw("x"))
    (tmp_path / "in/a_link").symlink_to("real/b")
    (tmp_path / "in/real/b/loop").symlink_to("..")
    (tmp_path / "in/up").symlink_to(tmp_path)
    (tmp_path / "in/itself").symlink_to("itself")
    entries = list(read("manifest", [tmp_path / "in"]))
    assert sum(isinstance(entry, Record) for entry in entries) == 2
    assert _refused(entries) == {
        "a_link": "read already: is the same directory as real/b, or around it",
        "real/b/loop": "read already: is the same directory as real, or around it",
        "up": "read already: is the same directory as in, or around it",
    }


def test_inputs_that_overlap_give_each_file_once(tmp_path: pathlib.Path) -> None:
    _write(tmp_path, "in/a/b.jsonl", "in/c.jsonl")
    (tmp_path / "link").symlink_to("in/a")
    assert _found(tmp_path / "in", tmp_path / "in/a", tmp_path / "in/c.jsonl") == ["a/b.jsonl", "c.jsonl"]
    assert len(find([str(tmp_path / "in"), str(tmp_path / "link")], "*.jsonl")) == 2


def test_clutter_and_pipes_are_passed_over_and_broken_links_named(tmp_path: pathlib.Path) -> None:
    _write(tmp_path, "a.jsonl", "._a.jsonl", "__MACOSX/b.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "gone.jsonl").symlink_to("blobs/feed")
    assert is_clutter("x/._a.jsonl") and _found(tmp_path) == ["a.jsonl"]
    [part] = find_parts("manifest", [tmp_path])
    assert [(refused.id, refused.reason) for refused in part.left_out] == [("gone.jsonl", "file not there")]


@pytest.mark.parametrize("spelled", ["{0}", "{0}/", "{0}/../in", "{1}/link", "{0}/./", "~/in"])
def test_absolute_names_are_found_however_the_input_is_spelled(
    spelled: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    top = tmp_path / "in"
    (top / "images").mkdir(parents=True)
    for name in ("a", "b"):
        (top / "images" / f"{name}.jpg").write_bytes(draw(name))
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    names = [f"{top}/images/a.jpg", f"{tmp_path}/link/images/a.jpg", "~/in/images/a.jpg", "../images/a.jpg"]
    names += [f"{top}/lists/../images/a.jpg", "..\\images\\a.jpg"]
    bad = [
        f"{tmp_path}/secret.jpg",
        "../../secret.jpg",
        f"{top}/../secret.jpg",
        "~/secret.jpg",
        "\0",
        "..\\..\\secret.jpg",
    ]
    _listed(top / "lists" / "l.jsonl", [(name, f"{top}/images/b.jpg") for name in names + bad])
    entries = list(read("manifest", [spelled.format(top, tmp_path)]))
    assert [entry.source for entry in entries[: len(names)] if isinstance(entry, Record)] == [draw("a")] * len(names)
    assert [entry.reason for entry in entries[len(names) :] if isinstance(entry, Refused)] == ["unsafe name"] * len(bad)


def test_linked_directories_of_images_are_followed_and_linked_files_not(tmp_path: pathlib.Path) -> None:
    _write(tmp_path, "in/a.txt", "elsewhere/b.txt", text="image")
    (tmp_path / "in/pics").symlink_to("../elsewhere")
    (tmp_path / "in/b.txt").symlink_to("../elsewhere/b.txt")
    assert read_below([str(tmp_path / "in")], "pics/b.txt") == b"image"
    assert read_below([str(tmp_path / "in")], "b.txt") == "unsafe name"


def test_names_are_found_in_both_forms_of_unicode(tmp_path: pathlib.Path) -> None:
    _write(tmp_path, "e\u0301.jpg", text="image")
    assert read_below([str(tmp_path)], "\u00e9.jpg") == b"image"


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/dev-00000-of-00004.parquet", "validation"), ("validation/data-00000-of-00001.arrow", "validation"),
        ("val.jsonl", "validation"), ("x_test.tar", "test"), ("eval2/a.parquet", "test"), ("TEST/a.parquet", "test"),
        ("data/train-00000-of-00004.parquet", "train"), ("test/train-0.parquet", "train"), ("training/a.tar", "train"),
        ("FreeForm_0-00000-of-00071.parquet", None), ("latest.jsonl", None), ("development/a.jsonl", None),
        ("devices.parquet", None), ("contest/a.parquet", None),
    ],
)  # fmt: skip
def test_a_split_is_a_word_of_a_name(name: str, split: str | None) -> None:
    assert split_of(name) == split


def _magicbrush(directory: pathlib.Path) -> None:
    for split, id in (("train", "1"), ("dev", "2"), ("test", "3")):
        row = {"img_id": id, "turn_index": 1, "instruction": "make it foggy"}
        images = {"source_img": embedded(f"s{id}"), "target_img": embedded(f"t{id}")}
        table(directory / "data" / f"{split}-00000-of-00001.parquet", [row | images])


@pytest.mark.parametrize(
    ("splits", "ids"),
    [
        (["train"], ["1-1"]),
        (["dev", "test"], ["2-1", "3-1"]),
        (["train", "validation"], ["2-1", "1-1"]),
        (["all"], ["2-1", "3-1", "1-1"]),
    ],
)
def test_other_splits_are_left_out_unless_asked_for(splits: list[str], ids: list[str], tmp_path: pathlib.Path) -> None:
    _magicbrush(tmp_path)
    entries = list(read("magicbrush", [tmp_path], {}, splits))
    assert [entry.id for entry in entries if isinstance(entry, Record)] == ids
    assert len(_refused(entries)) == 3 - len(ids)
    if splits == ["train"]:
        assert _refused(entries)["data/dev-00000-of-00001.parquet"] == (
            "another split: validation; --splits=train,validation takes it"
        )


def test_a_file_that_is_given_by_name_is_of_the_asked_split(tmp_path: pathlib.Path) -> None:
    _magicbrush(tmp_path)
    [entry] = read("magicbrush", [tmp_path / "data" / "dev-00000-of-00001.parquet"])
    assert entry.id == "2-1"


def test_only_other_splits_and_unknown_ones_are_told_to_the_user(tmp_path: pathlib.Path) -> None:
    _magicbrush(tmp_path)
    (tmp_path / "data" / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match="left out, another split: data/dev-.*=train,validation .*=train,test takes"):
        find_parts("magicbrush", [tmp_path])
    with pytest.raises(UserError, match="there is no split 'dve'; splits are train, validation, test and all"):
        find_parts("magicbrush", [tmp_path], {}, ["dve"])


@pytest.mark.parametrize(
    ("numbers", "total", "missing"),
    [
        ((0, 2, 5), 7, "4 of 7 files are missing: 00001, 00003-00004, 00006"),
        ((1, 3), 3, "1 of 3 files are missing: 00002"),  # counted from 1
        ((0, 1), 2, None),
        ((1, 2), 2, None),
    ],
)
def test_what_is_missing_of_a_numbered_set_is_said(
    numbers: Sequence[int], total: int, missing: str | None, tmp_path: pathlib.Path
) -> None:
    for number in numbers:
        row = {"original_image": embedded("s"), "edited_image": embedded("t"), "edit_prompt": "make it foggy"}
        table(tmp_path / f"train-{number:05d}-of-{total:05d}.parquet", [row])
    entries = list(read("instruct_pix2pix", [tmp_path]))
    assert sum(isinstance(entry, Record) for entry in entries) == len(numbers)
    expected = {f"train-*-of-{total:05d}.parquet": f"file not there: {missing}; download them"} if missing else {}
    assert _refused(entries) == expected


def test_a_sentence_counts_what_it_does_not_name() -> None:
    names = [f"dev-{i}.parquet" for i in range(5)]
    [sentence] = sentences(Refused(id=name, dataset="d", reason=Reason.SPLIT, detail="why") for name in names)
    assert sentence == (
        "left out, another split: dev-0.parquet (why), dev-1.parquet (why), dev-2.parquet (why), 2 more"
    )


@pytest.mark.parametrize(
    ("text", "words"), [(LFS, "is a Git LFS pointer"), ("<html>", "is an HTML page"), ("", "is empty (0 bytes)")]
)
@pytest.mark.parametrize(
    ("source", "name"),
    [("ultraedit", "data/FreeForm_9.parquet"), ("manifest", "b.jsonl"), ("x2edit", "2.tar"), ("nhr_edit", "a.parquet")],
)
def test_what_is_no_table_list_or_archive_says_what_it_is(
    source: str, name: str, text: str, words: str, tmp_path: pathlib.Path
) -> None:
    layout = WRITERS[source](tmp_path)
    _write(tmp_path, name, text=text)
    entries = list(read(source, [tmp_path], layout.options))
    assert _refused(entries)[name].startswith(f"file not there: {words}")
    assert {entry.id for entry in entries if isinstance(entry, Record)} == layout.records.keys()
    _write(tmp_path / "alone", name, text=text)
    with pytest.raises(UserError, match=f"there is n.*left out, file not there: .*{words.split(' (')[0]}"):
        find_parts(source, [tmp_path / "alone"])


def test_an_image_that_is_a_pointer_says_so() -> None:
    record = Record(id="1", dataset="d", source=LFS.encode(), target=draw("t"), instructions=("make it foggy",))
    with pytest.raises(Damaged, match="not an image: source: is a Git LFS pointer, not the file: run git lfs pull"):
        check_record(record, lambda side, image: None)
