"""UltraEdit: tables that contain the images, with masks (UltraEdit) or without (UltraEdit_500k)."""

from typing import Any

from data_pipelines.record import finite_scores
from data_pipelines.sources.entries import Entry, make_entry
from data_pipelines.sources.tables import image_bytes, table_source

_SCORES = ("clip_sim_source", "clip_sim_target", "clip_sim_dir", "clip_sim_image", "dinov2_sim", "ssim")
_LICENSE = "CC-BY-4.0"


def _convert(row: dict[str, Any], stem: str, number: int) -> Entry:
    return make_entry(
        id=f"{stem.split('-')[0]}/{row['idx']}",  # unique in a split, as in FreeForm_0-00000-of-00071
        dataset="ultraedit",
        source=image_bytes(row["source_image"]),
        target=image_bytes(row["edited_image"]),
        instructions=[row["edit_prompt"]],
        scores=finite_scores({name: row.get(name) for name in _SCORES}),
        mask=image_bytes(row.get("mask_image")),
        license=_LICENSE,
    )


SOURCE = table_source(
    "ultraedit",
    _LICENSE,
    _convert,
    needed=("idx", "source_image", "edited_image", "edit_prompt"),
    optional=(*_SCORES, "mask_image"),
)
