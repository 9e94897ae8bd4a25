"""Parquet tables, row by row, and sources that consist of such tables.

Memory is about twice a row group, since writers put all images of a group into one page. Published row groups have 100
to 1000 rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.reasons import Reason
from data_pipelines.sources.entries import Entry, Part, Refused, SourceFormat
from data_pipelines.sources.files import distinct, find, open_input, relative_name, stem
from varedit_jax.errors import UserError

_ROWS = 16  # per batch; a row may hold three images of several megabytes
_BUFFER = 1 << 20  # bytes of read-ahead per column
_DAMAGE = (OSError, pa.ArrowException)  # Arrow's OSErrors are about the format, as reading raises ReadError


Convert = Callable[[dict[str, Any], str, int], Entry]  # a row, the stem of its file name, its number in the file


def image_bytes(value: Any) -> bytes | None:
    """Returns a published image of a table, which is bytes or a struct with `bytes`; None if there is none."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else None


def table_source(
    name: str,
    license: str,
    convert: Convert,
    needed: Sequence[str],
    optional: Sequence[str] = (),
    pattern: str = "*.parquet",
) -> SourceFormat:
    """Returns the format of a data set of tables: rows are records, files are parts."""

    def parts(inputs: Sequence[str], options: Mapping[str, str]) -> list[Part]:
        files = distinct(find(inputs, pattern))
        if not files:
            raise UserError(f"there is no {pattern} under {', '.join(inputs)}; give the tables of {name}")
        return [Part(source=name, name=relative_name(file, inputs), files=(file,)) for file in files]

    def read(part: Part) -> Iterator[Entry]:
        return convert_rows(part, convert, needed, optional)

    return SourceFormat(name=name, license=license, parts=parts, read=read)


def convert_rows(part: Part, convert: Convert, needed: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Entry]:
    """Yields an entry per row of the part's file; `needed` and `optional` are those of `read_table`."""
    for number, row in read_table(part, needed, optional):
        yield row if isinstance(row, Refused) else convert(row, stem(part.files[0]), number)


def read_table(
    part: Part, needed: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, Any] | Refused]]:
    """Yields the rows of the part's file with their numbers: columns `needed`, and those of `optional` that it has.

    A damaged row group is Refused as one, and reading continues with the next; a file that is not a table is Refused
    as one, too. Raises UserError if a needed column is missing.
    """
    with open_input(path := part.files[0]) as file:
        try:
            table = pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True)
        except MemoryError:  # Arrow's is an ArrowException too
            raise
        except _DAMAGE as error:
            yield 0, _refused(part, "", error)
            return
        names = table.schema_arrow.names
        missing = [name for name in needed if name not in names]
        if missing:
            raise UserError(
                f"{path} has no column {missing[0]!r}, but {', '.join(names)}; is it a table of this data set?"
            )
        columns = [*needed, *(name for name in optional if name in names)]
        start = 0
        for group in range(table.num_row_groups):
            number, stop = start, start + table.metadata.row_group(group).num_rows
            try:
                for batch in table.iter_batches(_ROWS, row_groups=[group], columns=columns):
                    for row in _rows(batch):
                        yield number, row if isinstance(row, dict) else _refused_row(part, number, row)
                        number += 1
            except MemoryError:
                raise
            except _DAMAGE as error:
                yield number, _refused(part, f" rows {number}-{stop - 1}", error)
            start = stop


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # before the first row, if text of any is not UTF-8
        for row in range(batch.num_rows):
            try:
                yield from batch.slice(row, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield error


def _refused_row(part: Part, number: int, error: UnicodeDecodeError) -> Refused:
    return Refused(id=f"{part.name} row {number}", dataset=part.source, reason=Reason.ANNOTATION, detail=str(error))


def _refused(part: Part, where: str, error: Exception) -> Refused:
    detail = " ".join(str(error).split())[:200]
    return Refused(id=f"{part.name}{where}", dataset=part.source, reason=Reason.ARCHIVE, detail=detail)
