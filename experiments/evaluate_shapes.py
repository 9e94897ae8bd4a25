"""Scores an editor and two baselines on held-out `shapes`, by kind of edit; draws a contact sheet.

    python -m experiments.evaluate_shapes --examples=200 --sheet=sheet.png --output=scores.json

`--checkpoint` is a directory of weights or the working directory of a run; the shipped editor by default. An edit
counts as exact if the image shows the requested change and everything else unchanged (data_pipelines/shapes/judge.py).
"""

import dataclasses
import time
from typing import get_args

import numpy as np
from absl import flags

from data_pipelines import loader
from experiments import program
from experiments import shapes_scoring as scoring
from experiments.configs import shapes
from varedit_jax import command
from varedit_jax.config import ComputeType
from varedit_jax.errors import UserError
from varedit_jax.images import check_output, write_image
from varedit_jax.progress import Progress
from varedit_jax.sampling.editor import Editor
from varedit_jax.scales import editor_pyramid, image_size
from varedit_jax.storage.disk import explained
from varedit_jax.storage.files import write_json
from varedit_jax.storage.paths import is_remote, resolve

_SHOWN = 14  # edits on the sheet

_CHECKPOINT = command.DEFINE_path("checkpoint", shapes.SHIPPED, "directory of weights, or of a training run")
_EXAMPLES = flags.DEFINE_integer("examples", 200, "held-out edits to judge", lower_bound=1)
_SHEET = command.DEFINE_path("sheet", "", f"image to write: {_SHOWN} edits, scale by scale")
_OUTPUT = command.DEFINE_path("output", "", "JSON file to write the scores to")
_DTYPE = flags.DEFINE_enum("dtype", None, get_args(ComputeType), "as of experiments.edit; the checkpoint's by default")
_DATA = command.DEFINE_path("data", "", "directory of the prepared data; data/ by default", local=True)


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    if _SHEET.value:
        check_output(_SHEET.value)
    output = resolve(_OUTPUT.value) if _OUTPUT.value else None
    if output is not None and not is_remote(output) and not output.parent.is_dir():
        raise UserError(f"the directory {output.parent} of {output} does not exist; create it first")
    editor = Editor.load(_CHECKPOINT.value, dtype=_DTYPE.value)
    data = dataclasses.replace(shapes.DATA, directory=_DATA.value, train_examples=1)  # only the test split is used
    source = loader.open_split(data, "test")
    if _EXAMPLES.value > len(source):
        raise UserError(f"--examples={_EXAMPLES.value}, but only {len(source)} edits are held out")
    spread = np.linspace(0, len(source) - 1, _EXAMPLES.value).round().astype(int)
    records = [source[int(index)] for index in spread]
    ours, theirs = image_size(editor.config, editor_pyramid(editor.config)), records[0]["source"].shape[:2]
    if ours != theirs:
        raise UserError(f"the editor of {_CHECKPOINT.value} is for images of {ours}, but those of shapes are {theirs}")
    start = time.perf_counter()
    with Progress(total=len(records), desc="edits", unit="edit") as progress:
        # For a sheet, every image is decoded at every scale: one program to compile instead of two.
        images = scoring.edit_records(editor, records, every_scale=bool(_SHEET.value), on_batch=progress.update)
        scores = scoring.evaluate(editor, records, images[-1])
    seconds = time.perf_counter() - start
    print(scoring.table(scores))
    print(f"{len(records)} edits in {seconds:.0f} s, compilation included")
    if output is not None:
        values = {who: {group: dataclasses.asdict(s) for group, s in groups.items()} for who, groups in scores.items()}
        with explained("scores", output.parent):
            write_json(output, values, indent=1)
    if _SHEET.value:
        shown = range(len(records))[:: max(len(records) // _SHOWN, 1)][:_SHOWN]
        heading = f"shapes: {scores['editor']['all'].exact:.1%} of {len(records)} held-out edits exact"
        sheet = scoring.sheet([records[index] for index in shown], images[:, shown], heading)
        write_image(_SHEET.value, np.asarray(sheet))


if __name__ == "__main__":
    program.run(main)
