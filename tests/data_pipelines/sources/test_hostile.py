"""Hostile content of published files costs the record that has it, and no more."""

import json
import pathlib
import tarfile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.reasons import Reason
from data_pipelines.record import Record, decode, encode
from data_pipelines.sources import Entry, Refused, read
from data_pipelines.sources.archives import Damage, TarIndex, members
from data_pipelines.sources.files import read_below
from data_pipelines.sources.lists import json_items
from tests.data_pipelines.sources.layouts import tar

DEEP = "[" * 100_000


def _listed(directory: pathlib.Path, values: list[dict[str, Any]]) -> list[Entry]:
    """Returns the entries of a list of such objects, with the same good images by default."""
    (directory / "a.jpg").write_bytes(b"a")
    (directory / "b.jpg").write_bytes(b"b")
    good = {"source": "a.jpg", "target": "b.jpg", "instruction": "make it foggy"}
    (directory / "list.jsonl").write_text("".join(json.dumps(good | value) + "\n" for value in values))
    return list(read("manifest", [directory]))


def test_values_of_a_list_that_fit_nowhere_are_put_right(tmp_path: pathlib.Path) -> None:
    scores = {"a": 10**400, "\ud83d": 1, "b": 2}
    found = _listed(tmp_path, [{"id": 0, "turn": 2**31}, {"id": "", "turn": 2**31 - 1}, {"scores": scores}])
    assert all(isinstance(entry, Record) and decode(encode(entry)) == entry for entry in found)
    assert [(entry.id, entry.turn, entry.scores) for entry in found if isinstance(entry, Record)] == [
        ("0", 0, {}),
        ("list.jsonl:2", 2**31 - 1, {}),
        ("list.jsonl:3", 0, {"?": 1.0, "b": 2.0}),
    ]


def test_a_text_in_place_of_a_name_is_a_missing_image(tmp_path: pathlib.Path) -> None:
    [entry] = _listed(tmp_path, [{"source": "once upon a time " * 50}])
    assert isinstance(entry, Refused) and entry.reason == Reason.MISSING


def test_an_address_that_is_none_is_a_missing_image(tmp_path: pathlib.Path) -> None:
    edit = {"open_image_input_url": "http://[0/a.jpg", "output_image": "b.jpg", "text": "make it foggy"}
    (tmp_path / "sft.jsonl").write_text(json.dumps(edit) + "\n")
    [entry] = read("pico_banana", [tmp_path])
    assert isinstance(entry, Refused) and entry.reason == Reason.MISSING


@pytest.mark.parametrize("score", ["[{[]: 1}]", "[" + "-" * 100_000 + "1]", DEEP])
def test_a_score_that_is_no_number_is_dropped(score: str, tmp_path: pathlib.Path) -> None:
    about = json.dumps({"instruction": "make it foggy", "score": score, "score_b": "[9, 8]"}).encode()
    files = [("1.1.0.jpg", b"a"), ("1.2.jpg", b"b"), ("1.json", about), ("2.1.0.jpg", b"a"), ("2.2.jpg", b"b")]
    files += [("2.json", DEEP.encode()), ("2.txt", b"make it foggy")]
    (tmp_path / "1.tar").write_bytes(tar(files))
    scores = [entry.scores for entry in read("x2edit", [tmp_path]) if isinstance(entry, Record)]
    assert scores == [{"score_b_0": 9.0, "score_b_1": 8.0}, {}]


def test_directories_of_images_stay_in_themselves_whatever_is_in_them(tmp_path: pathlib.Path) -> None:
    outside, directory = tmp_path / "outside.jpg", tmp_path / "data" / "one"
    outside.write_bytes(b"a secret")
    directory.mkdir(parents=True)
    (tmp_path / "data" / "seeds.json").write_text(json.dumps([["one", ["1", "2", "3" * 300]]]))
    (directory / "prompt.json").write_text(json.dumps({"edit": "make it foggy"}))
    (directory / "metadata.jsonl").write_text(DEEP + "\n")
    for name in ("1_0.jpg", "1_1.jpg", "2_0.jpg"):
        (directory / name).write_bytes(b"an image")
    (directory / "2_1.jpg").symlink_to(outside)
    good, linked, long = read("instruct_pix2pix", [tmp_path / "data"])
    assert isinstance(good, Record) and good.id == "one/1"
    assert isinstance(linked, Refused) and linked.reason == Reason.MISSING
    assert isinstance(long, Refused) and long.reason == Reason.MISSING


def test_links_of_the_hubs_cache_are_followed_and_others_are_not(tmp_path: pathlib.Path) -> None:
    cache = tmp_path / "datasets--a--b"
    directory = cache / "snapshots" / "0123abcd" / "train"
    for made in (directory, cache / "blobs"):
        made.mkdir(parents=True)
    (cache / "blobs" / "feed").write_bytes(b"an image")
    (cache / "secret").write_bytes(b"a secret")
    (directory / "a.jpg").symlink_to("../../../blobs/feed")
    (directory / "b.jpg").symlink_to("../../../secret")
    assert read_below([str(directory)], "a.jpg") == b"an image"
    assert read_below([str(directory.parent)], "train/a.jpg") == b"an image"
    assert read_below([str(directory)], "b.jpg") is Reason.UNSAFE


def test_json_that_is_nested_without_end_is_damaged(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.json").write_text(f"[1, {DEEP}")
    with pytest.raises(ValueError, match="nested"):
        list(json_items(str(tmp_path / "a.json")))


def test_an_archive_whose_sizes_lead_back_ends(tmp_path: pathlib.Path) -> None:
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 4 + (2**64 - 1024).to_bytes(8, "big")  # -1024 bytes
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(tar([("b.jpg", b"b" * 600)])[:1536] + header + bytes(10_240))
    found = list(members([str(tmp_path / "a.tar")]))
    assert found[1:] == [Damage("a.jpg", Reason.SIZE, "-1024 bytes")] and found[0].name == "b.jpg"
    with TarIndex([str(tmp_path / "a.tar")]) as index:
        assert index.read("b.jpg") == b"b" * 600 and [item.name for item in index.damage] == ["a.jpg"]


def test_text_of_a_table_that_is_not_utf_8_costs_its_row(tmp_path: pathlib.Path) -> None:
    offsets = pa.py_buffer(np.array([0, 1, 2, 3], np.int32).tobytes())
    texts = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xffb")])
    images = pa.array([b"1", b"2", b"3"])
    table = pa.table({"original_image": images, "edit_prompt": texts, "edited_image": images})
    pq.write_table(table, tmp_path / "a.parquet")
    found = list(read("instruct_pix2pix", [tmp_path]))
    assert [entry.id for entry in found] == ["a/0", "a.parquet row 1", "a/2"]
    assert isinstance(found[1], Refused) and found[1].reason == Reason.ANNOTATION


def test_turns_that_a_table_has_as_fractions_are_whole(tmp_path: pathlib.Path) -> None:
    images = pa.array([b"1", b"2", b"3"])
    turns = pa.array([1.0, 2.0, None])  # what becomes of whole numbers beside one that is not there
    table = {"img_id": ["a", "a", "b"], "turn_index": turns, "source_img": images, "target_img": images}
    pq.write_table(pa.table(table | {"instruction": ["make it foggy"] * 3}), tmp_path / "a.parquet")
    found = [decode(encode(entry)).turn for entry in read("magicbrush", [tmp_path]) if isinstance(entry, Record)]
    assert found == [0, 1, 0]
