import collections
import json
import pathlib
import pickle
from collections.abc import Callable

import pyarrow.parquet
import pytest

from data_pipelines.record import Record, decode, encode
from data_pipelines.shapes.builder import Shapes
from data_pipelines.sources import SOURCES, Entry, Part, Refused, find_parts, read, read_part
from tests.data_pipelines.sources import archive_layouts, layouts
from tests.data_pipelines.sources.layouts import Download, Expected, draw
from varedit_jax.errors import UserError

LAYOUTS: list[tuple[str, Callable[[pathlib.Path], Download]]] = [
    ("seed", archive_layouts.seed_openimages),
    ("seed", archive_layouts.seed_unsplash),
    ("seed", archive_layouts.seed_real_and_multi_turn),
    ("seed", archive_layouts.seed_openimages_unpacked),
    ("seed", archive_layouts.seed_openimages_half_unpacked),
    ("seed", archive_layouts.seed_unsplash_unpacked),
    ("seed", archive_layouts.seed_real_and_multi_turn_unpacked),
    ("imgedit", archive_layouts.imgedit),
    ("imgedit", archive_layouts.imgedit_unpacked),
    ("imgedit", archive_layouts.imgedit_half_unpacked),
    ("ultraedit", layouts.ultraedit),
    ("magicbrush", layouts.magicbrush),
    ("instruct_pix2pix", layouts.instruct_pix2pix_tables),
    ("instruct_pix2pix", layouts.instruct_pix2pix_directories),
    ("instruct_pix2pix", layouts.instruct_pix2pix_zips),
    ("omniedit", layouts.omniedit),
    ("gpt_image_edit", archive_layouts.gpt_image_edit_training),
    ("gpt_image_edit", archive_layouts.gpt_image_edit_metadata),
    ("nhr_edit", archive_layouts.nhr_edit),
    ("x2edit", layouts.x2edit),
    ("pico_banana", archive_layouts.pico_banana),
    ("pico_banana", archive_layouts.pico_banana_packed),
    ("varedit", layouts.varedit),
    ("manifest", archive_layouts.manifest),
    ("table", layouts.any_table),
]


def _found(record: Record, expected: Expected) -> Expected:
    """Returns a record in the form of the expectation, with names for images that have the right bytes."""

    def named(data: bytes | None, name: str) -> str:
        return "" if data is None else name if data == draw(name) else f"not {name}"

    return Expected(
        source=named(record.source, expected.source),
        target=named(record.target, expected.target),
        instructions=record.instructions,
        kind=record.kind,
        turn=record.turn,
        scores=record.scores,
        original=record.original,
        mask=named(record.mask, expected.mask),
    )


def _check(entries: list[Entry], layout: Download) -> None:
    counts = collections.Counter(entry.id for entry in entries)
    assert {id: count for id, count in counts.items() if count > 1} == {}
    records = {entry.id: entry for entry in entries if isinstance(entry, Record)}
    assert {id: _found(record, layout.records[id]) for id, record in records.items() if id in layout.records} == {
        id: expected for id, expected in layout.records.items() if id in records
    }
    assert records.keys() == layout.records.keys()
    assert {entry.id: str(entry.reason) for entry in entries if isinstance(entry, Refused)} == layout.refused


@pytest.mark.parametrize(("source", "write"), LAYOUTS, ids=[write.__name__ for _, write in LAYOUTS])
def test_layout_gives_each_triple_once_and_refuses_the_rest_with_reasons(
    source: str, write: Callable[[pathlib.Path], Download], tmp_path: pathlib.Path
) -> None:
    layout = write(tmp_path / "data")
    before = sorted(path for path in tmp_path.rglob("*"))
    parts = find_parts(source, layout.inputs, layout.options)
    assert len({part.name for part in parts}) == len(parts)
    entries = [entry for part in parts for entry in read_part(pickle.loads(pickle.dumps(part)))]
    _check(entries, layout)
    assert list(read(source, layout.inputs, layout.options)) == entries  # the same, in the same order
    assert all(decode(encode(entry)) == entry for entry in entries if isinstance(entry, Record))
    assert sorted(path for path in tmp_path.rglob("*")) == before  # nothing was unpacked


def test_every_source_has_a_layout_and_a_name_for_its_data_set() -> None:
    assert {source for source, _ in LAYOUTS} | {"tfds"} == SOURCES.keys()


def test_any_tfds_data_set_by_names_of_features_with_images_as_they_are_stored(tmp_path: pathlib.Path) -> None:
    builder = Shapes(data_dir=tmp_path, train_examples=5, test_examples=3)
    builder.download_and_prepare()
    examples = list(builder.as_data_source("test"))
    entries = list(read("tfds", [tmp_path], {"split": "test"}))
    assert [entry.id for entry in entries] == ["test/0", "test/1", "test/2"]
    for entry, example in zip(entries, examples, strict=True):
        assert isinstance(entry, Record) and entry.dataset == "shapes"
        assert entry.instructions == (example["instruction"].decode(),) and entry.kind == example["kind"].decode()
        assert entry.source.startswith(b"\x89PNG") and entry.source != entry.target
    swapped = next(read("tfds", [tmp_path], {"split": "test", "source": "target", "target": "source"}))
    assert isinstance(swapped, Record) and isinstance(entries[0], Record) and swapped.target == entries[0].source
    with pytest.raises(UserError, match="no feature 'words', but .*instruction.*say which one is the instruction"):
        next(read("tfds", [tmp_path], {"instruction": "words"}))
    with pytest.raises(UserError, match="no split 'dev'; it has train, test"):
        find_parts("tfds", [tmp_path], {"split": "dev"})


@pytest.mark.parametrize("source", SOURCES)
def test_an_empty_directory_is_told_to_the_user(source: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="there is n.* under .*; (give|download)"):
        find_parts(source, [tmp_path])


def test_unknown_sources_options_and_paths_are_told_to_the_user(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="unknown source 'ultra'; known are seed"):
        find_parts("ultra", [tmp_path])
    with pytest.raises(UserError, match="ultraedit has no option 'split'; it has none"):
        find_parts("ultraedit", [tmp_path], {"split": "train"})
    with pytest.raises(UserError, match="there is no .*nowhere"):
        find_parts("ultraedit", [tmp_path / "nowhere"])


def test_files_whose_records_would_have_the_same_ids_are_told_to_the_user(tmp_path: pathlib.Path) -> None:
    layouts.ultraedit(tmp_path / "a")
    layouts.ultraedit(tmp_path / "b")
    with pytest.raises(UserError, match="a/data/FreeForm_0.* and .*b/data/FreeForm_0.* have the same name"):
        find_parts("ultraedit", [tmp_path])


def test_a_table_of_another_data_set_is_told_to_the_user(tmp_path: pathlib.Path) -> None:
    layouts.magicbrush(tmp_path)
    with pytest.raises(UserError, match="has no column 'idx', but img_id, .*is it a table of this data set"):
        list(read("ultraedit", [tmp_path]))


def test_a_damaged_group_of_rows_costs_these_rows_alone(tmp_path: pathlib.Path) -> None:
    rows = [{"original_image": layouts.embedded("s"), "edit_prompt": f"edit {i}"} for i in range(6)]
    path = tmp_path / "train.parquet"
    layouts.table(path, [row | {"edited_image": layouts.embedded("t")} for row in rows])  # groups of two rows
    page = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    data = bytearray(path.read_bytes())
    data[page : page + 40] = bytes(40)
    path.write_bytes(data)
    entries = list(read("instruct_pix2pix", [tmp_path]))
    assert [entry.id for entry in entries] == [
        "train/0", "train/1", "train.parquet rows 2-3", "train/4", "train/5"
    ]  # fmt: skip
    assert [entry.reason for entry in entries if isinstance(entry, Refused)] == ["damaged archive"]


def test_memory_does_not_grow_with_a_table(tmp_path: pathlib.Path) -> None:
    rows = [{"original_image": {"bytes": bytes([i]) * 100_000, "path": ""}, "edit_prompt": "edit"} for i in range(60)]
    layouts.table(tmp_path / "train.parquet", [row | {"edited_image": row["original_image"]} for row in rows])
    del rows
    held = [pyarrow.total_allocated_bytes() for entry in read("instruct_pix2pix", [tmp_path]) if entry.id]
    assert len(held) == 60 and max(held) < 2_000_000  # of 12 MB, in groups of 0.4 MB


def test_imgedit_scores_that_are_cut_short_are_told_to_the_user(tmp_path: pathlib.Path) -> None:
    archive_layouts.imgedit(tmp_path)
    (tmp_path / "all_dataset_gpt_score.json").write_text(json.dumps({"results/00094_1": 1})[:-3])
    with pytest.raises(UserError, match="all_dataset_gpt_score.json is damaged"):
        list(read("imgedit", [tmp_path]))


def test_imgedit_unpacked_is_found_by_directories_of_names_and_nowhere_else(tmp_path: pathlib.Path) -> None:
    names = [[f"results_a_part0/1/{side}.png"] for side in ("original", "result")]
    rows = [{"input_images": names[0], "output_images": names[1], "prompt": "make it foggy"}]
    rows += [{"input_images": ["1.png"], "output_images": ["1.png"], "prompt": "make it foggy"}]
    layouts.table(tmp_path / "Parquet" / "other_part5.parquet", rows)
    for name in ("results_a_part0/1/original.png", "results_a_part0/1/result.png", "results_a_part0/1.png"):
        (tmp_path / "Singleturn" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "Singleturn" / name).write_bytes(draw(name))
    found, lost = read("imgedit", [tmp_path])
    assert isinstance(found, Record) and found.target == draw("results_a_part0/1/result.png")
    assert isinstance(lost, Refused) and lost.reason == "missing image"


def test_a_part_names_all_files_that_it_reads(tmp_path: pathlib.Path) -> None:
    layout = archive_layouts.seed_openimages(tmp_path)
    [part] = find_parts("seed", layout.inputs)
    assert isinstance(part, Part) and part.name == "openimages"
    assert set(part.files) == {str(path) for path in tmp_path.rglob("*") if path.is_file()}
