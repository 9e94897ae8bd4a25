"""The record of a run: config.json in its directory, and the fields that may change when the run resumes."""

import dataclasses
import json
import pathlib
import re
import uuid
from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from varedit_jax.config import RunConfig, TokenizerRunConfig, with_current_names
from varedit_jax.errors import UserError
from varedit_jax.parallel.agreement import Answer, agreed, gather, named, together
from varedit_jax.storage import files
from varedit_jax.storage.disk import explained
from varedit_jax.storage.paths import PathLike, resolve
from varedit_jax.weights.run_directory import CONFIG_FILE, FORMAT_VERSION, read_config

# Fields of a run's configuration that may change when it resumes: none of them changes the model, the examples or their
# order. `steps` and `stages` are among them so that a run can be lengthened.
FREE_FIELDS = (
    r"name",
    r"steps",
    r"stages",
    r"optimizer\.decay_steps",
    r"optimizer\.accumulation",  # depends on the machine's memory; noise is drawn for each microbatch
    r"optimizer\.ema_decay",  # `Checkpoints.restore` starts or drops the EMA
    r"cadence\..*",
    r"eval_batches",
    r"mesh\..*",
    r"compiler_options",
    r"guard\..*",
    r"sampling\..*",
    r"data\.(directory|cache_directory|workers|read_threads|prefetch_batches|bad_share|eval_examples)",
    r"data\.text_buckets",  # padding, which nothing sees
    r"model\.transformer\.(attention|remat|remat_saved|gradient_sums)",
    r"init_from",  # read at the first step only
    r"(tokenizer|text|perceptual)_weights",  # directories of the frozen weights, which may move
)

# Of these, fields that may differ between the hosts of a run: where a host finds its files.
LOCAL_FIELDS = (r"data\.(directory|cache_directory)", r"init_from", r"(tokenizer|text|perceptual)_weights")

IDENTITY_FILE = "run.json"  # the run's id, made with it, and a text that is new at every start

_ABSENT = "absent"


def identify(workdir: PathLike) -> str:
    """Returns the id of the run in `workdir`, which is made with the run, as all processes read it there.

    Process 0 writes a new text beside it, which the others have to find. Raises UserError, in all processes, if one
    does not: the directory is not the same for all.
    """
    path = resolve(workdir) / IDENTITY_FILE
    with together(), explained(IDENTITY_FILE, path.parent):
        if jax.process_index() == 0:
            run = _identity(path).get("run") or uuid.uuid4().hex
            files.write_json(path, {"run": run, "start": uuid.uuid4().hex})

    def explain(answers: list[Answer]) -> str:
        return (
            f"{workdir} is not the same directory on all hosts: {named(answers)} does not find what process 0 on "
            f"{answers[0].host} wrote there; give a --workdir on storage that all hosts share"
        )

    return str(json.loads(agreed(lambda: json.dumps(_identity(path), sort_keys=True), explain))["run"])


def _identity(path: pathlib.Path) -> dict[str, Any]:
    """Returns the content of run.json; {} if there is none yet, or it is broken."""
    try:
        return dict(files.read_json(path))
    except (OSError, ValueError, TypeError):
        return {}


def check_alike(values: Mapping[str, Any]) -> None:
    """Raises UserError, in all processes, with the first field in which their configurations differ.

    `LOCAL_FIELDS` may differ.
    """
    fields = flatten_dict(json.loads(json.dumps(values)), sep=".")
    for field in [name for name in fields if any(re.fullmatch(pattern, name) for pattern in LOCAL_FIELDS)]:
        del fields[field]
    first, *others = [json.loads(text) for text in gather(json.dumps(fields))]
    for index, other in enumerate(others, 1):
        for field in dict.fromkeys([*first, *other]):
            if first.get(field, _ABSENT) != other.get(field, _ABSENT):
                raise UserError(
                    f"process {index} was started with {field} = {other.get(field, _ABSENT)!r}, but process 0 with "
                    f"{first.get(field, _ABSENT)!r}; start all processes with the same configuration"
                )


def write_config(directory: PathLike, values: Mapping[str, Any]) -> None:
    """Replaces a run's config.json, atomically."""
    path = resolve(directory) / CONFIG_FILE
    files.make_directory(path.parent)
    with explained(CONFIG_FILE, path.parent):
        files.write_json(path, {"format_version": FORMAT_VERSION, **values})


def check_config(workdir: PathLike, values: Mapping[str, Any]) -> None:
    """Raises UserError, with the first differing field and both values, if `workdir` holds a run of another config.

    `FREE_FIELDS` may differ. A field that is not in the record has its default. Passes if there is no config.json.
    """
    if not (resolve(workdir) / CONFIG_FILE).exists():
        return
    # Through JSON, because the record has lists for tuples.
    given = flatten_dict(json.loads(json.dumps(values)), sep=".")
    recorded = _defaults(values) | flatten_dict(with_current_names(read_config(workdir)), sep=".")
    for field in dict.fromkeys([*given, *recorded]):
        if any(re.fullmatch(pattern, field) for pattern in FREE_FIELDS):
            continue
        ours, theirs = given.get(field, _ABSENT), recorded.get(field, _ABSENT)
        if ours != theirs:
            raise UserError(
                f"{workdir} holds a run with {field} = {theirs!r}, but this one has {ours!r}; "
                f"use another --workdir, or the configuration in {resolve(workdir) / CONFIG_FILE}"
            )


def _defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the defaults of the config class whose fields are those of `values`, by dotted name; {} if none fits."""
    for cls in (RunConfig, TokenizerRunConfig):
        if {field.name for field in dataclasses.fields(cls)} == set(values):
            return flatten_dict(json.loads(json.dumps(_field_defaults(cls))), sep=".")
    return {}


def _field_defaults(cls: Any) -> dict[str, Any]:
    nested = dataclasses.is_dataclass
    return {
        field.name: _field_defaults(field.type) if nested(field.type) else field.default
        for field in dataclasses.fields(cls)
        if nested(field.type) or field.default is not dataclasses.MISSING
    }
