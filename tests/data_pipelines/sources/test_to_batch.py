"""From each public layout to a batch: prepared, opened, and read by the loader."""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipelines import loader
from data_pipelines.preparation.pipeline import prepare
from data_pipelines.preparation.settings import Settings
from data_pipelines.shapes.builder import Shapes
from data_pipelines.shards import Records
from data_pipelines.sources import SOURCES
from data_pipelines.transforms import fitted
from tests.data_pipelines.images import opened
from tests.data_pipelines.sources import archive_layouts, layouts
from tests.data_pipelines.sources.layouts import Download, Expected, draw
from varedit_jax.config import DataConfig, EditorConfig
from varedit_jax.storage.jsonl import read_lines


def shapes(directory: pathlib.Path) -> Download:
    builder = Shapes(data_dir=directory, train_examples=3, test_examples=1)
    builder.download_and_prepare()
    records = {
        f"train/{i}": Expected(source="", target="", instructions=(example["instruction"].decode(),))
        for i, example in enumerate(builder.as_data_source("train"))
    }
    return Download(inputs=[directory], records=records)


WRITERS: dict[str, Callable[[pathlib.Path], Download]] = {
    "seed": archive_layouts.seed_openimages,
    "imgedit": archive_layouts.imgedit,
    "ultraedit": layouts.ultraedit,
    "magicbrush": layouts.magicbrush,
    "instruct_pix2pix": layouts.instruct_pix2pix_zips,
    "omniedit": layouts.omniedit,
    "gpt_image_edit": archive_layouts.gpt_image_edit_training,
    "nhr_edit": archive_layouts.nhr_edit,
    "x2edit": layouts.x2edit,
    "pico_banana": archive_layouts.pico_banana,
    "varedit": layouts.varedit,
    "manifest": archive_layouts.manifest,
    "table": layouts.any_table,
    "tfds": shapes,
}


class Words:
    """A vocabulary whose tokens are the bytes of an instruction."""

    def encode(self, instructions: Sequence[str], length: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        ids = np.zeros((len(instructions), length), np.int32)
        for row, text in zip(ids, instructions, strict=True):
            row[: len(text.encode())] = list(text.encode())
        return ids, (ids > 0).sum(axis=1, dtype=np.int32)


@pytest.mark.parametrize("source", SOURCES)
def test_each_layout_becomes_a_batch_with_exactly_its_records(source: str, tmp_path: pathlib.Path) -> None:
    layout = WRITERS[source](tmp_path / "downloaded")
    inputs, output = [str(path) for path in layout.inputs], tmp_path / "prepared"
    settings = Settings(exact=False, validation=0.0)
    counts = prepare(source, inputs, output, settings, source_options=layout.options, say=lambda _: None)
    assert counts == {"train": len(layout.records)}
    records = Records(output, "train")
    assert sorted(records.id(i) for i in range(len(records))) == sorted(layout.records)
    quarantine = read_lines(output / "report" / "quarantine.jsonl")
    assert {line["id"]: line["reason"] for line in quarantine} == layout.refused

    model = EditorConfig(pixel_budget="", grids=((1, 1), (2, 2)))
    data = DataConfig(
        name="records", mixture=((str(output), 1.0),), batch_size=len(records), text_tokens=96, read_threads=0
    )
    examples = loader.open_records(data, "train", model)
    batch = next(loader.training_batches(data, Words(), examples))
    assert sorted(batch["example_ids"]) == list(range(len(records)))  # each once, and none stands in for another
    for row, index in enumerate(batch["example_ids"]):
        record, expected = records[index], layout.records[records.id(index)]
        assert bytes(batch["text_ids"][row, : batch["text_length"][row]].tolist()).decode() == expected.instructions[0]
        for side, name in (("source", expected.source), ("target", expected.target)):
            size = batch[side].shape[1:3]
            published = draw(name) if name else getattr(record, side)
            np.testing.assert_array_equal(batch[side][row], fitted(opened(published), size, "crop", flip=False))
