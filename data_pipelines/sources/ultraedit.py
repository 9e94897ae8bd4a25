"""UltraEdit: tables that contain the images, with masks (UltraEdit) or without (UltraEdit_500k)."""

from typing import Any

from data_pipelines.record import finite_scores
from data_pipelines.sources.entries import Entry, make_entry
from data_pipelines.sources.tables import TableColumns, table_source

_SCORES = ("clip_sim_source", "clip_sim_target", "clip_sim_dir", "clip_sim_image", "dinov2_sim", "ssim")
_CAPTIONS = ("source_caption", "target_caption")
_LICENSE = "CC-BY-4.0"


def _convert(row: dict[str, Any], stem: str, number: int) -> Entry:
    return make_entry(
        id=f"{stem.split('-')[0]}/{row['idx']}",  # unique in a split, as in FreeForm_0-00000-of-00071
        dataset="ultraedit",
        source=row["source_image"],
        target=row["edited_image"],
        instructions=[row["edit_prompt"]],
        captions=[row.get(name) for name in _CAPTIONS],
        scores=finite_scores({name: row.get(name) for name in _SCORES}),
        mask=row.get("mask_image"),
        license=_LICENSE,
    )


SOURCE = table_source(
    "ultraedit",
    _LICENSE,
    _convert,
    TableColumns(
        images=("source_image", "edited_image"),
        needed=("idx", "edit_prompt"),
        optional_images=("mask_image",),
        optional=(*_SCORES, *_CAPTIONS),
    ),
)
