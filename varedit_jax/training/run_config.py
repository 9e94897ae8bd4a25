"""The record of a run: config.json in its directory, and the fields that may change when the run resumes."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict

from varedit_jax.config import RunConfig, TokenizerRunConfig, with_current_names
from varedit_jax.errors import UserError
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
    r"model\.transformer\.(attention|remat|remat_saved)",
    r"init_from",  # read at the first step only
    r"(tokenizer|text|perceptual)_weights",  # directories of the frozen weights, which may move
)

_ABSENT = "absent"


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
