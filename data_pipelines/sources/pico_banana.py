"""Pico-Banana-400K: lists `sft.jsonl`, `preference.jsonl`, `multi_turn.jsonl`, and images beside them.

`output_image` is the path of an edited image, such as `images/positive-edit/1.png`. Its source, from Open Images, is at
`local_input_image`, which the publisher's script adds, or in any input directory under the last component of its URL,
or in the archives of Open Images, `train_0.tar.gz`, given beside the lists. `preference.jsonl` lists failed edits,
which are refused. If two edits have the same output, both are refused.
"""

import collections
import json
import posixpath
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.reasons import Reason
from data_pipelines.sources.archives import ENDINGS, group_parts, tail
from data_pipelines.sources.entries import Entry, Part, Refused, SourceFormat, make_entry
from data_pipelines.sources.files import distinct, find, read_below, relative_name, safe_name
from data_pipelines.sources.join import Found, Lost, Stream, Wanted, join
from data_pipelines.sources.lists import PATTERNS, list_name, read_lines
from varedit_jax.errors import UserError

_NAME, _LICENSE = "pico_banana", "CC-BY-NC-ND-4.0"
_SOURCES = "openimage_source_images"  # where the publisher's instructions unpack the archives


def _parts(inputs: Sequence[str], options: Mapping[str, str]) -> list[Part]:
    lists = distinct(find(inputs, *PATTERNS))
    if not lists:
        raise UserError(f"there is no *.jsonl under {', '.join(inputs)}; give sft.jsonl and its images")
    archives = find(inputs, *(f"*{ending}" for ending in ENDINGS), any_split=True)
    directories = [path for path in inputs if path not in (*lists, *archives)]
    return [
        Part(
            source=_NAME,
            name=relative_name(file, inputs),
            files=(file, *dict.fromkeys([posixpath.dirname(file), *directories]), *archives),
        )
        for file in lists
    ]


def _read(part: Part) -> Iterator[Entry]:
    path, *others = part.files
    directories = [other for other in others if not other.endswith(ENDINGS)]
    archives = group_parts([other for other in others if other.endswith(ENDINGS)])
    outputs = collections.Counter(
        edit["target"] for edit in _edits(path) if not isinstance(edit, Refused) and edit["target"]
    )
    twice = {name for name, count in outputs.items() if count > 1}
    for edit in _edits(path):
        if isinstance(edit, Refused):
            yield edit
        elif edit["target"] in twice:
            yield Refused(id=edit["id"], dataset=_NAME, reason=Reason.AMBIGUOUS, detail=str(edit["target"]))
        elif not _packed(edit, directories, archives):
            yield _entry(edit, _source(edit, directories), directories)
    if archives:
        packed = (
            Wanted(json.dumps(edit), ((0, tail(str(safe_name(edit["sources"][0])))),))
            for edit in _edits(path)
            if not isinstance(edit, Refused) and edit["target"] not in twice and _packed(edit, directories, archives)
        )
        for event in join([Stream(list(archives.values()), tail)], packed):
            if isinstance(event, (Found, Lost)):
                source = event.images[0] if isinstance(event, Found) else Reason.MISSING
                yield _entry(json.loads(event.key), source, directories)
            else:
                yield Refused(id=event.name, dataset=_NAME, reason=event.reason, detail=event.detail)


def _packed(edit: Mapping[str, Any], directories: Sequence[str], archives: Mapping[str, Any]) -> bool:
    """Returns True if the source must be read from an archive."""
    named = bool(edit["sources"]) and safe_name(edit["sources"][0]) is not None
    return bool(archives) and named and _source(edit, directories) is Reason.MISSING


def _source(edit: Mapping[str, Any], directories: Sequence[str]) -> bytes | Reason:
    """Returns the first source candidate that exists, or the reason why the first candidate fails."""
    found = [read_below(directories, name) for name in edit["sources"]]
    return next((data for data in found if isinstance(data, bytes)), found[0] if found else Reason.MISSING)


def _entry(edit: Mapping[str, Any], source: bytes | Reason, directories: Sequence[str]) -> Entry:
    target = read_below(directories, edit["target"])
    for side, data, name in (("source", source, edit["original"]), ("target", target, edit["target"])):
        if isinstance(data, Reason):
            return Refused(id=edit["id"], dataset=_NAME, reason=data, detail=f"{side}: {name}"[:200])
    fields = {name: edit[name] for name in ("id", "instructions", "kind", "turn", "original")}
    return make_entry(dataset=_NAME, source=source, target=target, license=_LICENSE, **fields)  # type: ignore[arg-type]


def _edits(path: str) -> Iterator[dict[str, Any] | Refused]:
    for place, value in read_lines(path, _NAME):
        id = f"{list_name(path)}/{place.rpartition(':')[2]}"
        if isinstance(value, Refused):
            yield value
        elif "files" in value:
            yield from _turns(id, value)
        elif "preference" in list_name(path):
            yield Refused(id=id, dataset=_NAME, reason=Reason.FAILED)
        else:
            yield {
                "id": id,
                "sources": _names(value.get("local_input_image"), value.get("open_image_input_url")),
                "target": _text(value.get("output_image")),
                "instructions": [value.get("text"), value.get("summarized_text")],
                "kind": str(value.get("edit_type") or ""),
                "turn": 0,
                "original": _last(value.get("open_image_input_url")),
            }


def _turns(id: str, value: Mapping[str, Any]) -> Iterator[dict[str, Any] | Refused]:
    """Yields the turns of a session with the files `original_input_image`, `edit_turn1`, ..., `final_image`."""
    listed = value["files"] if isinstance(value["files"], list) else []
    files = {file["id"]: file for file in listed if isinstance(file, dict) and isinstance(file.get("id"), str)}
    original = files.get("original_input_image", {})
    edited = sorted((name for name in files if name.startswith("edit_turn")), key=lambda name: (len(name), name))
    edited += ["final_image"] if "final_image" in files else []
    prompts = value.get("metadata_edit_turn_prompts")
    if not edited or not original or not isinstance(prompts, list):
        yield Refused(id=id, dataset=_NAME, reason=Reason.ANNOTATION, detail="no original, turns or prompts")
        return
    local = original.get("local_input_image") or original.get("original_input_image_file")
    sources = _names(local, original.get("url"))
    for turn, name in enumerate(edited):
        target = _text(files[name].get("url"))
        yield {
            "id": f"{id}/{turn}",
            "sources": sources,
            "target": target,
            "instructions": prompts[turn : turn + 1],
            "kind": "",
            "turn": turn,
            "original": _last(original.get("url")),
        }
        sources = [target]


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _last(url: object) -> str:
    """Returns the last component of a URL's path, which identifies an Open Images file; "" if there is none."""
    try:
        return posixpath.basename(urllib.parse.urlparse(url).path) if isinstance(url, str) else ""
    except ValueError:  # such as "http://["
        return ""


def _names(local: object, url: object) -> list[object]:
    last = _last(url)
    return [name for name in (local, last, f"{_SOURCES}/{last}" if last else "") if name]


SOURCE = SourceFormat(name=_NAME, license=_LICENSE, parts=_parts, read=_read)
