"""What every program has around its work: the --config flag, one-line errors, and JAX's settings.

A program is

    _CONFIG = program.config_flag(RunConfig)
    _WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run", required=True)

    def main(argv: list[str]) -> None:
        config = _CONFIG.value
        ...

    if __name__ == "__main__":
        program.run(main)

and its --config takes an experiment card, with a variant of it and with fields of its own:

    --config=experiments/configs/shapes.py:tiny --config.optimizer.learning_rate=1e-3 --config.sampling.guidance="(1,4)"

A card is a Python file with `get_config(variant: str = "") -> RunConfig`. A card with variants lists them in
`VARIANTS`, and a mistyped one is answered with the nearest.
"""

import dataclasses
import difflib
import importlib.util
import inspect
import logging
import os
import pathlib
import re
import sys
import types
import typing
from collections.abc import Callable
from typing import Any, Generic, Literal, NoReturn, TypeVar

# Before the first import of jax: XLA's own messages are for those who look for them.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
from absl import flags
from ml_collections import config_dict, config_flags

from varedit_jax import command
from varedit_jax import config as config_lib
from varedit_jax.errors import UserError

Config = TypeVar("Config")


def run(main: Callable[[list[str]], Any]) -> NoReturn:
    """Runs a program as `varedit_jax.command.run` does, with JAX set up before `main(argv)` is called."""

    def prepared(argv: list[str]) -> Any:
        setup_jax()
        return main(argv)

    command.run(prepared, _about_config)


def setup_jax() -> None:
    """Keeps compiled programs in .cache/jax of the working directory, unless JAX_COMPILATION_CACHE_DIR says otherwise.

    It also quiets what is no news to the user: JAX's account of the accelerators that it did not find, and what
    Orbax's threads print when a checkpoint cannot be read or written, ahead of the error that says so.
    """
    logging.getLogger("jax").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = _without_late_reports
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(".cache/jax").absolute()))


def _without_late_reports(report: "sys.UnraisableHookArgs") -> None:
    """Passes over reads and writes that report to the event loop Orbax closed when the first of them failed."""
    if str(report.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(report)


class ConfigFlag(Generic[Config]):
    """The --config flag of a program whose cards return a `Config`."""

    def __init__(self, cls: type[Config], flag_values: flags.FlagValues) -> None:
        """Defines the flag."""
        self._cls = cls
        config_flags.DEFINE_config_file(
            "config", None, "experiment card: PATH.py or PATH.py:variant", flag_values=flag_values
        )
        self._flag = flag_values["config"]
        self._flag.parser = _CardParser(cls)
        flags.mark_flag_as_required("config", flag_values)

    @property
    def value(self) -> Config:
        """The card's configuration with the overrides of the command line; UserError if they do not go together."""
        if self._flag.value is None:
            raise UserError("--config is missing; see --help")
        values = self._flag.value.to_dict()
        _check_types(self._cls, values)
        try:
            return config_lib.from_dict(self._cls, values)
        except ValueError as error:
            raise UserError(str(error)) from error


def config_flag(cls: type[Config], flag_values: flags.FlagValues = flags.FLAGS) -> ConfigFlag[Config]:
    """Defines `--config=PATH.py[:variant]` for cards that return the configuration class `cls`.

    Every field can be overridden, by its dotted name: `--config.optimizer.learning_rate=1e-3`.
    """
    return ConfigFlag(cls, flag_values)


class _CardParser(flags.ArgumentParser):
    """Reads a card; what ml_collections gets to override is its configuration as a ConfigDict."""

    def __init__(self, cls: type) -> None:
        super().__init__()
        self.cls = cls

    def parse(self, path: str) -> config_dict.ConfigDict:
        card = _load_card(path, self.cls)
        for name in _overrides(sys.argv):
            _check_name(name, self.cls)
        return _overridable(card)


def _load_card(path: str, cls: type) -> Any:
    """The configuration that the card at `PATH[:variant]` returns."""
    file, _, variant = path.partition(":")
    module = _load_module(pathlib.Path(file))
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise UserError(f"{file} is not an experiment card: it has no function get_config")
    arguments = [variant] if variant else []
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        raise UserError(
            f"{file} has no variants, but {variant!r} was asked for"
            if variant
            else f"{file} needs a variant, as in --config={file}:VARIANT"
        ) from error
    variants = list(getattr(module, "VARIANTS", ()))
    if variant and variants and variant not in variants:
        raise UserError(f"{file} has no variant {variant!r}, but {', '.join(variants)}{_nearest(variant, variants)}")
    try:
        card = get_config(*arguments)
    except KeyError as error:
        raise UserError(f"{file} has no variant {variant!r}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(card, cls):
        raise UserError(f"{path} gives a {type(card).__name__}, but this program needs a {cls.__name__}")
    return card


def _load_module(file: pathlib.Path) -> types.ModuleType:
    if not file.is_file():
        cards = sorted(str(path) for path in file.parent.glob("*.py") if path.name != "__init__.py")
        raise UserError(f"there is no experiment card {file}{_nearest(str(file), cards)}")
    spec = importlib.util.spec_from_file_location("experiment_card", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is not an experiment card: its name does not end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        own = pathlib.Path(error.filename or "").absolute() == file.absolute()
        raise UserError(f"{file if own else error.filename}, line {error.lineno}: {error.msg}") from error
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    return module


def _overrides(argv: list[str]) -> list[str]:
    """Dotted names of the fields that a command line overrides."""
    found = (re.match(r"--?(?:no)?config\.([^=]*)", argument) for argument in argv)
    return [match.group(1) for match in found if match]


def _annotations(cls: type, prefix: str = "") -> dict[str, Any]:
    """Type of each field of a config class, by dotted name, those of nested configs included."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found.update(_annotations(hint, f"{prefix}{field.name}."))
        else:
            found[prefix + field.name] = hint
    return found


def _check_name(name: str, cls: type) -> None:
    """Raises UserError naming the nearest field, unless `name` is a field of `cls` that can be set."""
    known = _annotations(cls)
    if name in known:
        return
    below = [field for field in known if field.startswith(f"{name}.")]
    if below:
        raise UserError(f"--config.{name} is a group of fields; set one of them, as in --config.{below[0]}")
    same_last = [field for field in known if field.split(".")[-1] == name.split(".")[-1]]
    fields = [f"--config.{field}" for field in same_last or known]
    raise UserError(f"there is no --config.{name}{_nearest(f'--config.{name}', fields)}")


def _nearest(name: str, known: list[str]) -> str:
    """`; did you mean ...?`: the known name most like `name`, if there is any."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; did you mean {close[0]}?" if close else ""


def _overridable(card: Any) -> config_dict.ConfigDict:
    """A configuration as a ConfigDict whose fields take what their annotations allow."""
    fields: dict[str, Any] = {}
    hints = typing.get_type_hints(type(card))
    for field in dataclasses.fields(card):
        value, hint = getattr(card, field.name), hints[field.name]
        if dataclasses.is_dataclass(value):
            fields[field.name] = _overridable(value)
        elif hint is float:
            fields[field.name] = float(value)
        elif isinstance(hint, types.UnionType):
            fields[field.name] = config_dict.FieldReference(value, field_type=object)  # any literal
        else:
            fields[field.name] = value
    return config_dict.ConfigDict(fields)


def _check_types(cls: type, values: dict[str, Any]) -> None:
    """Raises UserError for the first of the (nested) `values` that its field's annotation does not allow."""
    for name, hint in _annotations(cls).items():
        value: Any = values
        for part in name.split("."):
            value = value[part]
        if not _allowed(value, hint):
            raise UserError(f"--config.{name} is {value!r}; it must be {_in_words(hint)}")


def _allowed(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type, of those that configs use."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_allowed(value, choice) for choice in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        wanted = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(value) == len(wanted) and all(map(_allowed, value, wanted))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float)) if hint is float else isinstance(value, hint)


def _in_words(hint: Any) -> str:
    """An annotation as the user would say it."""
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return " or ".join(_in_words(choice) for choice in arguments)
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if typing.get_origin(hint) is tuple:
        if arguments[-1] is not Ellipsis:
            return f"({', '.join(_in_words(entry) for entry in arguments)})"
        return f"a tuple with {_in_words(arguments[0])} in each place"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]


def _about_config(text: str) -> str | None:
    """What ml_collections says about a wrong --config, in one sentence about the field; None of other flags."""
    if re.fullmatch(r"Unknown command line flag 'config\..*'", text):
        return "fields of a configuration are set after --config=PATH.py, the card that has them"
    found = re.match(r"flag --config\.([\w.]+)=(.*?): ", text, re.DOTALL)
    parser = flags.FLAGS["config"].parser if "config" in flags.FLAGS else None
    if found and isinstance(parser, _CardParser):
        name, value = found.groups()
        return f"--config.{name} is {value!r}; it must be {_in_words(_annotations(parser.cls)[name])}"
    return None
