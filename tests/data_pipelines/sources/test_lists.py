"""Lists in every form that people have: encodings, compression, and parts of large ones."""

import bz2
import gzip
import json
import lzma
import pathlib
import random

import pytest
import zstandard

from data_pipelines.reasons import Reason
from data_pipelines.record import Record
from data_pipelines.sources import Entry, Refused, find_parts, lists, read, read_part
from data_pipelines.sources.lists import Span, json_items, read_lines, spans
from tests.data_pipelines.sources import archive_layouts
from tests.data_pipelines.sources.layouts import draw
from varedit_jax.storage import paths

VALUES = [{"a": "é 画"}, {"b": [1, None]}, {"c": ""}]
TEXT = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in VALUES)
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", ",\n"])
def test_lists_are_read_in_any_encoding(encoding: str, end: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(TEXT.replace("\n", end).encode(encoding))
    assert list(read_lines(str(path), "d")) == [(f"a.jsonl:{i}", value) for i, value in enumerate(VALUES, 1)]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_is_read_in_any_encoding(encoding: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps(VALUES, ensure_ascii=False).encode(encoding))
    assert [value for _, value in json_items(str(path))] == VALUES


@pytest.mark.parametrize("packer", PACKERS)
def test_compressed_lists_have_the_ids_of_plain_ones(packer: str, tmp_path: pathlib.Path) -> None:
    plain = archive_layouts.manifest(tmp_path)
    expected = list(read("manifest", plain.inputs, plain.options))
    path = tmp_path / "list.jsonl"
    data = path.read_bytes()
    (tmp_path / f"list.jsonl.{packer}").write_bytes(PACKERS[packer](data[:100]) + PACKERS[packer](data[100:]))
    path.unlink()
    assert list(read("manifest", [tmp_path], plain.options)) == expected


def test_a_compressed_list_that_is_cut_short_gives_what_is_whole_and_says_so(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    noise = [{"a": random.Random(i).randbytes(100).hex()} for i in range(100)]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, noise)).encode())[:-1000])
    found = [value for _, value in read_lines(str(path), "d")]
    whole = [value for value in found if not isinstance(value, Refused)]
    assert whole == noise[: len(whole)] and 50 < len(whole) < 100
    assert [value.reason for value in found[len(whole) :]] == [Reason.ANNOTATION, Reason.ARCHIVE]  # type: ignore[union-attr]


@pytest.mark.parametrize(("opening", "values"), [("[\n", "'.[]'"), ("{\n", "."), ("[{\n", "'.[]'")])
def test_json_over_many_lines_is_one_refusal(opening: str, values: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.jsonl").write_text(opening + '"a": 1\n' * 100)
    [(_, refused)] = read_lines(str(tmp_path / "a.jsonl"), "d")
    assert isinstance(refused, Refused) and refused.detail.endswith(f"one object per line: jq -c {values} a.jsonl")


def _parts(directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch, size: int) -> tuple[list[str], list[Entry]]:
    monkeypatch.setattr(lists, "PART_BYTES", size)
    parts = find_parts("manifest", [directory])
    return [part.name for part in parts], [entry for part in parts for entry in read_part(part)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_ids_and_records_are_the_same_however_a_list_is_split(
    end: str, encoding: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.jpg").write_bytes(draw("x"))
    rows = [{"source": "x.jpg", "target": "x.jpg", "instruction": "é" * (i % 40) + f" make it {i}"} for i in range(50)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    lines[7], lines[20] = "{no json", ""
    (tmp_path / "l.jsonl").write_bytes(end.join(lines).encode(encoding))
    names, whole = _parts(tmp_path, monkeypatch, 1 << 20)
    assert names == ["l.jsonl"] and sum(isinstance(entry, Record) for entry in whole) == 48
    assert f"l.jsonl:{49 * len(end.replace(chr(13), '')) + 1}" in [entry.id for entry in whole]
    for size in (1, 100, 101, 1000, 4000):
        names, entries = _parts(tmp_path, monkeypatch, size)
        assert entries == whole and len(names) > 1 and len(set(names)) == len(names)


def test_a_part_reads_its_own_lines_alone(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' * 100)
    found = spans(str(path), 90)
    assert found[0] == Span(0, 90, 1) and found[1] == Span(90, 180, 11) and len(found) == 10
    assert [place for place, _ in read_lines(str(path), "d", found[1])] == [f"a.jsonl:{i}" for i in range(11, 21)]
    assert Span.of(found[1].as_options()) == found[1] and Span.of({}) == Span() and not Span().as_options()


@pytest.mark.parametrize("form", ["utf-16", "gz", "cr", "json"])
def test_what_can_only_be_read_in_order_is_one_part(form: str, tmp_path: pathlib.Path) -> None:
    text = '{"a": 1}\n' * 100
    forms = {"utf-16": text.encode("utf-16"), "gz": gzip.compress(text.encode(), 0)}
    forms |= {"cr": text.replace("\n", "\r").encode(), "json": b"[\n" + text.encode()}
    (tmp_path / "a.jsonl").write_bytes(forms[form])
    assert spans(str(tmp_path / "a.jsonl"), 90) == [Span()]


def test_lines_are_counted_over_blocks(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"a": i}) + "\n" * (1 + i % 3) for i in range(200)))
    expected = spans(str(path), 200)
    for block in (1, 7, 100, 300):
        monkeypatch.setattr(lists, "_BLOCK", block)
        assert spans(str(path), 200) == expected
    assert expected[-1].start < paths.size(path) and expected[-1].stop > paths.size(path)


def test_other_names_of_fields_are_told_and_given(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.jpg").write_bytes(draw("x"))
    row = {"input_image": "x.jpg", "output_image": "x.jpg", "prompt": ["make it foggy", None]}
    (tmp_path / "l.jsonl").write_text(json.dumps(row))
    [refused] = read("manifest", [tmp_path])
    assert isinstance(refused, Refused) and refused.detail == (
        "no source, but input_image, output_image, prompt; say which one it is: --source_options=source=NAME"
    )
    options = {"source": "input_image", "target": "output_image", "instruction": "prompt"}
    [record] = read("manifest", [tmp_path], options)
    assert isinstance(record, Record) and record.instructions == ("make it foggy",)


@pytest.mark.parametrize(
    ("name", "advice"),
    [("https://a.org/b.jpg", "an address, download the image"), ("\ufffd.jpg", "the list is not in UTF-8")],
)
def test_a_missing_image_says_what_may_be_wrong(name: str, advice: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "l.jsonl").write_text(json.dumps({"source": name, "target": name, "instruction": "make it foggy"}))
    [refused] = read("manifest", [tmp_path])
    assert isinstance(refused, Refused) and refused.reason == Reason.MISSING and refused.detail.endswith(advice)
