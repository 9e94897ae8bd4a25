"""Documentation points at what is there: cited sections, links, modules and flags of commands."""

import ast
import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import pytest

from varedit_jax.config import RunConfig, TokenizerRunConfig

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("varedit_jax", "data_pipelines", "experiments")
PAGES = [
    *(ROOT / name for name in ("README.md", "WORKSPACE.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "experiments" / "launch").glob("*.md")),
]
CITATION = re.compile(r'\b(\w+\.md)(?:, sections? (\d+(?:(?:, and |, | and | to )\d+)*))?(?:, "([^"]+)")?')
LINK = re.compile(r"\]\(([^()\s]+)\)")
FLAG = re.compile(r"(?<![\w=,-])--([a-z][a-z_0-9.]*)(?![\w-])")


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def headings(page: pathlib.Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return [match[1].strip() for match in re.finditer(r"^#+ (.+)$", text, re.M)]


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def sections(numbers: str) -> list[int]:
    """All of "5 and 6", "1, 3 and 5", "3 to 7"."""
    if " to " in numbers:
        first, last = map(int, numbers.split(" to "))
        return list(range(first, last + 1))
    return [int(number) for number in re.findall(r"\d+", numbers)]


def citations(path: pathlib.Path) -> Iterator[tuple[str, str, str]]:
    """Page, section numbers and title of each citation in a file of code; "" for what it does not give."""
    text = re.sub(r"\s*\n\s*(?:# ?)?", " ", path.read_text())
    for match in CITATION.finditer(text):
        if match[2] or match[3]:
            yield match[1].lower(), match[2] or "", match[3] or ""


def broken_citation(page: str, numbers: str, title: str) -> str:
    """Returns the fault of a citation; "" if there is none."""
    path = ROOT / "docs" / page
    if not path.is_file():
        return f"there is no docs/{page}"
    known = {match[1]: match[2] for match in (re.match(r"(?:(\d+)\. )?(.+)", text) for text in headings(path)) if match}
    missing = [str(number) for number in sections(numbers) if str(number) not in known]
    if missing:
        return f"docs/{page} has no section {missing[0]}"
    return "" if not title or title in known.values() or title in headings(path) else f'docs/{page} has no "{title}"'


def test_cited_sections_are_there() -> None:
    found = {
        (name_of(path), *citation)
        for package in (*PACKAGES, "tests")
        for path in (ROOT / package).rglob("*.py")
        if path != pathlib.Path(__file__)
        for citation in citations(path)
    }
    assert len(found) > 20
    broken = {citation: said for citation in found if (said := broken_citation(*citation[1:]))}
    assert not broken


def test_broken_citations_are_seen() -> None:
    assert sections("1, 3 and 5") == [1, 3, 5]
    assert sections("3 to 7") == [3, 4, 5, 6, 7]
    assert broken_citation("model.md", "5 and 6", "Positions") == ""
    assert broken_citation("model.md", "6 and 99", "") == "docs/model.md has no section 99"
    assert broken_citation("model.md", "", "Nowhere") == 'docs/model.md has no "Nowhere"'
    assert broken_citation("nothing.md", "1", "") == "there is no docs/nothing.md"


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "results").glob("*.md"))], ids=name_of)
def test_links_lead_to_files_and_headings(page: pathlib.Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", page.read_text())
    broken = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, heading = target.partition("#")
        path = page.parent / file if file else page
        if not path.exists() or (heading and heading not in map(anchor, headings(path))):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_of_code_are_there(page: pathlib.Path) -> None:
    """`training/optimizer.py`, by any ending of its path."""
    files = [f"/{name_of(path)}" for package in (*PACKAGES, "tests") for path in (ROOT / package).rglob("*.py")]
    named = re.findall(r"`((?:\w+/)*\w+\.py)`", page.read_text())
    assert not [name for name in named if not any(file.endswith(f"/{name}") for file in files)]


@functools.cache
def module_file(module: str) -> pathlib.Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@functools.cache
def modules_of(module: str) -> frozenset[str]:
    """A module of the project and those of the programs' packages that it imports, directly or through others."""
    known: set[str] = set()
    todo = [module]
    while todo:
        current = todo.pop()
        file = module_file(current)
        if current in known or file is None or not current.startswith(PACKAGES):
            continue
        known.add(current)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return frozenset(known)


def defined_flags(text: str) -> list[str]:
    """Flags that a module defines: one by one, or for fields of a configuration."""
    fields = "".join(re.findall(r"FieldFlags\(\s*\w+,\s*\{(.*?)\}", text, re.DOTALL))
    return [*re.findall(r'DEFINE_\w+\(\s*"(\w+)"', text), *re.findall(r'"(\w+)":', fields)]


@functools.cache
def flags_of(module: str) -> frozenset[str]:
    """Flags that a program defines, in its module or in one that it imports; `modules_of` says which."""
    files = [file for name in modules_of(module) if (file := module_file(name))]
    return frozenset(name for file in files for name in defined_flags(file.read_text())) | {"help"}


@functools.cache
def all_flags() -> frozenset[str]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return frozenset(name for file in files for name in defined_flags(file.read_text())) | {"help"}


def is_field(path: str) -> bool:
    """Returns True if a config of a run has this field: a dotted name."""
    found: list[Any] = [RunConfig, TokenizerRunConfig]
    for name in path.split("."):
        fields = [field for cls in found if dataclasses.is_dataclass(cls) for field in dataclasses.fields(cls)]
        found = [field.type for field in fields if field.name == name]
    return bool(found)


def unknown_flags(text: str, known: frozenset[str]) -> list[str]:
    """Flags of a command that its program does not have; `--no...` of a switch and fields of a config are known."""
    unknown = []
    for flag in FLAG.findall(text):
        name = flag.rstrip(".")
        if name.startswith("config."):
            if not is_field(name.removeprefix("config.")):
                unknown.append(name)
        elif name not in known and name.removeprefix("no") not in known:
            unknown.append(name)
    return unknown


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Module and arguments of every `python -m` command, with the lines that a backslash continues."""
    joined = re.sub(r"\\\s*\n\s*", " ", text)
    for match in re.finditer(r"python -m ([\w.]+)((?:(?!python -m)[^`\n])*)", joined):
        yield match[1].rstrip("."), match[2]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_have_these_modules_and_flags(page: pathlib.Path) -> None:
    broken = []
    for module, arguments in commands(page.read_text()):
        if not module.startswith(PACKAGES):
            continue
        if module_file(module) is None:
            broken.append(module)
        else:
            broken += [f"{module} --{flag}" for flag in unknown_flags(arguments, flags_of(module))]
    if page.parent.name != "launch":  # whose pages name flags of schedulers, too
        for code in re.findall(r"`(--[^`\n]+)`", page.read_text()):
            broken += unknown_flags(code, all_flags())
    assert not broken


def test_broken_commands_are_seen() -> None:
    text = "    python -m experiments.edit --image=a.png \\\n        --colour=red --config.data.flip=True --noverify\n"
    [(module, arguments)] = commands(text)
    assert module == "experiments.edit"
    assert unknown_flags(arguments, flags_of(module)) == ["colour"]
    assert unknown_flags("--config.data.flop=1 --config.mesh.fsdp=2", frozenset()) == ["config.data.flop"]
    assert module_file("experiments.nothing") is None


@functools.cache
def sentences() -> frozenset[str]:
    """All strings of the packages, with `…` where a value is put in; the Makefile as one."""
    found = {(ROOT / "Makefile").read_text()}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    pieces = [piece.value if isinstance(piece, ast.Constant) else "…" for piece in node.values]
                    found.add("".join(map(str, pieces)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return frozenset(found)


def is_said(quoted: str) -> bool:
    """Returns True if a program says this; `…` is anything."""
    pattern = re.compile(".*".join(re.escape(piece.strip()) for piece in quoted.split("…")), re.S)
    return any(pattern.search(sentence) for sentence in sentences())


def test_errors_quoted_by_symptom_are_said() -> None:
    rows = re.findall(r"^\| ([^|]*`[^|]*) \|", (ROOT / "docs" / "errors.md").read_text(), re.M)
    quoted = [text for row in rows for text in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 50
    assert not [text for text in quoted if not is_said(text)]
    assert not is_said("… is broken in a way that nobody says")
