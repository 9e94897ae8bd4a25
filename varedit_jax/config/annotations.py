"""Checks of configurations' values against the annotations of their fields."""

import dataclasses
import functools
import types
import typing
from typing import Any, Literal


class Checked:
    """Base of configurations: ValueError at construction for a field whose annotation does not allow its value."""

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for name, hint in _hints(cls).items():
            value = getattr(self, name)
            if not allows(hint, value):
                raise ValueError(f"{cls.__name__}.{name} is {value!r}; it must be {in_words(hint)}")


def check_least(config: object, least: float, *names: str) -> None:
    """Raises ValueError for a field below `least`; names are dotted, as on a command line."""
    for name in names:
        value = getattr(config, name.rpartition(".")[2])
        if not value >= least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def field_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Returns the type of each field of a configuration class by dotted name, nested configurations included."""
    found: dict[str, Any] = {}
    for name, hint in _hints(cls).items():
        if dataclasses.is_dataclass(hint):
            found |= field_types(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            found[prefix + name] = hint
    return found


def allows(hint: Any, value: Any) -> bool:
    """Returns True if a value is of an annotated type; supports the types that configurations use."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return any(allows(choice, value) for choice in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        wanted = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(value) == len(wanted) and all(map(allows, wanted, value))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def in_words(hint: Any) -> str:
    """Returns an annotation in words, for messages."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return " or ".join(map(in_words, arguments))
    if origin is Literal:
        return f"one of {', '.join(choice or repr(choice) for choice in arguments)}"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a tuple with {in_words(arguments[0])} in each place"
    if origin is tuple:
        return f"({', '.join(map(in_words, arguments))})"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(hint) or f"a {hint.__name__}"
