"""NHR-Edit: `train/metadata.jsonl` beside `train/images/00/image_XXX_original.jpg` and `image_XXX_edited_Y.jpg`, or
third-party tables that contain the images.
"""

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.reasons import Reason
from data_pipelines.sources.entries import Entry, Part, Refused, SourceFormat, make_entry
from data_pipelines.sources.files import find, read_below
from data_pipelines.sources.lists import Span, is_list, list_parts, read_lines
from data_pipelines.sources.tables import TableColumns, convert_rows, find_tables, table_parts
from varedit_jax.errors import UserError

_NAME, _LICENSE = "nhr_edit", "Apache-2.0"
_COLUMNS = TableColumns(images=("source_image", "edited_image"), needed=("edit_instruction",))


def _parts(inputs: Sequence[str], options: Mapping[str, str]) -> list[Part]:
    lists, tables = find(inputs, "metadata.jsonl", "metadata.jsonl.*"), find_tables(inputs)
    if not lists and not tables:
        raise UserError(
            f"there is neither a metadata.jsonl nor a *.parquet under {', '.join(inputs)}; "
            f"give NHR-Edit as it was downloaded"
        )
    parts = [part for file in lists for part in list_parts(_NAME, inputs, file)]
    return sorted([*parts, *table_parts(_NAME, inputs, tables)], key=lambda part: part.files[0].split("/"))


def _read(part: Part) -> Iterator[Entry]:
    return _read_list(part) if is_list(part.files[0]) else convert_rows(part, _convert_row, _COLUMNS)


def _convert_row(row: dict[str, Any], table: str, number: int) -> Entry:
    return make_entry(
        id=f"{table}/{number}",
        dataset=_NAME,
        source=row["source_image"],
        target=row["edited_image"],
        instructions=[row["edit_instruction"]],
        license=_LICENSE,
    )


def _read_list(part: Part) -> Iterator[Entry]:
    file, directory, *inputs = part.files
    directories = [directory, posixpath.dirname(directory), *inputs]
    for place, value in read_lines(file, _NAME, Span.of(part.options)):
        yield value if isinstance(value, Refused) else _convert(value, place, directories)


def _convert(value: Mapping[str, Any], place: str, directories: Sequence[str]) -> Entry:
    names = (value.get("source_file_name"), value.get("edited_file_name"))
    id = str(value.get("sample_id") or place)
    images = [read_below(directories, name) for name in names]
    for name, image in zip(names, images, strict=True):
        if isinstance(image, Reason):
            return Refused(id=id, dataset=_NAME, reason=image, detail=str(name)[:200])
    source, target = (image for image in images if isinstance(image, bytes))
    others = value.get("augmented_instructions")
    shared = re.match(r"(.+)_(?:original|edited)", posixpath.basename(str(names[0])))
    return make_entry(
        id=id,
        dataset=_NAME,
        source=source,
        target=target,
        instructions=[value.get("edit_instruction"), *(others if isinstance(others, list) else [])],
        kind=str(value.get("category") or ""),
        license=_LICENSE,
        original=shared[1] if shared else str(names[0]),  # edits of edits share the original
    )


SOURCE = SourceFormat(name=_NAME, license=_LICENSE, parts=_parts, read=_read)
