"""Tables, row by row, and sources that consist of such tables: Parquet, or Arrow as `datasets.save_to_disk` writes it.

Memory is about twice a row group, since writers of Parquet put all images of one into one page. Published row groups
have 100 to 1000 rows.
"""

import base64
import binascii
import contextlib
import fnmatch
import functools
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.reasons import Reason
from data_pipelines.sources.entries import Entry, Part, Refused, SourceFormat
from data_pipelines.sources.files import distinct, find, open_input, read_below, relative_name, stem
from varedit_jax.errors import UserError

_ROWS = 16  # per batch; a row may hold three images of several megabytes
_BUFFER = 1 << 20  # bytes of read-ahead per column
_LONGEST_NAME, _LONGEST_PATH = 255, 4096  # characters
_DAMAGE = (OSError, pa.ArrowException)  # Arrow's OSErrors are about the format, as reading raises ReadError


# A row, in which images are bytes, or the reason why there are none; what its id begins with; its number in the table.
Convert = Callable[[dict[str, Any], str, int], Entry]


class TableColumns(NamedTuple):
    """Columns of a table."""

    images: tuple[str, ...]  # needed too
    needed: tuple[str, ...]
    optional_images: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    advice: str = "is it a table of this data set?"  # if one is missing


def image_of(value: Any, directories: Sequence[str]) -> bytes | Reason | None:
    """Returns an image of a table; None if there is none.

    It is bytes, a struct of `bytes` and `path`, the name of a file in one of the directories, Base64, or a list of one
    of these.
    """
    if isinstance(value, list):
        if len(value) > 1:
            return Reason.SEVERAL
        value = value[0] if value else None
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        data = _decoded(value)
        return read_below(directories, value) if data is None else data
    return value if isinstance(value, bytes) else None


def _decoded(text: str) -> bytes | None:
    """Returns what a text is in Base64; None for the name of a file, which is shorter, or has a suffix."""
    if len(text) <= _LONGEST_NAME or ("." in text and len(text) <= _LONGEST_PATH):
        return None
    try:
        return base64.b64decode(text.rpartition("base64,")[2], validate=True)
    except (binascii.Error, ValueError):
        return None


def find_tables(inputs: Sequence[str]) -> list[str]:
    """Returns the tables of a data set. Raises UserError if records of two would have the same ids."""
    files = find(inputs, "*.parquet", "*.arrow")
    files = [file for file in files if not fnmatch.fnmatch(posixpath.basename(file), "cache-*.arrow")]  # of `datasets`
    distinct([file for file in files if not _is_arrow(file)])
    return files


def table_parts(source: str, inputs: Sequence[str], files: Sequence[str]) -> list[Part]:
    """Returns the parts of tables, with the directories in which images may lie."""
    return [
        Part(
            source=source,
            name=relative_name(file, inputs),
            files=(file, *dict.fromkeys([posixpath.dirname(file), *(path for path in inputs if path not in files)])),
        )
        for file in files
    ]


def _is_arrow(file: str) -> bool:
    return file.endswith(".arrow")


def _label(part: Part) -> str:
    """Returns what ids of a table's rows begin with. Arrow files have the same names in all data sets."""
    return posixpath.splitext(part.name)[0] if _is_arrow(part.files[0]) else stem(part.files[0])


def table_source(
    name: str,
    license: str,
    convert: Convert,
    columns: TableColumns,
) -> SourceFormat:
    """Returns the format of a data set of tables: rows are records, files are parts."""

    def parts(inputs: Sequence[str], options: Mapping[str, str]) -> list[Part]:
        files = find_tables(inputs)
        if not files:
            raise UserError(f"there is no *.parquet or *.arrow under {', '.join(inputs)}; give the tables of {name}")
        return table_parts(name, inputs, files)

    def read(part: Part) -> Iterator[Entry]:
        return convert_rows(part, convert, columns)

    return SourceFormat(name=name, license=license, parts=parts, read=read)


def convert_rows(part: Part, convert: Convert, columns: TableColumns) -> Iterator[Entry]:
    """Yields an entry per row of the part's table."""
    images = (*columns.images, *columns.optional_images)
    for number, row in read_table(part, columns):
        if not isinstance(row, Refused):
            row |= {name: image_of(row[name], part.files[1:]) for name in images if name in row}
        yield row if isinstance(row, Refused) else convert(row, _label(part), number)


class _Group(NamedTuple):
    """Rows of a table that are damaged together."""

    rows: int | None  # None if they are not counted beforehand, and go on to the end
    batches: Callable[[list[str]], Iterator[pa.RecordBatch]]  # of columns


class _Table(Protocol):
    names: list[str]  # of columns

    def groups(self) -> Iterator[_Group]:
        """Yields the rows in order."""


class _Parquet:
    def __init__(self, file: Any) -> None:
        self._table = pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER, page_checksum_verification=True)
        self.names: list[str] = self._table.schema_arrow.names

    def groups(self) -> Iterator[_Group]:
        for group in range(self._table.num_row_groups):
            batches = functools.partial(self._table.iter_batches, _ROWS, [group])
            yield _Group(self._table.metadata.row_group(group).num_rows, batches)


class _Arrow:
    def __init__(self, file: Any) -> None:
        is_stream = file.peek(6)[:6] != b"ARROW1"
        self._reader = pa.ipc.open_stream(file) if is_stream else pa.ipc.open_file(file)
        self._is_stream = is_stream
        self.names: list[str] = self._reader.schema.names

    def groups(self) -> Iterator[_Group]:
        if self._is_stream:
            yield _Group(None, lambda columns: self._slices(self._reader, columns))
            return
        for number in range(self._reader.num_record_batches):
            yield _Group(None, lambda columns, number=number: self._slices([self._reader.get_batch(number)], columns))  # type: ignore[misc]

    def _slices(self, batches: Any, columns: list[str]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS):
                yield batch.slice(start, _ROWS).select(columns)


def _open_table(file: Any, path: str, columns: TableColumns) -> tuple[_Table, list[str]]:
    """Returns a table, and those of the columns that it has. Raises UserError if it lacks one that is needed."""
    table: _Table = _Arrow(file) if _is_arrow(path) else _Parquet(file)
    for name in (*columns.needed, *columns.images):
        if name not in table.names:
            raise UserError(f"{path} has no column {name!r}, but {', '.join(table.names)}; {columns.advice}")
    optional = [name for name in (*columns.optional_images, *columns.optional) if name in table.names]
    return table, [*dict.fromkeys([*columns.images, *columns.needed, *optional])]


def table_columns(path: str) -> list[str]:
    """Returns the names of a table's columns; [] if it is damaged, which is for `read_table` to find."""
    with open_input(path) as file, contextlib.suppress(*_DAMAGE):
        return (_Arrow(file) if _is_arrow(path) else _Parquet(file)).names
    return []


def check_columns(path: str, columns: TableColumns) -> None:
    """Raises UserError if a table lacks a column that is needed; damage is for `read_table` to find."""
    with open_input(path) as file, contextlib.suppress(*_DAMAGE):
        _open_table(file, path, columns)


def read_table(part: Part, columns: TableColumns) -> Iterator[tuple[int, dict[str, Any] | Refused]]:
    """Yields the rows of the part's table with their numbers.

    A damaged row group is Refused as one, and reading continues with the next; a file that is not a table is Refused
    as one, too. Raises UserError if a needed column is missing.
    """
    with open_input(path := part.files[0]) as file:
        try:
            table, names = _open_table(file, path, columns)
        except MemoryError:  # Arrow's is an ArrowException too
            raise
        except _DAMAGE as error:
            yield 0, _refused(part, "", error)
            return
        start = 0
        for group in table.groups():
            number = start
            try:
                for batch in group.batches(names):
                    for row in _rows(batch):
                        yield number, row if isinstance(row, dict) else _refused_row(part, number, row)
                        number += 1
            except MemoryError:
                raise
            except _DAMAGE as error:
                last = "" if group.rows is None else start + group.rows - 1
                yield number, _refused(part, f" rows {number}-{last}", error)
            start = number if group.rows is None else start + group.rows


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
