"""InstructPix2Pix: tables (instructpix2pix-clip-filtered), or the original directories, unpacked or in zip files.

The original has `seeds.json`, pairs [name, [seed, ...]], and for each name a directory with `prompt.json`, images
`SEED_0.jpg` and `SEED_1.jpg`, and `metadata.jsonl` with the scores of each seed.
"""

import contextlib
import json
import posixpath
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from data_pipelines.reasons import Reason
from data_pipelines.record import finite_scores
from data_pipelines.sources.archives import tail
from data_pipelines.sources.entries import MAX_FILE_BYTES, Entry, Part, Refused, SourceFormat, make_entry
from data_pipelines.sources.files import find, open_input, read_below, relative_name, safe_name
from data_pipelines.sources.lists import json_items
from data_pipelines.sources.tables import TableColumns, convert_rows, find_tables, table_parts
from varedit_jax.errors import UserError

_NAME = "instruct_pix2pix"
_SEEDS = "seeds.json"
_COLUMNS = TableColumns(
    images=("original_image", "edited_image"), needed=("edit_prompt",), optional=("original_prompt", "edited_prompt")
)
_SCORES = ("clip_sim_0", "clip_sim_1", "clip_sim_dir", "clip_sim_image")


def _parts(inputs: Sequence[str], options: Mapping[str, str]) -> list[Part]:
    parts = table_parts(_NAME, inputs, find_tables(inputs))
    for seeds in find(inputs, _SEEDS):
        directory = posixpath.dirname(seeds)
        zips = find([directory], "*.zip")
        parts += [Part(source=_NAME, name=relative_name(store, inputs), files=(seeds, store)) for store in zips]
        if not zips:
            parts.append(Part(source=_NAME, name=relative_name(seeds, inputs), files=(seeds, directory)))
    if not parts:
        raise UserError(
            f"there is neither a *.parquet nor a seeds.json under {', '.join(inputs)}; "
            f"give the data set as it was downloaded"
        )
    return parts


def _read(part: Part) -> Iterator[Entry]:
    if posixpath.basename(part.files[0]) != _SEEDS:
        yield from convert_rows(part, _convert_row, _COLUMNS)
        return
    seeds, store = part.files
    try:
        with contextlib.ExitStack() as stack:
            files: _Files = stack.enter_context(_Zip(store)) if store.endswith(".zip") else _Directory(store)
            for _, value in json_items(seeds):
                yield from _read_directory(files, value)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        yield Refused(id=part.name, dataset=_NAME, reason=Reason.ARCHIVE, detail=str(error))


def _convert_row(row: dict[str, Any], table: str, number: int) -> Entry:
    return make_entry(
        id=f"{table}/{number}",
        dataset=_NAME,
        source=row["original_image"],
        target=row["edited_image"],
        instructions=[row["edit_prompt"]],
        captions=[row.get("original_prompt"), row.get("edited_prompt")],
    )


class _Files(Protocol):
    def has(self, directory: str) -> bool:
        """Returns True if this directory is here, rather than in another zip file."""

    def read(self, name: str) -> bytes | None:
        """Returns a file's bytes; None if it is missing or damaged."""


class _Directory:
    def __init__(self, path: str) -> None:
        self._path = path

    def has(self, directory: str) -> bool:
        return True

    def read(self, name: str) -> bytes | None:
        data = read_below([self._path], name)
        return data if isinstance(data, bytes) else None


class _Zip:
    """A zip file, whose directories are found by name at any depth."""

    def __init__(self, path: str) -> None:
        self._file = open_input(path)
        self._zip = zipfile.ZipFile(self._file)
        self._names: dict[str, str] = {}  # of members by their last two components
        for info in self._zip.infolist():
            name = safe_name(info.filename)
            if name is not None and not info.is_dir() and info.file_size <= MAX_FILE_BYTES:
                self._names[tail(name)] = info.filename
        self._directories = {name.split("/")[0] for name in self._names}

    def __enter__(self) -> "_Zip":
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()
        self._file.close()

    def has(self, directory: str) -> bool:
        return tail(directory, 1) in self._directories

    def read(self, name: str) -> bytes | None:
        if tail(name) not in self._names:
            return None
        try:
            return self._zip.read(self._names[tail(name)])
        except (zipfile.BadZipFile, zlib.error, EOFError):  # other members are unaffected
            return None


def _read_directory(files: _Files, value: Any) -> Iterator[Entry]:
    """Yields the records of one entry of seeds.json."""
    name = safe_name(value[0]) if isinstance(value, list) and len(value) == 2 else None
    if name is None or not isinstance(value[1], list):
        reason = Reason.UNSAFE if name is None and isinstance(value, list) and value else Reason.ANNOTATION
        yield Refused(id=f"seeds.json: {str(value)[:80]}", dataset=_NAME, reason=reason)
        return
    if not files.has(name):
        return
    prompt: Any = {}
    with contextlib.suppress(ValueError, RecursionError):
        prompt = json.loads(files.read(f"{name}/prompt.json") or b"{}")
    prompt = prompt if isinstance(prompt, dict) else {}
    scores = _scores(files.read(f"{name}/metadata.jsonl") or b"")
    for seed in value[1]:
        if safe_name(str(seed)) is None:
            yield Refused(id=f"{name}/{seed}", dataset=_NAME, reason=Reason.UNSAFE)
            continue
        yield make_entry(
            id=f"{name}/{seed}",
            dataset=_NAME,
            source=files.read(f"{name}/{seed}_0.jpg"),
            target=files.read(f"{name}/{seed}_1.jpg"),
            instructions=[prompt.get("edit")],
            captions=[prompt.get(name) for name in ("caption", "input", "output")],
            scores=scores.get(str(seed), {}),
            original=name,  # images of one prompt are similar
        )


def _scores(lines: bytes) -> dict[str, dict[str, float]]:
    """Returns scores by seed."""
    found = {}
    for line in lines.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                found[str(value.get("seed"))] = finite_scores({name: value.get(name) for name in _SCORES})
    return found


SOURCE = SourceFormat(name=_NAME, license="", parts=_parts, read=_read)
