"""Tables as people have them: Parquet and Arrow, with images inside or beside, by names of columns."""

import base64
import pathlib
from typing import Any

import pyarrow as pa
import pytest

from data_pipelines.reasons import Reason
from data_pipelines.record import Record
from data_pipelines.sources import Entry, Refused, find_parts, read
from data_pipelines.sources.tables import image_of
from tests.data_pipelines.sources import layouts
from tests.data_pipelines.sources.layouts import arrow, draw, embedded, table
from varedit_jax.errors import UserError

SOURCES = {
    "ultraedit": layouts.ultraedit,
    "magicbrush": layouts.magicbrush,
    "omniedit": layouts.omniedit,
    "instruct_pix2pix": layouts.instruct_pix2pix_tables,
}


def _as_arrow(directory: pathlib.Path) -> None:
    """Rewrites every sound table as `save_to_disk` would, in a directory of its own."""
    for path in sorted(directory.rglob("*.parquet")):
        if path.read_bytes()[-4:] == b"PAR1":
            arrow(path.with_suffix("") / "data-00000-of-00001.arrow", pa.parquet.read_table(path).to_pylist())
        path.unlink()


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_of_tables_reads_what_datasets_saved(source: str, tmp_path: pathlib.Path) -> None:
    def texts(entries: list[Entry]) -> list[Any]:
        return [(entry.source, entry.target, entry.instructions) for entry in entries if isinstance(entry, Record)]

    layout = SOURCES[source](tmp_path)
    expected = texts(list(read(source, layout.inputs)))
    _as_arrow(tmp_path)
    entries = list(read(source, layout.inputs))
    assert texts(entries) == expected != []
    assert len({entry.id for entry in entries}) == len(entries)


def _row(i: int) -> dict[str, Any]:
    return {"source": embedded(f"s{i}"), "target": embedded(f"t{i}"), "instruction": f"turn it into {i}"}


def test_an_arrow_stream_that_is_cut_short_gives_what_is_whole_and_says_so(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "data-00000-of-00001.arrow"
    arrow(path, [_row(i) for i in range(8)])
    path.write_bytes(path.read_bytes()[:-3000])
    *rows, refused = read("table", [tmp_path])
    assert [row.id for row in rows] == [f"data-00000-of-00001/{i}" for i in range(len(rows))] and 2 <= len(rows) < 8
    assert isinstance(refused, Refused) and refused.reason == Reason.ARCHIVE
    assert refused.id == f"data-00000-of-00001.arrow rows {len(rows)}-"


def test_arrow_files_for_random_access_are_read_too(tmp_path: pathlib.Path) -> None:
    made = pa.Table.from_pylist([_row(i) for i in range(50)])
    with (tmp_path / "a.arrow").open("wb") as file, pa.ipc.new_file(file, made.schema) as stream:
        stream.write_table(made, max_chunksize=40)
    records = [entry for entry in read("table", [tmp_path]) if isinstance(entry, Record)]
    assert [record.id for record in records] == [f"a/{i}" for i in range(50)]
    assert [record.source for record in records] == [draw(f"s{i}") for i in range(50)]


def test_memory_does_not_grow_with_an_arrow_file(tmp_path: pathlib.Path) -> None:
    noise = {"bytes": bytes(100_000), "path": ""}
    arrow(tmp_path / "a.arrow", [_row(i) | {"source": noise, "target": noise} for i in range(60)])
    held = [pa.total_allocated_bytes() for entry in read("table", [tmp_path]) if entry.id]
    assert len(held) == 60 and max(held) < 2_000_000  # of 12 MB, in batches of 0.4 MB


def test_images_of_tables_are_bytes_names_or_base64(tmp_path: pathlib.Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(draw("a"))
    here, text = [str(tmp_path)], base64.b64encode(draw("a")).decode()
    same = [draw("a"), {"bytes": draw("a"), "path": "x"}, [draw("a")], "images/a.jpg", f"{tmp_path}/images/a.jpg"]
    same += [{"bytes": None, "path": "images/a.jpg"}, [{"path": "images/a.jpg"}]]
    same += [text, f"data:image/jpeg;base64,{text}"]
    assert [image_of(value, here) for value in same] == [draw("a")] * len(same)
    assert [image_of(value, here) for value in (None, {}, [], 7, "")] == [None] * 5
    reasons = {"no.jpg": Reason.MISSING, "../a.jpg": Reason.UNSAFE, "/etc/passwd": Reason.UNSAFE}
    assert {name: image_of(name, here) for name in reasons} == reasons
    assert image_of([draw("a"), draw("a")], here) is Reason.SEVERAL


def test_columns_have_the_names_that_options_give(tmp_path: pathlib.Path) -> None:
    row = {"image_file": embedded("s"), "edited_file": embedded("t"), "edit_instruction": "make it red", "key": 7}
    row |= {"other": ["turn it red", None], "edit_type": "color", "q": 0.5, "r": None, "turn": 2.0, "m": embedded("m")}
    table(tmp_path / "a.parquet", [row])
    options = {"source": "image_file", "target": "edited_file", "instruction": "edit_instruction+other", "id": "key"}
    options |= {"kind": "edit_type", "scores": "q+r", "dataset": "anyedit", "mask": "m", "original": "key"}
    [record] = read("table", [tmp_path], options)
    assert record == Record(
        id="7", dataset="anyedit", source=draw("s"), target=draw("t"), instructions=("make it red", "turn it red"),
        kind="color", scores={"q": 0.5}, turn=2, mask=draw("m"), original="7"
    )  # fmt: skip


@pytest.mark.parametrize("field", ["source", "target", "instruction", "id", "kind", "scores", "mask"])
def test_a_column_that_is_not_there_is_told_before_anything_is_read(field: str, tmp_path: pathlib.Path) -> None:
    table(tmp_path / "a.parquet", [_row(0)])
    with pytest.raises(UserError, match="a.parquet has no column 'q', but source, target, instruction; say which"):
        find_parts("table", [tmp_path], {field: "q"})
