"""OmniEdit-Filtered: tables with several wordings per instruction, and scores by a judge."""

from typing import Any

from data_pipelines.record import finite_scores
from data_pipelines.sources.entries import Entry, make_entry
from data_pipelines.sources.tables import TableColumns, table_source

_SCORES = ("sc_score_1", "sc_score_2", "pq_score", "o_score")
_LICENSE = "MIT"


def _convert(row: dict[str, Any], stem: str, number: int) -> Entry:
    texts = row["edited_prompt_list"] or ()
    return make_entry(
        id=str(row["omni_edit_id"]),
        dataset="omniedit",
        source=row["src_img"],
        target=row["edited_img"],
        instructions=[texts] if isinstance(texts, str) else texts,  # a str would be split into characters
        kind=str(row.get("task") or ""),
        scores=finite_scores({name: row.get(name) for name in _SCORES}),
        license=_LICENSE,
    )


SOURCE = table_source(
    "omniedit",
    _LICENSE,
    _convert,
    TableColumns(
        images=("src_img", "edited_img"), needed=("omni_edit_id", "edited_prompt_list"), optional=("task", *_SCORES)
    ),
)
