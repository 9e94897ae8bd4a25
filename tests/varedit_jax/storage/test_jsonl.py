"""JSON lines survive kills, torn lines and broken bytes."""

import pathlib

import pytest

from varedit_jax.errors import UserError
from varedit_jax.storage.jsonl import LineWriter, keep_lines, read_lines


def test_lines_are_appended_over_several_processes(directory: pathlib.Path) -> None:
    for number in range(3):
        writer = LineWriter(directory / "x.jsonl")
        writer.append({"number": number})
        writer.close()
    assert read_lines(directory / "x.jsonl") == [{"number": 0}, {"number": 1}, {"number": 2}]
    assert read_lines(directory / "none.jsonl") == []


def test_flushed_lines_are_there_before_the_end(directory: pathlib.Path) -> None:
    writer = LineWriter(directory / "x.jsonl")
    writer.append({"a": 1})
    writer.flush()
    assert read_lines(directory / "x.jsonl") == [{"a": 1}]
    writer.close()


def test_torn_and_broken_lines_cost_themselves_alone(directory: pathlib.Path) -> None:
    path = directory / "x.jsonl"
    LineWriter(path).close()
    path.write_bytes(b'{"a": 1}\n\xff\xfe{"b": 2}\n[3]\nnull\n{"c": "\xe7\x94\xbb"}\n{"d": ')
    assert read_lines(path) == [{"a": 1}, {"c": "画"}]
    writer = LineWriter(path)
    writer.append({"e": 5})
    writer.close()
    assert read_lines(path) == [{"a": 1}, {"c": "画"}, {"e": 5}]
    keep_lines(path, lambda line: "c" not in line)
    assert path.read_bytes() == b'{"a": 1}\n{"e": 5}\n'


def test_a_full_disk_is_one_sentence(tmp_path: pathlib.Path) -> None:
    writer = LineWriter(tmp_path / "x.jsonl")
    assert writer._file is not None
    writer._file.close()
    says = r"writing the x.jsonl failed in .*: No space left on device; .* make room"
    with open("/dev/full", "wb", buffering=0) as writer._file, pytest.raises(UserError, match=says):
        writer.append({"a": 1})
