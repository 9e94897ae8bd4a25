"""MagicBrush: tables with one row per turn of a session. Turns count from 1 there, from 0 here."""

from typing import Any

from data_pipelines.sources.entries import Entry, make_entry
from data_pipelines.sources.tables import TableColumns, table_source

_LICENSE = "CC-BY-4.0"


def _convert(row: dict[str, Any], stem: str, number: int) -> Entry:
    return make_entry(
        id=f"{row['img_id']}-{row['turn_index']}",
        dataset="magicbrush",
        source=row["source_img"],
        target=row["target_img"],
        instructions=[row["instruction"]],
        turn=max(0, int(row["turn_index"] or 0) - 1),
        mask=row.get("mask_img"),
        license=_LICENSE,
        original=str(row["img_id"]),
    )


SOURCE = table_source(
    "magicbrush",
    _LICENSE,
    _convert,
    TableColumns(
        images=("source_img", "target_img"),
        needed=("img_id", "turn_index", "instruction"),
        optional_images=("mask_img",),
    ),
)
