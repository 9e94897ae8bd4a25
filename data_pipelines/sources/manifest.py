"""A user's JSONL list: one object per line with `source`, `target` and `instruction`.

Names of images are relative to the list's directory, or to the option `root`; absolute ones, and those with `..`, lead
there or below an input directory. The options `source`, `target` and `instruction` name other fields. Optional fields
are `id`, `instructions` (other wordings), `kind`, `turn`, `scores`, `mask`, `license` and `original` (earlier lists
have `licence` and `picture`). The option `dataset` names the data set, by default after the list.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.reasons import Reason
from data_pipelines.record import finite_scores
from data_pipelines.sources.entries import Entry, Part, Refused, SourceFormat, make_entry
from data_pipelines.sources.files import distinct, find, read_below
from data_pipelines.sources.lists import PATTERNS, Span, list_name, list_parts, read_lines
from varedit_jax.errors import UserError
from varedit_jax.storage.paths import resolve

_NEEDED = ("source", "target", "instruction")
_LONGEST = 200  # characters of a detail


def _parts(inputs: Sequence[str], options: Mapping[str, str]) -> list[Part]:
    files = distinct(find(inputs, *PATTERNS))
    if not files:
        raise UserError(f"there is no *.jsonl under {', '.join(inputs)}; give a list of images")
    root = resolve(options["root"]) if options.get("root") else None
    if root and not root.is_dir():
        raise UserError(f"root is {root}, which is no directory; give the one that names of images are relative to")
    return [part for file in files for part in list_parts("manifest", inputs, file, options)]


def _read(part: Part) -> Iterator[Entry]:
    file, directory, *inputs = part.files
    dataset = part.options.get("dataset") or list_name(file)
    root = str(resolve(part.options.get("root") or directory))
    for place, value in read_lines(file, dataset, Span.of(part.options)):
        if isinstance(value, Refused):
            yield value
        else:
            value |= {field: value.get(part.options[field]) for field in _NEEDED if field in part.options}
            yield _convert(value, place, dataset, list(dict.fromkeys([root, *inputs])))


def _convert(value: Mapping[str, Any], place: str, dataset: str, directories: Sequence[str]) -> Entry:
    id = str(place if value.get("id") in (None, "") else value["id"])
    sides: dict[str, bytes] = {}
    for side in ("source", "target", "mask"):
        name = value.get(side)
        if name is None and side == "mask":
            continue
        if side not in value:
            detail = f"no {side}, but {', '.join(value)}; say which one it is: --source_options={side}=NAME"
            return Refused(id=id, dataset=dataset, reason=Reason.ANNOTATION, detail=detail[:_LONGEST])
        data = read_below(directories, name)
        if isinstance(data, Reason):
            detail = f"{side}: {str(name)!r}"[:_LONGEST] + _advice(data, str(name))
            return Refused(id=id, dataset=dataset, reason=data, detail=detail)
        sides[side] = data
    texts = [text for name in ("instruction", "instructions") for text in _as_list(value.get(name))]
    scores, turn = value.get("scores"), value.get("turn")
    return make_entry(
        id=id,
        dataset=dataset,
        source=sides["source"],
        target=sides["target"],
        instructions=texts,
        kind=str(value.get("kind") or ""),
        turn=int(turn) if isinstance(turn, int) and 0 <= turn < 2**31 else 0,
        scores=finite_scores(scores if isinstance(scores, dict) else {}),
        mask=sides.get("mask"),
        license=str(value.get("license") or value.get("licence") or ""),
        original=str(value.get("original") or value.get("picture") or ""),
    )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _advice(reason: Reason, name: str) -> str:
    """Returns what may be wrong with the name of an image, to follow it."""
    if "://" in name:
        return ": an address, download the image"
    if "\ufffd" in name:
        return ": the list is not in UTF-8"
    return ": leads out of the list's directory and the input, see the option root" if reason is Reason.UNSAFE else ""


SOURCE = SourceFormat(name="manifest", license="", parts=_parts, read=_read, options=("dataset", "root", *_NEEDED))
