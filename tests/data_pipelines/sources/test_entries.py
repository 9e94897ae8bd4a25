import json
import pathlib

import pytest

from data_pipelines.reasons import Reason
from data_pipelines.record import Record, decode, encode
from data_pipelines.sources.entries import Refused, make_entry
from data_pipelines.sources.files import find, safe_name
from data_pipelines.sources.lists import json_items, read_lines


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("a/b.jpg", "a/b.jpg"),
        ("./a//b.jpg", "a/b.jpg"),
        ("a..b/...jpg", "a..b/...jpg"),
        ("/etc/passwd", None),
        ("../a", None),
        ("a/../../b", None),
        ("a/..", None),
        ("C:/a", None),
        ("a\\..\\b", None),
        ("a\0.jpg", None),
        (".", None),
        ("", None),
        (None, None),
        (7, None),
    ],
)
def test_safe_names_are_plain_and_stay_in_their_directory(name: object, plain: str | None) -> None:
    assert safe_name(name) == plain


@pytest.mark.parametrize("value", [[], {}, [1, 2.5, -3e4, "a]", {"b": [None, True]}], {"a, b": 1, "ü": ["x"], "": {}}])
@pytest.mark.parametrize("indent", [None, 2])
def test_large_json_comes_entry_by_entry(value: list | dict, indent: int | None, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(value, indent=indent))
    found = list(json_items(str(path)))
    expected = value.items() if isinstance(value, dict) else [(str(i), each) for i, each in enumerate(value)]
    assert found == list(expected)


def test_json_is_read_across_the_bounds_of_what_is_read_at_a_time(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.json"
    for pad in range(12):
        values = ["x" * (2**20 - 10 + pad), 123456789, "y" * 2**20, 987654321]
        path.write_text(json.dumps(values))
        assert [value for _, value in json_items(str(path))] == values


@pytest.mark.parametrize("text", ["", "7", '"a"', "[1, 2", '[{"a": 1}, {"b', '{"a": 1, "b"', '{"a" 1}', "[1, x]"])
def test_json_that_is_damaged_raises_after_what_is_whole(text: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError):
        list(json_items(str(path)))


def test_lines_that_are_no_objects_are_refused_by_their_place(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": "\xff"}\n\n[1]\n{"b"\n' + b"[" * 100_000 + b"\n{}")
    found = list(read_lines(str(path), "made"))
    assert [place for place, _ in found] == [f"a.jsonl:{number}" for number in (1, 3, 4, 5, 6)]
    assert [value.reason if isinstance(value, Refused) else value for _, value in found] == [
        {"a": "\ufffd"},
        *[Reason.ANNOTATION] * 3,
        {},
    ]


def test_texts_that_cannot_be_written_and_repeated_ones_are_put_right() -> None:
    entry = make_entry(
        id="\ud83d", dataset="d", source=b"s", target=b"t", instructions=[" a ", None, "a", "\n", "b \ud83d", 7]
    )
    assert isinstance(entry, Record) and entry.instructions == ("a", "b ?") and entry.id == "?"
    assert decode(encode(entry)) == entry


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"source": None}, "missing image"),
        ({"target": b""}, "missing image"),
        ({"instructions": ["", " "]}, "empty instruction"),
        ({"source": bytes(257 * 2**20)}, "absurd size"),
    ],
)
def test_what_lacks_something_is_refused(change: dict, reason: str) -> None:
    entry = make_entry(**{"id": "1", "dataset": "d", "source": b"s", "target": b"t", "instructions": ["a"]} | change)
    assert isinstance(entry, Refused) and entry.reason == reason


def test_files_are_found_by_the_end_of_their_path_in_order(tmp_path: pathlib.Path) -> None:
    for name in ("b/annotations/1.jsonl", "a/annotations/2.jsonl", "a/other/3.jsonl", "a/annotations/4.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = find([str(tmp_path), str(tmp_path / "b")], "annotations/*.jsonl")
    assert found == [str(tmp_path / name) for name in ("a/annotations/2.jsonl", "b/annotations/1.jsonl")]
