"""Command lines: the fields that they set, and one sentence for a wrong one."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable

import pytest

from experiments import program
from varedit_jax.config import DataConfig, EditorConfig, RunConfig, from_dict, preset, to_dict
from varedit_jax.config.annotations import field_types, in_words

pytestmark = pytest.mark.subprocess

# A program as they all are, in the place of `module`.
SETUP = """
import os, types
import jax
from varedit_jax import command
from varedit_jax.config import RunConfig, to_dict
from varedit_jax.errors import UserError
from varedit_jax.storage import paths

config = program.ConfigFlag(RunConfig)
anywhere = command.DEFINE_path("anywhere", "", "a path")
here = command.DEFINE_path("here", "", "a local path", local=True)
paths.EXTRAS["s3"] = ("s3", "no_such_package")

def main(argv):
    value = config.value
    if value.name == "mistaken":
        raise UserError("no such image: x.png")
    if value.name == "interrupted":
        raise KeyboardInterrupt
    if value.name.startswith("on "):
        os.environ["JAX_PLATFORMS"] = value.name.removeprefix("on ")
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
        jax.devices()
    if value.name == "broken":
        raise ZeroDivisionError
    cache = jax.config.jax_compilation_cache_dir
    print(json.dumps({"config": to_dict(value), "anywhere": anywhere.value, "cache": cache}))

module = types.SimpleNamespace(main=main)
"""

CONFIGS = {
    "tiny.py": """
from varedit_jax.config import DataConfig, RunConfig, preset

VARIANTS = ("small", "large")

def get_config(variant=""):
    return RunConfig(name=variant or "plain", model=preset("tiny"), data=DataConfig(text_tokens=16))
""",
    "fixed.py": """
from varedit_jax.config import DataConfig, RunConfig, preset

def get_config():
    return RunConfig(name="fixed", model=preset("tiny"), data=DataConfig(text_tokens=16))
""",
    "by_table.py": """
def get_config(variant):
    return {"a": 1}[variant]
""",
    "other.py": """
from varedit_jax.config import EditorConfig

def get_config(variant=""):
    return EditorConfig()
""",
    "unfit.py": """
from varedit_jax.config import preset

def get_config(variant=""):
    return preset("3b")
""",
    "no_config.py": "x = 1",
    "unfinished.py": "def get_config(:",
}

# Command lines that work, and the fields they change.
SETTINGS: dict[str, tuple[list[str], dict[str, object]]] = {
    "nothing": (["--config=tiny.py"], {"name": "plain"}),
    "variant": (["--config=tiny.py:large"], {"name": "large"}),
    "equals sign or space": (
        ["--config", "tiny.py", "--config.steps=5", "--config.seed", "7"],
        {"steps": 5, "seed": 7},
    ),
    "nested": (["--config=tiny.py", "--config.optimizer.learning_rate=1e-3"], {"optimizer.learning_rate": 1e-3}),
    "whole number for a float": (["--config=tiny.py", "--config.optimizer.clip_norm=2"], {"optimizer.clip_norm": 2.0}),
    "flag alone": (["--config=tiny.py", "--config.train_text"], {"train_text": True}),
    "flag with a value": (["--config=tiny.py", "--config.train_text=true"], {"train_text": True}),
    "digits as text": (["--config=tiny.py", "--config.name=007"], {"name": "007"}),
    "tuple where a number was": (
        ["--config=tiny.py", "--config.sampling.guidance=(1.0, 4.0)"],
        {"sampling.guidance": (1.0, 4.0)},
    ),
    "number where a tuple may be": (["--config=tiny.py", "--config.sampling.guidance=3.5"], {"sampling.guidance": 3.5}),
    "lists": (["--config=tiny.py", "--config.model.grids=[[1, 1], [3, 3]]"], {"model.grids": ((1, 1), (3, 3))}),
    "one entry of a tuple": (
        ["--config=tiny.py", "--config.model.transformer.remat_saved=qkv"],
        {"model.transformer.remat_saved": ("qkv",)},
    ),
    "flag that says no": (["--config=tiny.py", "--noconfig.train_text"], {"train_text": False}),
    "override ahead": (["--config.steps=5", "--config=tiny.py"], {"steps": 5}),
    "the last of two": (["--config=tiny.py", "--config.steps=5", "--config.steps=6"], {"steps": 6}),
    "tuple of tuples": (
        ["--config=tiny.py", "--config.model.grids=((1, 1), (3, 3))"],
        {"model.grids": ((1, 1), (3, 3))},
    ),
}

# Command lines that do not work, and the sentence.
MISTAKES: dict[str, tuple[list[str], str]] = {
    "no config": ([], "--config is missing; see --help"),
    "override alone": (["--config.steps=1"], "--config is missing; see --help"),
    "missing experiment config": (
        ["--config=tiyn.py"],
        "there is no experiment config tiyn.py; did you mean tiny.py?",
    ),
    "missing config of the package": (
        ["--config=experiments/configs/shape.py:tiny"],
        "there is no experiment config experiments/configs/shape.py; did you mean experiments/configs/shapes.py?",
    ),
    "no such devices": (
        ["--config=tiny.py", "--config.name=on cuda"],
        "JAX_PLATFORMS is 'cuda', which does not work here: there is no such device; unset it to use what this",
    ),
    "no such platform": (
        ["--config=tiny.py", "--config.name=on abacus,cpu"],
        "JAX_PLATFORMS is 'abacus,cpu', which does not work here: Unable to initialize backend 'abacus': ",
    ),
    "missing directory": (["--config=nowhere/a.py"], "there is no experiment config nowhere/a.py"),
    "unknown variant": (
        ["--config=tiny.py:lrage"],
        "tiny.py has no variant 'lrage', but small, large; did you mean large?",
    ),
    "no variants": (["--config=fixed.py:a"], "fixed.py has no variants, but 'a' was requested"),
    "variant needed": (["--config=by_table.py"], "by_table.py needs a variant, as in --config=by_table.py:VARIANT"),
    "variant not in the table": (["--config=by_table.py:b"], "by_table.py has no variant 'b'"),
    "config of another program": (
        ["--config=other.py"],
        "other.py gives a EditorConfig, but this program needs a RunConfig",
    ),
    "config that is no good": (["--config=unfit.py"], "unfit.py: unknown preset '3b'; known are tiny, 125m"),
    "no experiment config": (
        ["--config=no_config.py"],
        "no_config.py is not an experiment config: it has no function get_config",
    ),
    "no Python": (["--config=unfinished.py"], "unfinished.py, line 1: invalid syntax"),
    "misspelt field": (
        ["--config=tiny.py", "--config.stpes=1"],
        "there is no --config.stpes; did you mean --config.steps?",
    ),
    "field of a group": (
        ["--config=tiny.py", "--config.learning_rate=1"],
        "there is no --config.learning_rate; did you mean --config.optimizer.learning_rate?",
    ),
    "earlier name of a field": (
        ["--config=tiny.py", "--config.save_every=1"],
        "there is no --config.save_every; did you mean --config.cadence.save_every?",
    ),
    "group": (
        ["--config=tiny.py", "--config.loss=1"],
        "--config.loss is a group of fields; set one of them, as in --config.loss.reduction",
    ),
    "no whole number": (
        ["--config=tiny.py", "--config.steps=1.5"],
        "--config.steps is '1.5'; it must be a whole number",
    ),
    "no number": (
        ["--config=tiny.py", "--config.optimizer.beta1=high"],
        "--config.optimizer.beta1 is 'high'; it must be a number",
    ),
    "no truth value": (
        ["--config=tiny.py", "--config.train_text=maybe"],
        "--config.train_text is 'maybe'; it must be true or false",
    ),
    "no choice": (
        ["--config=tiny.py", "--config.optimizer.schedule=linear"],
        "--config.optimizer.schedule is 'linear'; it must be one of constant, cosine",
    ),
    "no tuple of numbers": (
        ["--config=tiny.py", "--config.sampling.guidance=(1, 'x')"],
        "--config.sampling.guidance is (1, 'x'); it must be a number or a tuple with a number in each place",
    ),
    "no grids": (
        ["--config=tiny.py", "--config.model.grids=(1, 2)"],
        "--config.model.grids is (1, 2); it must be a tuple with (a whole number, a whole number) in each place",
    ),
    "fields that do not go together": (
        ["--config=tiny.py", "--config.model.transformer.heads=3"],
        "width 32 over 3 heads gives a head size of 10.6667; it must be a multiple of 4 for 2-D RoPE",
    ),
    "config in a bucket": (
        ["--config=gs://bucket/a.py"],
        "--config is gs://bucket/a.py, but it has to be on a local disk; give a local path",
    ),
    "local path in a bucket": (
        ["--config=tiny.py", "--here=gs://bucket/a"],
        "--here is gs://bucket/a, but it has to be on a local disk; give a local path",
    ),
    "scheme": (
        ["--config=tiny.py", "--anywhere=s4://bucket/a"],
        "'s4://bucket/a' has the scheme s4://; paths are local",
    ),
    "package for a scheme": (
        ["--config=tiny.py", "--anywhere=s3://bucket/a"],
        "s3://bucket/a needs the package no_such_package; install it with pip install 'varedit-jax[s3]'",
    ),
    "unknown flag": (["--config=tiny.py", "--speed=1"], "Unknown command line flag 'speed'"),
    "no flag": (["--config=tiny.py", "fast"], "unexpected argument 'fast'; this program takes flags only, see --help"),
    "mistake found by the program": (["--config=tiny.py", "--config.name=mistaken"], "no such image: x.png"),
}

OTHERS = {
    "packaged": ["--config=experiments/configs/shapes.py:tiny"],
    "path": ["--config=tiny.py", "--anywhere=~/a/../b", "--here=../c"],
    "interrupted": ["--config=tiny.py", "--config.name=interrupted"],
    "broken": ["--config=tiny.py", "--config.name=broken"],
}

Answer = tuple[int, str, str]


@pytest.fixture(scope="module")
def answers(
    tmp_path_factory: pytest.TempPathFactory, run_program: Callable[..., dict[str, Answer]]
) -> dict[str, Answer]:
    """Exit code, standard output and standard error of every command line above."""
    directory = tmp_path_factory.mktemp("configs")
    for name, text in CONFIGS.items():
        (directory / name).write_text(text)
    lines = {name: arguments for name, (arguments, _) in (SETTINGS | MISTAKES).items()} | OTHERS
    found = run_program(
        "program", lines, SETUP, directory=directory, leave_out=["JAX_COMPILATION_CACHE_DIR", "VAREDIT_CACHE"]
    )
    return found


def config(text: str) -> RunConfig:
    return from_dict(RunConfig, json.loads(text)["config"])


def field(value: object, name: str) -> object:
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(answers: dict[str, Answer], name: str) -> None:
    """Only the named fields change, with the right types."""
    code, out, err = answers[name]
    assert (code, err) == (0, "")
    values = to_dict(config(out))
    plain = to_dict(RunConfig(name="plain", model=preset("tiny"), data=DataConfig(text_tokens=16)))
    for path, value in SETTINGS[name][1].items():
        assert (field(config(out), path), type(field(config(out), path))) == (value, type(value))
        *groups, last = path.split(".")
        ours, theirs = values, plain
        for group in groups:
            ours, theirs = ours[group], theirs[group]
        ours[last] = theirs[last]
    assert values == plain


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(answers: dict[str, Answer], name: str) -> None:
    """One line, exit code 1."""
    code, out, err = answers[name]
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {MISTAKES[name][1]}")
    assert err.count("\n") == 1


def test_interrupt_is_clean_and_a_defect_is_not(answers: dict[str, Answer]) -> None:
    """Ctrl-C leaves no stack trace; an error that is not the user's does."""
    assert answers["interrupted"] == (130, "", "error: interrupted\n")
    code, _, err = answers["broken"]
    assert code == 70 and "Traceback" in err and "ZeroDivisionError" in err


def test_a_path_is_the_text_of_the_user(answers: dict[str, Answer]) -> None:
    code, out, err = answers["path"]
    assert (code, err, json.loads(out)["anywhere"]) == (0, "", "~/a/../b")


def test_a_config_of_the_package_is_found_from_anywhere(answers: dict[str, Answer]) -> None:
    code, out, err = answers["packaged"]
    assert (code, err, config(out).name) == (0, "", "shapes_tiny")


def test_compiled_programs_are_kept_in_the_directory_for_caches(answers: dict[str, Answer]) -> None:
    cache = json.loads(answers["nothing"][1])["cache"]
    assert pathlib.Path(cache) == pathlib.Path(os.environ["XDG_CACHE_HOME"]) / "varedit_jax" / "compiled"


def test_every_field_of_a_run_can_be_set() -> None:
    """Command lines support the type of every field of a configuration."""
    names = field_types(RunConfig)
    assert "model.tokenizer.channel_multipliers" in names and "sampling.temperature" in names
    assert all(in_words(hint) for hint in names.values())
    assert {name.split(".")[0] for name in names} == {field.name for field in dataclasses.fields(RunConfig)}
    assert len([name for name in names if name.startswith("model.")]) > len(dataclasses.fields(EditorConfig))


def test_several_processes_keep_compiled_steps_in_the_work_directory(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process alone does not; a directory that is set is kept."""
    sets: list[str] = []
    monkeypatch.setattr(program.compilation_cache, "move_to", sets.append)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    program.share_compiled(tmp_path)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    program.share_compiled(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    program.share_compiled(tmp_path)
    assert sets == [f"{tmp_path}/compiled"]
