"""The record of a run: config.json in its directory, and the fields that may change when the run resumes."""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from varedit_jax.config import RunConfig, TokenizerRunConfig, with_current_names
from varedit_jax.errors import UserError
from varedit_jax.weights.run_directory import CONFIG_FILE, FORMAT_VERSION, read_config

# Fields of a run's configuration that may change between the processes of one run: none of them changes the model, the
# examples or their order. `steps`, and how they divide, are among them so that a run can be lengthened.
FREE_FIELDS = (
    r"name",
    r"steps",
    r"stages",
    r"optimizer\.decay_steps",
    r"optimizer\.accumulation",  # another machine has room for other microbatches; noise is drawn for each anew
    r"optimizer\.ema_decay",  # `Checkpoints.restore` starts or drops the EMA
    r"cadence\..*",
    r"eval_batches",
    r"mesh\..*",
    r"guard\..*",
    r"sampling\..*",
    r"data\.(directory|cache_directory|read_threads|prefetch_batches|eval_examples)",
    r"model\.transformer\.(attention|remat|remat_saved)",
    r"init_from",  # read at the first step only
    r"(tokenizer|text|perceptual)_weights",  # where the frozen weights lie, which may move
)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ABSENT = "absent"


def write_config(directory: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Writes a run's configuration to its config.json, replacing it at once or not at all."""
    path = pathlib.Path(directory) / CONFIG_FILE
    with room_explained(CONFIG_FILE, path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"format_version": FORMAT_VERSION, **values})


def check_config(workdir: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Refuses to resume in the directory of a run that was configured otherwise (`FREE_FIELDS` aside).

    A field that did not exist when the run was recorded has its default there. Passes if `workdir` has no config.json.
    Raises UserError with the first differing field and both values.
    """
    if not (pathlib.Path(workdir) / CONFIG_FILE).exists():
        return
    # What JSON does to tuples has to be done to both.
    recorded, asked = _flat(with_current_names(read_config(workdir))), _flat(json.loads(json.dumps(values)))
    recorded = _defaults(values) | recorded
    for field in dict.fromkeys([*asked, *recorded]):
        if any(re.fullmatch(pattern, field) for pattern in FREE_FIELDS):
            continue
        ours, theirs = asked.get(field, _ABSENT), recorded.get(field, _ABSENT)
        if ours != theirs:
            raise UserError(
                f"{workdir} holds a run with {field} = {theirs!r}, but this one has {ours!r}; "
                f"use another --workdir, or the configuration in {pathlib.Path(workdir) / CONFIG_FILE}"
            )


def make_directory(directory: pathlib.Path) -> None:
    """Creates a directory where needed. Raises UserError if that cannot be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{error.filename} is a file, where the directory of a run should be") from error
    except OSError as error:
        raise UserError(f"cannot create {directory}: {error.strerror}") from error


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Replaces a file at once or not at all."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(values, indent=2) + "\n")
    draft.replace(path)


def _defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of the fields of the configuration that `values` is of, by dotted name; none if it is of no kind."""
    for cls in (RunConfig, TokenizerRunConfig):
        if {field.name for field in dataclasses.fields(cls)} == set(values):
            return _flat(json.loads(json.dumps(_field_defaults(cls))))
    return {}


def _field_defaults(cls: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            defaults[field.name] = _field_defaults(field.type)
        elif field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
    return defaults


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


@contextlib.contextmanager
def room_explained(what: str, directory: pathlib.Path) -> Iterator[None]:
    """Turns a failure to write `what` under `directory` for lack of room into a UserError.

    Orbax reports a failed write in its own words, of various types, with the system's error number inside.
    """
    try:
        yield
    except Exception as error:
        found = re.search(r"os_error_code='(\d+)'", str(error))
        code = error.errno if isinstance(error, OSError) else int(found.group(1)) if found else None
        if code not in _NO_ROOM:
            raise
        raise UserError(
            f"writing the {what} failed in {directory}: {os.strerror(code)}; earlier checkpoints are intact; make room "
            f"and run the same command again"
        ) from error


@contextlib.contextmanager
def writing(directory: pathlib.Path) -> Iterator[None]:
    """Turns a failure to write in `directory` into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"writing in {directory} failed: {error.strerror}; put that right and run the same command again"
        ) from error
