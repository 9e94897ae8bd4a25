"""Data in the format of the VAREdit release: WebDataset tars with `src.jpg`, `tgt.jpg` and `txt` per triple."""

from collections.abc import Mapping

from data_pipelines.sources.entries import Entry, make_entry
from data_pipelines.sources.webdataset import image, images, tar_source


def _convert(id: str, group: Mapping[str, bytes]) -> Entry:
    return make_entry(
        id=id,
        dataset="varedit",
        source=image(group, "src"),
        target=image(group, "tgt"),
        instructions=[group.get("txt", b"").decode("utf-8", "replace")],
    )


SOURCE = tar_source("varedit", "", (*images("src"), *images("tgt"), "txt", "json"), _convert)
