"""Any table with a source, a target and an instruction in each row, by the names of its columns: Parquet, or Arrow.

The options `source`, `target`, `instruction`, `id`, `kind`, `turn`, `original`, `mask`, `license` and `scores` name
columns, by default those of the same name; `instruction` and `scores` may name several, joined by `+`. `dataset` names
the data set. HQ-Edit, and AnyEdit:

    --source_options=dataset=hq_edit,source=input_image,target=output_image,instruction=edit
    --source_options=dataset=anyedit,source=image_file,target=edited_file,instruction=edit_instruction,kind=edit_type
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.record import finite_scores
from data_pipelines.sources.entries import Entry, Part, SourceFormat, make_entry
from data_pipelines.sources.tables import TableColumns, check_columns, convert_rows, find_tables, table_parts
from varedit_jax.errors import UserError

_NAME = "table"
_IMAGES = ("source", "target")
_TEXTS = ("id", "kind", "license", "original")
_FIELDS = (*_IMAGES, "instruction", "mask", "turn", "scores", *_TEXTS)
_ADVICE = "say which columns the source, the target and the instruction are with --source_options=source=NAME,..."


def _names(options: Mapping[str, str], field: str) -> list[str]:
    return options.get(field, field).split("+")


def _columns(options: Mapping[str, str]) -> TableColumns:
    """Returns the columns of a table: those that options name are needed."""
    images = [*_IMAGES, *(["mask"] if "mask" in options else [])]
    named = [field for field in _FIELDS if field in options and field not in images]
    return TableColumns(
        images=tuple(options.get(field, field) for field in images),
        needed=tuple(name for field in dict.fromkeys(["instruction", *named]) for name in _names(options, field)),
        optional_images=("mask",),
        optional=tuple(field for field in (*_TEXTS, "turn") if field not in named),
        advice=_ADVICE,
    )


def _parts(inputs: Sequence[str], options: Mapping[str, str]) -> list[Part]:
    files = find_tables(inputs)
    if not files:
        raise UserError(f"there is no *.parquet or *.arrow under {', '.join(inputs)}; give tables")
    check_columns(files[0], _columns(options))
    return [Part(**vars(part) | {"options": options}) for part in table_parts(_NAME, inputs, files)]


def _read(part: Part) -> Iterator[Entry]:
    return convert_rows(part, functools.partial(_convert, part.options), _columns(part.options))


def _convert(options: Mapping[str, str], row: dict[str, Any], table: str, number: int) -> Entry:
    values = {field: row.get(options.get(field, field)) for field in _FIELDS}
    texts = {field: "" if values[field] is None else str(values[field]) for field in _TEXTS}
    wordings = [row[name] for name in _names(options, "instruction")]
    turn = values["turn"]
    return make_entry(
        dataset=options.get("dataset", _NAME),
        source=values["source"],
        target=values["target"],
        instructions=[text for each in wordings for text in (each if isinstance(each, list) else [each])],
        mask=values["mask"],
        turn=int(turn) if isinstance(turn, (int, float)) and 0 <= turn < 2**31 else 0,
        scores=finite_scores({name: row.get(name) for name in _names(options, "scores")}),
        **texts | {"id": texts["id"] or f"{table}/{number}"},
    )


SOURCE = SourceFormat(name=_NAME, license="", parts=_parts, read=_read, options=("dataset", *_FIELDS))
