"""NHR-Edit: `train/metadata.jsonl` beside `train/images/00/image_XXX_original.jpg` and `image_XXX_edited_Y.jpg`, or
third-party tables that contain the images.
"""

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.reasons import Reason
from data_pipelines.sources.entries import Entry, Part, Refused, SourceFormat, make_entry
from data_pipelines.sources.files import find, read_below, read_lines, relative_name
from data_pipelines.sources.tables import convert_rows, image_bytes
from varedit_jax.errors import UserError

_NAME, _LICENSE = "nhr_edit", "Apache-2.0"


def _parts(inputs: Sequence[str], options: Mapping[str, str]) -> list[Part]:
    files = find(inputs, "metadata.jsonl", "*.parquet")
    if not files:
        raise UserError(
            f"there is neither a metadata.jsonl nor a *.parquet under {', '.join(inputs)}; "
            f"give NHR-Edit as it was downloaded"
        )
    return [Part(source=_NAME, name=relative_name(file, inputs), files=(file,)) for file in files]


def _read(part: Part) -> Iterator[Entry]:
    if part.files[0].endswith(".parquet"):
        return convert_rows(part, _convert_row, ("source_image", "edit_instruction", "edited_image"))
    return _read_list(part)


def _convert_row(row: dict[str, Any], table: str, number: int) -> Entry:
    return make_entry(
        id=f"{table}/{number}",
        dataset=_NAME,
        source=image_bytes(row["source_image"]),
        target=image_bytes(row["edited_image"]),
        instructions=[row["edit_instruction"]],
        license=_LICENSE,
    )


def _read_list(part: Part) -> Iterator[Entry]:
    directory = posixpath.dirname(part.files[0])
    for place, value in read_lines(part.files[0], _NAME):
        yield value if isinstance(value, Refused) else _convert(value, place, (directory, posixpath.dirname(directory)))


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
