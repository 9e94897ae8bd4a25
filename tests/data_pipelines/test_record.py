import dataclasses

import msgpack
import pytest

from data_pipelines.record import BrokenRecord, Record, decode, encode, finite_scores
from varedit_jax.errors import UserError

RECORD = Record(
    id="7/1",
    dataset="made",
    source=b"\xff\xd8source",
    target=b"\x89PNGtarget",
    instructions=("make it foggy", "add fög"),
    kind="global",
    turn=1,
    scores={"o_score": 7.5, "a": 1},
    mask=b"mask",
    license="CC-BY-4.0",
    original="7",
)

# RECORD with version 1 of the format. Never edit it: it stands for the files that people have.
VERSION_1 = bytes.fromhex(
    "8ca776657273696f6e01a26964a3372f31a764617461736574a46d616465a6736f75726365c408ffd8736f75726365a67461"
    "72676574c40a89504e47746172676574ac696e737472756374696f6e7392ad6d616b6520697420666f676779a86164642066"
    "c3b667a46b696e64a6676c6f62616ca47475726e01a673636f72657382a161cb3ff0000000000000a76f5f73636f7265cb40"
    "1e000000000000a46d61736bc4046d61736ba76c6963656e6365a943432d42592d342e30a770696374757265a137"
)


def test_record_comes_back() -> None:
    assert decode(encode(RECORD)) == RECORD


def test_equal_records_are_equal_bytes_whatever_the_order_of_scores() -> None:
    turned = dataclasses.replace(RECORD, scores=dict(reversed(RECORD.scores.items())))
    assert encode(turned) == encode(RECORD)


def test_files_of_version_1_are_read() -> None:
    assert decode(VERSION_1) == RECORD


def test_fields_that_an_older_writer_lacks_get_their_defaults_and_those_a_newer_one_added_are_passed_over() -> None:
    values = msgpack.unpackb(VERSION_1)
    for name in ("kind", "turn", "scores", "mask", "licence", "picture"):
        del values[name]
    older = decode(msgpack.packb(values | {"camera": "added later"}))
    assert older == Record(
        id="7/1", dataset="made", source=RECORD.source, target=RECORD.target, instructions=RECORD.instructions
    )


def test_a_newer_version_is_told_to_the_user() -> None:
    with pytest.raises(UserError, match="version 2.*reads up to 1"):
        decode(msgpack.packb(msgpack.unpackb(VERSION_1) | {"version": 2}))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no record"),
        (VERSION_1[:-20], "no record"),
        (VERSION_1 + b"\x00", "no record"),
        (msgpack.packb([1, 2]), "of which version"),
        (msgpack.packb({"version": 1, "id": "7"}), "lacks a field"),
        (msgpack.packb(msgpack.unpackb(VERSION_1) | {"source": "text"}), "field source .* is str"),
        (msgpack.packb(msgpack.unpackb(VERSION_1) | {"id": 7}), "field id .* is int"),
        (msgpack.packb(msgpack.unpackb(VERSION_1) | {"instructions": [7]}), "no text"),
        (msgpack.packb(msgpack.unpackb(VERSION_1) | {"scores": {"a": [1]}}), "score 'a' .* is list"),
    ],
)
def test_bytes_that_are_no_record_are_broken(data: bytes, says: str) -> None:
    with pytest.raises(BrokenRecord, match=says):
        decode(data)


def test_scores_that_are_no_numbers_are_dropped() -> None:
    published = {"a": "7.5", "b": None, "c": float("nan"), "d": 3, "e": "good"}
    assert finite_scores(published) == {"a": 7.5, "d": 3.0}
