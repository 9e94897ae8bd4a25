"""GPT-Image-Edit-1.5M: archives of inputs and outputs, `gpt-edit/{hqedit,omniedit,ultraedit}.tar.gz.part000`.

Instructions are in `training_json/*.json` beside them (an array of `image`: [input, output] and `conversations`), or
else in `TASK/metadata/*.json` inside the archives (an array of `id`, `task`, `input`, `output`, `instruction`), which
takes another pass. A part is one of the three families. Its archive holds all inputs of a task before its outputs, so
it is read at two positions at once.
"""

import json
import posixpath
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.reasons import Reason
from data_pipelines.sources.archives import PATTERNS, Member, group_parts, members
from data_pipelines.sources.entries import Entry, Part, Refused, SourceFormat
from data_pipelines.sources.files import find, safe_name, stem
from data_pipelines.sources.join import Stream, Wanted, joined
from data_pipelines.sources.lists import json_items
from varedit_jax.errors import UserError

_NAME, _LICENSE = "gpt_image_edit", "CC-BY-4.0"

# Directory to which the names in a training JSON are relative.
_TRAINING = {
    "hqedit_gpt_edit": "hqedit/edit",
    "hqedit_gpt_generate": "hqedit/generate",
    "omniedit_gpt": "omniedit",
    "omniedit_gpt_rewrite": "omniedit",
    "complexedit_gpt": "omniedit/complex-edit",
    "ultraedit_gpt": "ultraedit",
}


def _parts(inputs: Sequence[str], options: Mapping[str, str]) -> list[Part]:
    archives = group_parts(find(inputs, *PATTERNS))
    if not archives:
        raise UserError(f"there is no *.tar.gz.part* under {', '.join(inputs)}; give the directory gpt-edit")
    lists = [file for file in find(inputs, "*.json") if stem(file) in _TRAINING]
    parts = []
    for name, files in archives.items():
        family = posixpath.basename(name).split(".")[0]
        own = [file for file in lists if _TRAINING[stem(file)].split("/")[0] == family]
        parts.append(Part(source=_NAME, name=family, files=(*files, *own)))
    return parts


def _read(part: Part) -> Iterator[Entry]:
    archive = [file for file in part.files if not file.endswith(".json")]
    lists = [(file, _TRAINING[stem(file)]) for file in part.files if file.endswith(".json")]
    with tempfile.TemporaryDirectory(prefix="gpt-image-edit-", ignore_cleanup_errors=True) as directory:
        if not lists:
            lists = list(_lists_inside(archive, directory))
        if not lists:
            yield Refused(id=part.name, dataset=_NAME, reason=Reason.ANNOTATION, detail="no list of its edits")
        sides = [Stream([archive], lambda name, side=side: _below(name, side)) for side in ("input", "output")]  # type: ignore[misc]
        yield from joined(_NAME, _LICENSE, sides, lambda: _annotations(lists))


def _below(name: str, side: str) -> str | None:
    """Returns the name, without `gpt-edit/`, of a member in a directory called `side`; None for another member."""
    return name.removeprefix("gpt-edit/") if side in name.split("/")[:-1] else None


def _lists_inside(archive: Sequence[str], directory: str) -> Iterator[tuple[str, str]]:
    """Extracts lists from the archive; yields their paths, and the directories to which their names are relative."""
    for member in members(archive, wanted=lambda name: name.endswith(".json") and "/metadata/" in name):
        if isinstance(member, Member):
            path = posixpath.join(directory, posixpath.basename(member.name))
            with open(path, "wb") as file:
                file.write(member.data)
            yield path, member.name.removeprefix("gpt-edit/").split("/metadata/")[0]


def _annotations(lists: Sequence[tuple[str, str]]) -> Iterator[Wanted | Refused]:
    for file, above in lists:
        try:
            for position, value in json_items(file):
                yield _wanted(f"{stem(file)}/{position}", above, value if isinstance(value, dict) else {})
        except ValueError as error:
            yield Refused(id=stem(file), dataset=_NAME, reason=Reason.ANNOTATION, detail=str(error))


def _wanted(id: str, above: str, value: Mapping[str, Any]) -> Wanted | Refused:
    if "conversations" in value:
        images, instruction = value.get("image"), _first_words(value["conversations"])
    else:
        images, instruction = [value.get("input"), value.get("output")], value.get("instruction")
        id = value["id"] if isinstance(value.get("id"), str) else id
    if not isinstance(images, list) or len(images) < 2 or not all(isinstance(name, str) for name in images):
        return Refused(id=id, dataset=_NAME, reason=Reason.ANNOTATION, detail="no input and output")
    if len(images) > 2:
        return Refused(id=id, dataset=_NAME, reason=Reason.SEVERAL)
    names = [safe_name(name) for name in images]
    if names[0] is None or names[1] is None:
        return Refused(id=id, dataset=_NAME, reason=Reason.UNSAFE, detail=str(images)[:200])
    if not isinstance(instruction, str) or not instruction.strip():
        return Refused(id=id, dataset=_NAME, reason=Reason.INSTRUCTION)
    source, target = (f"{above}/{name}" for name in names)
    kind = source.split("/")[1]  # the directory of the task
    about = {"id": id, "instructions": [instruction], "kind": kind, "original": source}
    return Wanted(json.dumps(about), ((0, source), (1, target)))


def _first_words(conversations: Any) -> str | None:
    """Returns the first human message without its image placeholder; None if there is none."""
    first = conversations[0] if isinstance(conversations, list) and conversations else {}
    text = first.get("value") if isinstance(first, dict) else None
    return text.replace("<image>", "") if isinstance(text, str) else None


SOURCE = SourceFormat(name=_NAME, license=_LICENSE, parts=_parts, read=_read)
