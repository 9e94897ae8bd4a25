"""MagicBrush: tables with one row per turn of a session. Turns count from 1 there, from 0 here."""

from typing import Any

from data_pipelines.sources.entries import Entry, make_entry
from data_pipelines.sources.tables import image_bytes, table_source

_LICENSE = "CC-BY-4.0"


def _convert(row: dict[str, Any], stem: str, number: int) -> Entry:
    return make_entry(
        id=f"{row['img_id']}-{row['turn_index']}",
        dataset="magicbrush",
        source=image_bytes(row["source_img"]),
        target=image_bytes(row["target_img"]),
        instructions=[row["instruction"]],
        turn=max(0, int(row["turn_index"] or 0) - 1),
        mask=image_bytes(row.get("mask_img")),
        license=_LICENSE,
        original=str(row["img_id"]),
    )


SOURCE = table_source(
    "magicbrush",
    _LICENSE,
    _convert,
    needed=("img_id", "turn_index", "source_img", "instruction", "target_img"),
    optional=("mask_img",),
)
