"""Layouts are compiled once, their lines kept at once and tabulated; test_compile_ahead tests the compilation."""

import json
import pathlib
from collections.abc import Callable

import pytest

from experiments.configs.published import LAYOUTS

pytestmark = pytest.mark.subprocess

# In place of the compiler: fits on v5p alone, and cannot compile for v6e at all.
SETUP = """
from varedit_jax.errors import UserError

def compile_layout(config, machine, memory_only):
    print("compiled", machine, *(["alone"] if memory_only else []))
    if machine == "v6e_256":
        raise UserError("compile_ahead ended with 1: no such chip")
    memory = {"needed_gib": None, "hbm_gib": 16.0}
    row = {
        "layout": f"{config}:{machine}", "topology": "v5p:4x4x4", "mesh": {"data": 1, "fsdp": 64, "tensor": 1},
        "global_batch": 1536, "accumulation": 6, "again_of_forward": 0.0515, "compile_seconds": 154.9, "fits": False,
    }
    if machine.startswith("v5p"):
        memory = {"needed_gib": 69.7, "hbm_gib": 95.74, "arguments_gib": 1.6, "temporaries_gib": 67.9}
        purposes = {name: {"count": 7, "gib": 2.5} for name in ("parameter all-gathers", "gradient reduce-scatters")}
        purposes["gradient all-reduces"] = {"count": 1, "gib": 0.25}
        row |= {"fits": True, "link_seconds_at_least": 0.5226}
        row["collectives"] = {"by_purpose": purposes, "activation_sized_all_gathers": 0}
    if machine == "v5p_256":
        row["predicted"] = {
            "seconds": 23.561, "seconds_range": [22.91, 25.05], "mfu_with_encoders": 0.3904,
            "mfu_with_encoders_range": [0.3671, 0.4014], "moves_share": 0.209,
            "seconds_by_kind": {"move": 4.923, "exposed collectives": 0.9518},
        }
    if memory_only:
        del row["compile_seconds"]
        row |= {"compiled": "memory", "memory_seconds": 93.2}
    return row | {"memory": memory}

module.compile_layout = compile_layout
"""


def test_layouts_are_compiled_once_and_make_a_table(run_program: Callable, tmp_path: pathlib.Path) -> None:
    config = "varedit_8b_512"
    rows, table = tmp_path / "new" / "rows.jsonl", tmp_path / "table.md"
    common = [f"--rows={rows}", f"--table={table}"]
    answers = run_program(
        "compile_configs",
        {
            "nothing": [*common, "--only=9b"],
            "some": [*common, f"--only={config}:v5p_128,{config}:v5e,{config}:h100"],
            "more": [*common, f"--only={config}:v5p"],
            "fails": [*common, f"--only={config}"],
        },
        setup=SETUP,
    )
    assert (
        answers["nothing"][0] == 1
        and "--only=9b matches no layout; configs are varedit_2b_256" in answers["nothing"][2]
    )
    assert answers["some"][1].split() == ["compiled", "v5p_128", "compiled", "v5e_256", "compiled", "h100_64"]
    assert answers["more"][1].split() == ["compiled", "v5p_256"]  # not v5p_128 again
    assert answers["fails"][0] == 1 and answers["fails"][2].strip().endswith("no such chip")
    found = [json.loads(line)["layout"] for line in rows.read_text().splitlines()]
    assert found == [f"{config}:{machine}" for machine in ("v5p_128", "v5e_256", "h100_64", "v5p_256")]
    lines = table.read_text().splitlines()[2:]
    assert [line.split()[1] for line in lines] == [f"{config}:{m}" for m in LAYOUTS[config] if m != "v6e_256"]
    assert lines[0] == (
        f"| {config}:v5p_128 | fsdp 64 | 1536 (6 x 4) | 69.7 of 95.7 | 1.6 + 67.9 | 5.1 % | 2.5 (7) | 2.8 (8) | 0 | 0 "
        "| 0.52 |  |  |  |  | 155 |"
    )
    assert lines[1].endswith("| 0.52 | 23.6 (22.9 .. 25.1) | 39.0 % (36.7 .. 40.1) | 20.9 % | 0.95 | 155 |")
    assert "more of 16.0: **does not fit**" in lines[2] and "(as v5p:4x4x4)" in lines[3]


def test_memory_alone_is_said_and_does_not_stand_for_the_whole(run_program: Callable, tmp_path: pathlib.Path) -> None:
    """A layout with a line of either kind needs no more memory alone; one with that alone is compiled as a whole."""
    rows, table = tmp_path / "rows.jsonl", tmp_path / "table.md"
    common = [f"--rows={rows}", "--only=varedit_8b_512:v5p"]
    answers = run_program(
        "compile_configs",
        {
            "alone": [*common, f"--table={table}", "--memory_only"],
            "again": [*common, f"--table={tmp_path / 'other.md'}", "--memory_only"],
            "whole": [*common, f"--table={tmp_path / 'whole.md'}"],
            "done": [*common, f"--table={tmp_path / 'other.md'}", "--memory_only"],
        },
        setup=SETUP,
    )
    assert [code for code, _, _ in answers.values()] == [0] * 4
    said = {case: out.splitlines() for case, (_, out, _) in answers.items()}
    assert said["alone"] == ["compiled v5p_128 alone", "compiled v5p_256 alone"]
    assert said["whole"] == ["compiled v5p_128", "compiled v5p_256"] and said["again"] == said["done"] == []
    assert all(line.endswith("| memory alone: 93 |") for line in table.read_text().splitlines()[2:])
    assert [line.split("|")[-2].strip() for line in (tmp_path / "whole.md").read_text().splitlines()[2:]] == ["155"] * 2
