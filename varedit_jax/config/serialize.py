"""Configurations as nested plain dicts, for JSON, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from varedit_jax.config.run import Cadence

Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a configuration as nested plain dicts."""
    return dataclasses.asdict(config)


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Returns a config of class `cls` from the output of `to_dict`, or of earlier versions; lists become tuples.

    Raises ValueError naming a field that `cls` does not have, or a value that a field cannot have.
    """
    fields = {field.name: field.type for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if "cadence" in fields:
        values = with_current_names(values)
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {unknown[0]!r}; it has {', '.join(fields)}")
    arguments = {}
    for name, value in values.items():
        field_type: Any = fields[name]
        nested = isinstance(field_type, type) and dataclasses.is_dataclass(field_type)
        arguments[name] = from_dict(field_type, value) if nested else tuples(value)
    return cls(**arguments)


def with_current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the dict of a run with nested fields of `cadence`, which earlier versions had at the top level."""
    earlier = {field.name for field in dataclasses.fields(Cadence)} & set(values)
    if not earlier:
        return dict(values)
    current = {name: value for name, value in values.items() if name not in earlier}
    return current | {"cadence": {name: values[name] for name in sorted(earlier)} | values.get("cadence", {})}


def tuples(value: Any) -> Any:
    """Returns nested lists as tuples, and anything else as it is."""
    return tuple(tuples(v) for v in value) if isinstance(value, (list, tuple)) else value
