"""Common parts of every program: the --config flag, one-line errors, and JAX's settings.

A program is

    _CONFIG = program.ConfigFlag(RunConfig)
    _WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run", required=True)

    def main(argv: list[str]) -> None:
        config = _CONFIG.value
        ...

    if __name__ == "__main__":
        program.run(main)

and its --config takes an experiment config, a variant of it, and values of single fields:

    --config=experiments/configs/shapes.py:tiny --config.optimizer.learning_rate=1e-3 --config.sampling.guidance="(1,4)"

An experiment config is a Python file with `get_config(variant: str = "") -> RunConfig`. It may list its variants in
`VARIANTS`; the error about an unknown variant then suggests the nearest one.
"""

import ast
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import logging
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal, NoReturn, TypeVar

# Before the first import of jax, to silence XLA's own messages.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
from absl import flags

from varedit_jax import command
from varedit_jax.config import EditorConfig, PixelBudget, from_dict, preset, to_dict
from varedit_jax.config.annotations import allows, field_types, in_words
from varedit_jax.config.serialize import tuples
from varedit_jax.errors import UserError
from varedit_jax.parallel import compilation_cache, processes
from varedit_jax.storage import paths

BUDGETS: dict[int, PixelBudget] = {256: "0.06M", 512: "0.25M", 768: "0.60M", 1024: "1M"}  # by side of the images

flags.disclaim_key_flags()  # flags that are defined here belong to the importing program
Config = TypeVar("Config")
_READERS: dict[Any, Callable[[str], Any]] = {
    bool: flags.BooleanParser().parse,
    int: flags.IntegerParser().parse,
    float: flags.FloatParser().parse,
    str: str,
}


def run(main: Callable[[list[str]], Any]) -> NoReturn:
    """Runs a program as `varedit_jax.command.run` does, with JAX set up before `main(argv)` is called.

    If JAX has none of the devices that JAX_PLATFORMS names, that is a mistake of the user.
    """

    def prepared(argv: list[str]) -> Any:
        setup_jax()
        try:
            return main(argv)
        except (RuntimeError, AssertionError) as error:
            _check_platforms(error)
            raise

    command.run(prepared, _about_field)


def setup_jax() -> None:
    """Has compiled programs kept (parallel/compilation_cache.py), and prepares JAX for programs.

    It silences JAX's messages about missing accelerators, and those of Orbax's threads when a checkpoint cannot be
    read or written, which an error reports. Without a TPU, JAX does not try libtpu, which is there to compile for one.
    """
    if not (os.environ.get("JAX_PLATFORMS") or processes.has_tpu() or importlib.util.find_spec("jax_plugins")):
        jax.config.update("jax_platforms", "cpu")
    logging.getLogger("jax").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _without_late_reports
    compilation_cache.keep_programs()


def share_compiled(workdir: paths.PathLike) -> None:
    """Sets the compilation cache of several processes to `workdir`/compiled, unless JAX_COMPILATION_CACHE_DIR is set.

    Process 0 alone writes it (JAX 0.10), so it has to be where all can read. It is not bounded, because JAX bounds a
    cache by a lock that all processes would wait for: a run has one program for each stage and layout.
    """
    if jax.process_count() > 1 and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # What was compiled to find the others may have opened another.
        compilation_cache.move_to(str(paths.resolve(workdir) / "compiled"))


def _check_platforms(cause: Exception) -> None:
    """Raises UserError if JAX cannot use what JAX_PLATFORMS names."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX (0.10.2) asserts that there is a device at all
        reason = str(error).partition(" (set JAX_PLATFORMS=")[0] or "there is no such device"
        raise UserError(
            f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS')!r}, which does not work here: {reason}; unset it to "
            f"use what this machine has (GPUs need pip install 'varedit-jax[cuda]', TPUs 'varedit-jax[tpu]')"
        ) from cause


def _without_late_reports(report: "sys.UnraisableHookArgs") -> None:
    """Ignores reads and writes that report to the event loop that Orbax (0.12.8) closed when the first one failed."""
    if str(report.exc_value) != "Event loop is closed":
        command.unraisable(report)


def preset_model(name: str, pixels: int | None) -> EditorConfig:
    """Returns the editor of a preset for images of --pixels. Raises UserError for a size that it has no pyramid for."""
    model = preset(name)
    if pixels is None:
        return model
    if model.grids or pixels not in BUDGETS:
        known = ", ".join(map(str, BUDGETS))
        raise UserError(f"--pixels is {pixels}; give one of {known}, and none with --preset=tiny")
    return dataclasses.replace(model, pixel_budget=BUDGETS[pixels])


class FieldFlags(Generic[Config]):
    """Flags for fields of a configuration, typed by their annotations.

    They are plain absl flags: config flags of ml_collections assign to fields, which frozen dataclasses do not allow,
    and do not support Literal and union types.
    """

    def __init__(self, cls: type[Config], fields: Mapping[str, str], about: Mapping[str, str] | None = None) -> None:
        """Defines a flag for each of `fields`, which maps names of flags to dotted names of fields.

        `about` says what some of them mean, for --help, beside the values that they take.
        """
        self._cls = cls
        hints = field_types(cls)
        self._fields = {}
        for flag, field in fields.items():
            parser, words = _FieldParser(flag, hints[field]), in_words(hints[field])
            help_text = f"{about[flag]} ({words})" if about and flag in about else words
            self._fields[field] = flags.DEFINE(parser, flag, None, help_text, boolean=hints[field] is bool)

    def override(self, config: Config) -> Config:
        """Returns `config` with the fields of the command line. Raises UserError if they contradict each other."""
        values = to_dict(config)
        for field, flag in self._fields.items():
            if flag.present:
                *groups, last = field.split(".")
                functools.reduce(dict.__getitem__, groups, values)[last] = flag.value
        try:
            return from_dict(self._cls, values)
        except ValueError as error:
            raise UserError(str(error)) from error


class ConfigFlag(Generic[Config]):
    """`--config=PATH.py[:variant]`, for experiment configs that return a `Config`, with a flag for each field of it."""

    def __init__(self, cls: type[Config]) -> None:
        """Defines the flags."""
        self._cls = cls
        self._path = flags.DEFINE_string("config", None, "experiment config: PATH.py or PATH.py:variant", required=True)
        self._fields = FieldFlags(cls, {f"config.{field}": field for field in field_types(cls)})

    @functools.cached_property
    def value(self) -> Config:
        """The experiment config with the overrides of the command line. Raises UserError."""
        return self._fields.override(load_config(self._path.value or "", self._cls))


class _FieldParser(flags.ArgumentParser[Any]):
    """Parses a value of the annotated type of a field."""

    def __init__(self, name: str, hint: Any) -> None:
        super().__init__()
        self._name, self._hint = name, hint

    def parse(self, text: Any) -> Any:
        """Returns the value of a text. Raises UserError with the values that the field takes."""
        origin = typing.get_origin(self._hint)
        try:
            value = tuples(_READERS.get(self._hint, str if origin is Literal else ast.literal_eval)(text))
        except (ValueError, SyntaxError, TypeError):
            value = text
        if origin is tuple and not isinstance(value, tuple):
            value = (value,)
        if not allows(self._hint, value):
            raise UserError(f"--{self._name} is {value!r}; it must be {in_words(self._hint)}")
        return value


def load_config(path: str, cls: type[Config]) -> Config:
    """Returns the configuration of the file `PATH[:variant]`. Raises UserError if that is not a `cls`."""
    paths.local(path, "--config")  # before it is split: gs:// is no variant
    file, _, variant = path.partition(":")
    module = _load_module(file)
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise UserError(f"{file} is not an experiment config: it has no function get_config")
    arguments = [variant] if variant else []
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        raise UserError(
            f"{file} has no variants, but {variant!r} was requested"
            if variant
            else f"{file} needs a variant, as in --config={file}:VARIANT"
        ) from error
    variants = getattr(module, "VARIANTS", ())
    if variant and variants and variant not in variants:
        raise UserError(f"{file} has no variant {variant!r}, but {', '.join(variants)}{_nearest(variant, variants)}")
    try:
        config = get_config(*arguments)
    except KeyError as error:
        raise UserError(f"{file} has no variant {variant!r}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(config, cls):
        raise UserError(f"{path} gives a {type(config).__name__}, but this program needs a {cls.__name__}")
    return config


def _load_module(file: str) -> types.ModuleType:
    path = paths.local(file, "--config")
    if not path.is_file():
        directory = os.path.dirname(file)
        names = paths.child_names(paths.resolve(directory or "."), "*.py")
        configs = [os.path.join(directory, name) for name in names if name != "__init__.py"]
        raise UserError(f"there is no experiment config {file}{_nearest(file, configs)}")
    spec = importlib.util.spec_from_file_location("experiment_config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is not an experiment config: its name does not end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        own = error.filename == str(path)
        raise UserError(f"{file if own else error.filename}, line {error.lineno}: {error.msg}") from error
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    return module


def _nearest(name: str, known: Sequence[str]) -> str:
    """Returns `; did you mean ...?` with the known name most like `name`, if there is any."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; did you mean {close[0]}?" if close else ""


def _about_field(text: str) -> str | None:
    """Returns a sentence with the nearest field for absl's error about an unknown --config.FIELD; None for others."""
    found = re.match(r"Unknown command line flag '(?:no)?(config\..*?)'", text)
    known = [f"--{flag}" for flag in flags.FLAGS if flag.startswith("config.")]
    if not found or not known:
        return None
    name = f"--{found[1]}"
    below = [field for field in known if field.startswith(f"{name}.")]
    if below:
        return f"{name} is a group of fields; set one of them, as in {below[0]}"
    same_last = [field for field in known if field.split(".")[-1] == name.split(".")[-1]]
    return f"there is no {name}{_nearest(name, same_last or known)}"
