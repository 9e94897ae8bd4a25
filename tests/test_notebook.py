"""The notebook of docs/, cell by cell, with the shipped editor."""

import json
import pathlib

import pytest

from data_pipelines.shapes.scene import Scene

ROOT = pathlib.Path(__file__).parents[1]


def test_the_notebook_edits_as_its_stored_output_says(capsys: pytest.CaptureFixture[str]) -> None:
    cells = [
        cell for cell in json.loads((ROOT / "docs/edit.ipynb").read_text())["cells"] if cell["cell_type"] == "code"
    ]
    names: dict[str, object] = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
        stored = ["".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream"]
        assert capsys.readouterr().out == "".join(stored)
    assert len(cells) == 4
    removed, *_ = names["readings"]  # type: ignore[misc]
    assert removed == Scene.decode("mint|plain|-,-,blue square,green triangle")
