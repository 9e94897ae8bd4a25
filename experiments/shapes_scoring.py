"""Scores of an editor and two baselines on held-out `shapes`: exact edits by kind; and contact sheets."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipelines.shapes.edits import KINDS
from data_pipelines.shapes.judge import Verdict, judge_batch
from data_pipelines.shapes.scene import Scene
from varedit_jax.contact_sheet import SheetRow, contact_sheet
from varedit_jax.parallel.compiler_options import jit_everywhere
from varedit_jax.sampling.editor import Editor
from varedit_jax.training.tokenizer_step import make_reconstruct

BATCH = 50  # edits per call, so that one program is compiled


@dataclasses.dataclass(frozen=True)
class Score:
    """Shares of edits that are right."""

    edits: int
    done: float  # share with the requested change
    kept: float  # share with everything else unchanged
    exact: float  # share with both


def score(verdicts: Sequence[Verdict]) -> Score:
    """Returns the shares over verdicts."""
    done, kept, exact = ([getattr(v, name) for v in verdicts] for name in ("done", "kept", "exact"))
    return Score(len(verdicts), float(np.mean(done)), float(np.mean(kept)), float(np.mean(exact)))


def judge_records(images: NDArray[np.uint8], records: Sequence[Any]) -> list[Verdict]:
    """Returns the verdict of each image, uint8 [n, y, x, 3], against its example."""
    scenes = [[Scene.decode(record[side]) for record in records] for side in ("source_scene", "target_scene")]
    return judge_batch(images, *scenes)


def edit_records(
    editor: Editor, records: Sequence[Any], every_scale: bool = False, on_batch: Callable[[int], None] = lambda n: None
) -> NDArray[np.uint8]:
    """Returns edits of examples, uint8 [1 or K, n, y, x, 3]; the seed of an edit is its index."""
    parts = []
    for start in range(0, len(records), BATCH):
        batch = list(records[start : start + BATCH])
        filled = batch + [batch[-1]] * (min(BATCH, len(records)) - len(batch))
        request = _request(filled, range(start, start + len(filled)))
        images = editor.edit_fitted(*request, every_scale=every_scale)
        parts.append(images[:, : len(batch)])
        on_batch(len(batch))
    return np.concatenate(parts, axis=1)


def by_group(verdicts: Sequence[Verdict], records: Sequence[Any]) -> dict[str, Score]:
    """Returns scores of all edits, of each kind, and of each novelty (unseen scene, unseen combination)."""
    groups = {"all": list(verdicts)}
    for name, field in [(kind, "kind") for kind in KINDS] + [("scene", "novelty"), ("combination", "novelty")]:
        members = [v for v, record in zip(verdicts, records, strict=True) if record[field] == name]
        if members:
            groups[name if field == "kind" else f"unseen {name}"] = members
    return {name: score(members) for name, members in groups.items()}


def prepare_sheet(editor: Editor, records: Sequence[Any]) -> None:
    """Compiles what `sample_sheet` needs for at most `BATCH` examples; the editor's parameters may be abstract."""
    editor.prepare(*_request(records, range(len(records))), every_scale=True)


def _request(records: Sequence[Any], seeds: Sequence[int]) -> tuple[NDArray[np.uint8], list[str], Sequence[int]]:
    return np.stack([record["source"] for record in records]), [record["instruction"] for record in records], seeds


def sheet(records: Sequence[Any], images: NDArray[np.uint8], heading: str = "") -> Image.Image:
    """Returns a contact sheet: source, the image after each scale, target, with instruction and verdict.

    `images` are uint8 [K, n, y, x, 3], after each scale; the last is the result. Only examples of `shapes`, which
    describe their scenes, get a verdict.
    """
    judged = "source_scene" in records[0]
    verdicts = [verdict.exact for verdict in judge_records(images[-1], records)] if judged else [None] * len(records)
    scales = [f"scale {k + 1}" for k in range(len(images) - 1)]
    rows = [
        SheetRow(
            images=[record["source"], *images[:, i], record["target"]],
            instruction=record["instruction"],
            kind=record.get("kind", ""),
            verdict=verdicts[i],
        )
        for i, record in enumerate(records)
    ]
    return contact_sheet(rows, ["source", *scales, "result", "target"], heading=heading)


def sample_sheet(editor: Editor, records: Sequence[Any]) -> Image.Image:
    """Edits examples, and returns their contact sheet."""
    return sheet(records, edit_records(editor, records, every_scale=True))


def evaluate(editor: Editor, records: Sequence[Any], edited: NDArray[np.uint8]) -> dict[str, dict[str, Score]]:
    """Returns scores by group of the editor, whose images are `edited` (uint8 [n, y, x, 3]), and of two baselines.

    `copy` is the source; `oracle` the true target through the tokenizer, the best that a transformer can achieve.
    """
    images = {
        "copy": np.stack([record["source"] for record in records]),
        "oracle": reconstruct_records(editor, records, "target"),
        "editor": edited,
    }
    return {name: by_group(judge_records(x, records), records) for name, x in images.items()}


def reconstruct_records(editor: Editor, records: Sequence[Any], side: str) -> NDArray[np.uint8]:
    """Returns one image of each example through the editor's tokenizer, uint8 [n, y, x, 3]."""
    reconstruct = jit_everywhere(make_reconstruct(editor.config))
    parts = []
    for start in range(0, len(records), BATCH):
        images = np.stack([record[side] for record in records[start : start + BATCH]])
        filled = np.pad(images, ((0, min(BATCH, len(records)) - len(images)), (0, 0), (0, 0), (0, 0)), mode="edge")
        parts.append(np.asarray(reconstruct(editor.params["tokenizer"], filled))[: len(images)])
    return np.concatenate(parts)


def table(scores: dict[str, dict[str, Score]]) -> str:
    """Returns a table of exact edits by group for copy, oracle and editor, with the editor's `done` and `kept`."""
    lines = [f"{'edits':<20} {'n':>5} {'copy':>7} {'oracle':>7} {'editor':>7}   {'done':>7} {'kept':>7}"]
    for group, ours in scores["editor"].items():
        copy, oracle = scores["copy"][group].exact, scores["oracle"][group].exact
        lines.append(
            f"{group:<20} {ours.edits:>5} {copy:>7.1%} {oracle:>7.1%} {ours.exact:>7.1%}   "
            f"{ours.done:>7.1%} {ours.kept:>7.1%}"
        )
    return "\n".join(lines)
