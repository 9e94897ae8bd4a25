"""A directory of weights: `config.json`, and each part (tokenizer, text, transformer) in one of the forms of native.py.

The form in which editors and tokenizers are shipped, shared, and started from.
"""

import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from varedit_jax.config import EditorConfig, SamplingConfig, from_dict, to_dict
from varedit_jax.errors import UserError
from varedit_jax.types import Params
from varedit_jax.weights import native

PARTS = ("tokenizer", "text", "transformer")
STORED_TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
CONFIG = "config.json"
VOCABULARY = "t5_tokenizer.json"  # of the prompts, where a directory brings its own


def save_directory(
    directory: str | os.PathLike[str],
    config: EditorConfig,
    params: Params,
    stored_type: str = "float32",
    sampling: SamplingConfig | None = None,
) -> None:
    """Writes parts of an editor, `params` by part name, to a new directory that appears complete or not at all.

    `sampling` is recorded as what the editor is used with. Tensors are rounded to `stored_type`: float32, bfloat16 or
    float16.
    Raises UserError if the directory exists, the disk is full, or a value does not fit `stored_type`.
    """
    target = pathlib.Path(directory)
    if target.exists():
        raise UserError(f"{target} exists; give a new directory or remove it first")
    staging = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        for part, tree in params.items():
            flat = flax.traverse_util.flatten_dict(jax.device_get(tree), sep="/")
            with np.errstate(over="ignore"):  # what becomes infinite is refused below, by name
                tensors = {
                    name: np.asarray(x, np.float32).astype(STORED_TYPES[stored_type]) for name, x in flat.items()
                }
            for name, tensor in tensors.items():
                if not np.isfinite(tensor.astype(np.float32)).all():
                    raise UserError(f"{part}/{name} holds values that are not finite in {stored_type}")
            safetensors.numpy.save_file(tensors, staging / f"{part}.safetensors")
        record = {"model": to_dict(config), "sampling": to_dict(sampling or SamplingConfig())}
        (staging / CONFIG).write_text(json.dumps(record, indent=1) + "\n")
        staging.rename(target)
    except (OSError, safetensors.SafetensorError) as error:  # safetensors wraps what the system says
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {target}: {reason}; nothing was left behind") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def is_directory(directory: str | os.PathLike[str]) -> bool:
    """Whether `directory` looks like a directory of weights."""
    path = pathlib.Path(directory)
    return (path / CONFIG).is_file() and any(native.is_part(path, part) for part in PARTS)


def read_config(directory: str | os.PathLike[str]) -> tuple[EditorConfig, SamplingConfig]:
    """The editor recorded in a directory of weights, and the sampling it is used with.

    Raises UserError if there is none, or it is not one of ours.
    """
    path = pathlib.Path(directory) / CONFIG
    if not path.is_file():
        raise UserError(f"{directory} is not a directory of weights: it has no {CONFIG}")
    try:
        record = json.loads(path.read_text())
        return from_dict(EditorConfig, record["model"]), from_dict(SamplingConfig, record["sampling"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not describe an editor of this package: {error}") from error


def load_directory(directory: str | os.PathLike[str], part: str, expected: Any) -> Params:
    """One part of a directory of weights, as float32 numpy arrays in the tree `expected` (of jax.ShapeDtypeStruct).

    Raises UserError for a missing or damaged part, and for weights of another model, naming what differs.
    """
    return native.read_part(directory, part, expected)


def weights_hash(params: Params) -> str:
    """SHA-256 of names, shapes and values of a tree, in hexadecimal: what precomputed features are tied to."""
    digest = hashlib.sha256()
    for name, tensor in sorted(flax.traverse_util.flatten_dict(jax.device_get(params), sep="/").items()):
        array = np.ascontiguousarray(tensor)
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
