"""A user's JSONL list: one object per line with `source`, `target` and `instruction`.

Names of images are relative to the list's directory, or to the option `root`; absolute ones must be below it. Optional
fields are `id`, `instructions` (other wordings), `kind`, `turn`, `scores`, `mask`, `license` and `original` (earlier
lists have `licence` and `picture`). The option `dataset` names the data set, by default after the list.
"""

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.reasons import Reason
from data_pipelines.record import finite_scores
from data_pipelines.sources.entries import Entry, Part, Refused, SourceFormat, make_entry
from data_pipelines.sources.files import distinct, find, read_below, read_lines, relative_name, stem
from varedit_jax.errors import UserError
from varedit_jax.storage.paths import resolve


def _parts(inputs: Sequence[str], options: Mapping[str, str]) -> list[Part]:
    files = distinct(find(inputs, "*.jsonl"))
    if not files:
        raise UserError(f"there is no *.jsonl under {', '.join(inputs)}; give a list of images")
    root = resolve(options["root"]) if options.get("root") else None
    if root and not root.is_dir():
        raise UserError(f"root is {root}, which is no directory; give the one that names of images are relative to")
    return [Part(source="manifest", name=relative_name(file, inputs), files=(file,), options=options) for file in files]


def _read(part: Part) -> Iterator[Entry]:
    [file] = part.files
    dataset = part.options.get("dataset") or stem(file)
    root = str(resolve(part.options.get("root") or posixpath.dirname(file)))
    for place, value in read_lines(file, dataset):
        yield value if isinstance(value, Refused) else _convert(value, place, dataset, root)


def _convert(value: Mapping[str, Any], place: str, dataset: str, root: str) -> Entry:
    id = str(place if value.get("id") in (None, "") else value["id"])
    sides: dict[str, bytes] = {}
    for side in ("source", "target", "mask"):
        name = value.get(side)
        if name is None and side == "mask":
            continue
        data = read_below([root], name.removeprefix(f"{root}/") if isinstance(name, str) else name)
        if isinstance(data, Reason):
            return Refused(id=id, dataset=dataset, reason=data, detail=f"{side}: {value.get(side)!r}"[:200])
        sides[side] = data
    others, scores, turn = value.get("instructions"), value.get("scores"), value.get("turn")
    return make_entry(
        id=id,
        dataset=dataset,
        source=sides["source"],
        target=sides["target"],
        instructions=[value.get("instruction"), *(others if isinstance(others, list) else [])],
        kind=str(value.get("kind") or ""),
        turn=int(turn) if isinstance(turn, int) and 0 <= turn < 2**31 else 0,
        scores=finite_scores(scores if isinstance(scores, dict) else {}),
        mask=sides.get("mask"),
        license=str(value.get("license") or value.get("licence") or ""),
        original=str(value.get("original") or value.get("picture") or ""),
    )


SOURCE = SourceFormat(name="manifest", license="", parts=_parts, read=_read, options=("dataset", "root"))
