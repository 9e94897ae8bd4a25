"""X2Edit: tars `BUILDER/SHARD/N.tar` with `ID.1.0.jpg` (source), `ID.1.1.jpg` (mask, not always), `ID.2.jpg` (target),
`ID.json` and `ID.txt`.

The JSON describes the triple: its keys differ between builders, and scores may be text like "[9, 8]".
"""

import ast
import contextlib
import json
from collections.abc import Mapping
from typing import Any

from data_pipelines.record import finite_scores
from data_pipelines.sources.entries import Entry, make_entry
from data_pipelines.sources.webdataset import image, images, tar_source

_NAME, _LICENSE = "x2edit", "Apache-2.0"
_INSTRUCTIONS = ("instruction", "instruction_en", "caption_en", "instruction_zh")
_LONGEST = 500  # characters of scores as text; thousands of brackets would exhaust the parser
_KINDS = ("task", "label_fine", "label")


def _convert(id: str, group: Mapping[str, bytes]) -> Entry:
    about: Any = {}
    with contextlib.suppress(ValueError, RecursionError):  # damaged JSON leaves the text alone
        about = json.loads(group.get("json", b"{}"))
    about = about if isinstance(about, dict) else {}
    return make_entry(
        id=id,
        dataset=_NAME,
        source=image(group, "1.0") or image(group, "1"),
        target=image(group, "2"),
        instructions=[*(about.get(name) for name in _INSTRUCTIONS), group.get("txt", b"").decode("utf-8", "replace")],
        kind=next((about[name] for name in _KINDS if isinstance(about.get(name), str)), ""),
        scores=_scores(about),
        mask=image(group, "1.1"),
        license=_LICENSE,
    )


def _scores(about: Mapping[str, Any]) -> dict[str, float]:
    """Returns all values whose names contain `score`; lists, also as text, give one per number."""
    found: dict[str, Any] = {}
    for name, value in about.items():
        if "score" not in name:
            continue
        if isinstance(value, str) and len(value) < _LONGEST and value.startswith(("[", "(")):
            with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError):
                value = ast.literal_eval(value)
        if isinstance(value, (list, tuple)):
            found |= {f"{name}_{place}": number for place, number in enumerate(value)}
        else:
            found[name] = value
    return finite_scores(found)


SOURCE = tar_source(
    _NAME, _LICENSE, (*images("1.0"), *images("1.1"), *images("1"), *images("2"), "json", "txt"), _convert
)
