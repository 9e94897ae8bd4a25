"""ImgEdit: tables of names and instructions, and images in uncompressed tars that are split into parts.

    Parquet/add_part0.parquet                                  input_images, output_images, prompt
    Parquet/content_memory_part2.parquet                       data: the same for each turn of a session
    Singleturn/results_add_laion_part0.tar.split.000           results_add_laion_part0/SAMPLE/original.png, result.png
    Multiturn/results_content_memory_part2.tar.split.000
    all_dataset_gpt_score.json                                 {"results_add_laion_part0/SAMPLE": score}

A part is a table. Its images are read in the order of the table, by an index of the archive's members. Tables do not
name archives: for most, the directory of an image (`results_add_laion_part0`) is also the directory in the archive; for
the others, the archive is named like the table, apart from `results_` and `_laion`. Some tables have only file names.
Different archives have samples of the same name, so no other archive is ever searched. Archives may be unpacked where
they lie: those with a directory of their own as they are, the others into one named like the archive or the table.

A turn without images sets a rule for the following turns, whose instructions it precedes.
"""

import collections
import contextlib
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.reasons import Reason
from data_pipelines.record import finite_scores
from data_pipelines.sources.archives import TarIndex, first_name, group_parts, is_compressed, tail
from data_pipelines.sources.entries import Entry, Part, Refused, SourceFormat, make_entry
from data_pipelines.sources.files import distinct, find, read_below, reading, relative_name, safe_name, stem
from data_pipelines.sources.lists import json_items
from data_pipelines.sources.tables import TableColumns, read_table, table_columns
from varedit_jax.errors import UserError
from varedit_jax.storage.paths import child_names, resolve

_NAME = "imgedit"
_PLACES = ("Singleturn", "Multiturn")
_INSIDE = "mnt/data"  # above the directories in some archives
_OPEN = 32  # archives open at a time
_SCORES = "all_dataset_gpt_score.json"

# Directory in the list of scores, where it differs from that of the images.
_SCORED_AS = {
    "replace": "results",
    "results_extract_ref_part1": "results_extract_laion_part1",
    "results_compose_part6_fix": "results_compose_part6",
}


def _parts(inputs: Sequence[str], options: Mapping[str, str]) -> list[Part]:
    tables = distinct(find(inputs, "*.parquet"))
    archives = find(inputs, "*.tar", "*.tar.split.*", "*.tar.part*", any_split=True)
    archives = [file for file in archives if not posixpath.basename(file).startswith("Benchmark.tar")]
    directories = _image_directories(inputs, archives)
    if not tables or not (archives or directories):
        lacks = "*.parquet" if not tables else "*.tar.split.*"
        raise UserError(f"there is no {lacks} under {', '.join(inputs)}; give the directory of ImgEdit")
    scores = find(inputs, _SCORES)
    return [
        Part(source=_NAME, name=relative_name(table, inputs), files=(table, *scores, *archives, *directories))
        for table in tables
    ]


def _read(part: Part) -> Iterator[Entry]:
    table, *others = part.files
    archives = group_parts(others)
    packed = {file for files in archives.values() for file in files}
    directories = [file for file in others if file not in packed and not file.endswith(".json")]
    name = stem(table)
    with contextlib.ExitStack() as stack:
        images = _Images(name, archives, directories, stack)
        scores = _Scores([file for file in others if file.endswith(".json")])
        for number, row in read_table(part, _columns(table)):
            if isinstance(row, Refused):
                yield row
                continue
            turns, id = row.get("data"), f"{name}/{number}"
            if turns is None:
                yield _entry(id, name, row, [row.get("prompt")], 0, images, scores)
            else:
                yield from _session(id, name, turns, images, scores)
        for index in images.indices.values():
            for damage in index.damage:
                yield Refused(id=damage.name, dataset=_NAME, reason=damage.reason, detail=damage.detail)


def _image_directories(inputs: Sequence[str], archives: Sequence[str]) -> list[str]:
    """Returns the directories in which archives may have been unpacked, each to a directory."""
    tops = [*inputs, *(posixpath.join(path, name) for path in inputs for name in _PLACES)]
    tops += map(posixpath.dirname, archives)
    places = [place for top in tops for place in (top, posixpath.join(top, _INSIDE))]
    found = []
    for place in dict.fromkeys(places):
        with reading(place):
            names = set(child_names(resolve(place))) - {"Parquet", "Benchmark", "mnt", *_PLACES}
            if any((resolve(place) / name).is_dir() for name in names if "." not in name):
                found.append(place)
    return found


def _columns(table: str) -> TableColumns:
    """Returns the columns of a table, which is of sessions or of single turns."""
    needed = ("data",) if "data" in table_columns(table) else ("input_images", "output_images", "prompt")
    return TableColumns(images=(), needed=needed)


def _session(id: str, table: str, turns: Sequence[Any], images: "_Images", scores: "_Scores") -> Iterator[Entry]:
    rules: list[str] = []
    for turn, value in enumerate(each or {} for each in turns):
        if not value.get("input_images") and not value.get("output_images"):
            yield Refused(id=f"{id}/{turn}", dataset=_NAME, reason=Reason.NO_IMAGES)
            rules += [value["prompt"].strip()] if value.get("prompt") else []
            continue
        prompt = value.get("prompt")
        instruction = " ".join([*rules, prompt]) if isinstance(prompt, str) and prompt.strip() else None
        yield _entry(f"{id}/{turn}", table, value, [instruction], turn, images, scores)


def _entry(
    id: str,
    table: str,
    value: Mapping[str, Any],
    instructions: Sequence[Any],
    turn: int,
    images: "_Images",
    scores: "_Scores",
) -> Entry:
    sources, targets = value.get("input_images") or [], value.get("output_images") or []
    if len(sources) > 1 or len(targets) > 1:
        return Refused(id=id, dataset=_NAME, reason=Reason.SEVERAL, detail=f"{len(sources)} in, {len(targets)} out")
    sides: dict[str, bytes] = {}
    for side, names in (("source", sources), ("target", targets)):
        data = images.read(names[0]) if names else Reason.MISSING
        if isinstance(data, Reason):
            return Refused(id=id, dataset=_NAME, reason=data, detail=f"{side}: {names}"[:200])
        sides[side] = data
    directory, sample = _directory(sources[0]), _parent(sources[0])
    return make_entry(
        id=id,
        dataset=_NAME,
        **sides,
        instructions=instructions,
        kind=re.sub(r"_part\d+$", "", table),
        turn=turn,
        scores=scores.of(directory, sample),
        original=sample,  # an image of LAION, with the same name in all archives
    )


def _directory(name: str) -> str:
    """Returns the directory of samples in an image's name; "" if it has none."""
    return name.rsplit("/", 2)[0].rsplit("/", 1)[-1] if name.count("/") >= 2 else ""


class _Images:
    """Images of a table by name. The `_OPEN` most recently used archives are open."""

    def __init__(
        self,
        table: str,
        archives: Mapping[str, Sequence[str]],
        directories: Sequence[str],
        stack: contextlib.ExitStack,
    ) -> None:
        self._table, self._archives, self._directories, self._stack = table, archives, directories, stack
        self._first = {name: _first_name(files) for name, files in archives.items()}
        self._chosen: dict[str, list[str]] = {}  # archives by directory
        self._like: list[str] | None = None  # unpacked archives that are named like the table
        self._used: collections.OrderedDict[str, None] = collections.OrderedDict()
        self.indices: dict[str, TarIndex] = {}

    def read(self, name: Any) -> bytes | Reason:
        plain = safe_name(name)
        if plain is None:
            return Reason.UNSAFE
        directory = _directory(plain)
        if directory not in self._chosen:
            self._chosen[directory] = self._choose(directory)
        found: bytes | Reason = Reason.MISSING
        for archive in self._chosen[directory]:
            if archive not in self.indices:
                self.indices[archive] = self._stack.enter_context(TarIndex(self._archives[archive]))
            self._used[archive] = None
            self._used.move_to_end(archive)
            if len(self._used) > _OPEN:
                self.indices[self._used.popitem(last=False)[0]].release()
            # Some tables omit the only directory of an archive.
            found = self.indices[archive].read(plain if "/" in plain else f"{_parent(self._first[archive])}/{plain}")
            if isinstance(found, bytes):
                return found
        unpacked = self._read_unpacked(plain)
        return found if unpacked is Reason.MISSING else unpacked

    def _read_unpacked(self, plain: str) -> bytes | Reason:
        """Returns an image of an archive that has been unpacked, to its own directory or one named like it."""
        found: bytes | Reason = Reason.MISSING
        if plain.count("/") >= 2:
            found = read_below(self._directories, tail(plain, 3))
        if found is Reason.MISSING:
            if self._like is None:
                self._like = [place for above in self._directories for place in self._named_like_table(above)]
            found = read_below(self._like, tail(plain))
        return found

    def _named_like_table(self, above: str) -> Iterator[str]:
        for name in child_names(resolve(above)):
            if _plain(name) == _plain(self._table):
                place = posixpath.join(above, name)
                yield place
                while len(inner := child_names(resolve(place))) == 1:  # directories above those of samples
                    place = posixpath.join(place, inner[0])
                    yield place

    def _choose(self, directory: str) -> list[str]:
        same = [name for name, first in self._first.items() if directory and directory in first.split("/")[:-2]]
        like = [name for name in self._archives if _plain(stem(name)) == _plain(self._table)]
        return same or like


def _first_name(files: Sequence[str]) -> str:
    """Returns the name of an archive's first file, "" if it has none. Raises UserError if it is compressed."""
    if is_compressed(files):
        raise UserError(f"{files[0]} is compressed, but the archives of ImgEdit are not; decompress it")
    return first_name(files) or ""


def _parent(name: str) -> str:
    return name.rpartition("/")[0].rpartition("/")[2]


def _plain(name: str) -> str:
    return name.removeprefix("results_").replace("_laion", "")


class _Scores:
    """Scores of samples, read from the list by directory on first use."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files = files
        self._known: dict[str, dict[str, dict[str, float]]] = {}

    def of(self, directory: str, sample: str) -> dict[str, float]:
        if not directory:
            return {}
        if directory not in self._known:
            self._known[directory] = dict(self._read(_SCORED_AS.get(directory, directory)))
        return self._known[directory].get(sample, {})

    def _read(self, directory: str) -> Iterator[tuple[str, dict[str, float]]]:
        for file in self._files:
            try:
                for key, value in json_items(file):
                    above, _, sample = key.rpartition("/")
                    if above.rpartition("/")[2] == directory:
                        yield sample, finite_scores(dict(_numbers("gpt", value)))
            except ValueError as error:
                raise UserError(f"{file} is damaged: {error}; download it again, or leave it out") from error


def _numbers(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yields named numbers of a judge's answer, which is a number, text with numbers, or a nest of these."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _numbers(f"{name}_{key}", each)
    elif isinstance(value, list):
        for place, each in enumerate(value):
            yield from _numbers(f"{name}_{place}", each)
    elif isinstance(value, str):
        yield from _numbers(name, [float(number) for number in re.findall(r"\d+(?:\.\d+)?", value)])
    else:
        yield name, value


SOURCE = SourceFormat(name=_NAME, license="", parts=_parts, read=_read)
