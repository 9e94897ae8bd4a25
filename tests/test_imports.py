"""Imports go one way: from what uses to what is used."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Rooms of the library, from the bottom up; those in one line may import each other, unless a line is in ALONE.
BOTTOM = (
    "config errors causes starting progress types lazy quantized hardware storage colors jpeg png images placement "
    "contact_sheet scales resize command"
)
FLOORS = (BOTTOM, "parallel", "tokenizer text transformer", "parameters", "weights", "conversion sampling training")
LEVEL = {room: level for level, rooms in enumerate((*FLOORS, "evaluation analysis")) for room in rooms.split(" ")} | {
    "": 0
}
ALONE = {"conversion", "sampling", "training"}
# What data_pipelines uses.
DATA = {
    "config",
    "errors",
    "starting",
    "progress",
    "command",
    "storage",
    "images",
    "placement",
    "contact_sheet",
    "scales",
}


def _imports(path: pathlib.Path) -> Iterator[list[str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from ([*(node.module or "").split("."), alias.name] for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ([*alias.name.split("."), ""] for alias in node.names)


def _may_import(package: str, room: str, other: list[str]) -> bool:
    if package == "experiments" or other[0] not in ("varedit_jax", "data_pipelines", "experiments"):
        return True
    if package == "data_pipelines":
        return other[0] == package or (other[0] == "varedit_jax" and other[1] in DATA)
    below = other[0] == "varedit_jax" and LEVEL[other[1]] <= LEVEL[room]
    return below and (room not in ALONE or other[1] not in ALONE - {room})


@pytest.mark.parametrize("package", ["varedit_jax", "data_pipelines"])
def test_imports_go_downwards(package: str) -> None:
    wrong = []
    for path in sorted((ROOT / package).rglob("*.py")):
        room = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        wrong += [
            f"{path.relative_to(ROOT)}: {'.'.join(other)}"
            for other in _imports(path)
            if room != "__init__" and not _may_import(package, room, other)
        ]
    assert wrong == []
