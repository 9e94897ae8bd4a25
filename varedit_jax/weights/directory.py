"""A directory of weights: `config.json`, and each part (tokenizer, text, transformer) in one of the forms of native.py.

The form in which editors and tokenizers are shipped, shared, and started from.
"""

import hashlib
import pathlib

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from varedit_jax.config import EditingConfig, EditorConfig, SamplingConfig, from_dict, to_dict
from varedit_jax.errors import UserError
from varedit_jax.storage import files
from varedit_jax.storage.disk import explained, read_explained
from varedit_jax.storage.paths import PathLike, resolve
from varedit_jax.types import Params
from varedit_jax.weights import native

PARTS = ("tokenizer", "text", "transformer")
STORED_TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
CONFIG = "config.json"
VOCABULARY = "t5_tokenizer.json"  # of the prompts, where a directory brings its own


def save_weights(
    directory: PathLike,
    config: EditorConfig,
    params: Params,
    stored_type: str = "float32",
    sampling: SamplingConfig | None = None,
    editing: EditingConfig | None = None,
) -> None:
    """Writes parts of an editor, `params` by part name, to a new directory that appears complete or not at all.

    `sampling` is recorded as the editor's default, and `editing` where it is known. Tensors are rounded to
    `stored_type`: float32, bfloat16 or float16. Raises UserError if the directory exists, the disk is full, or a value
    does not fit `stored_type`.
    """
    target = resolve(directory)
    with explained("weights", target), files.new_directory(target) as staging:
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
        write_editor_config(staging, config, sampling or SamplingConfig(), editing)


def write_editor_config(
    directory: pathlib.Path, config: EditorConfig, sampling: SamplingConfig, editing: EditingConfig | None = None
) -> None:
    """Writes the config.json of a directory of weights, with `editing` where it is known."""
    record = {"model": to_dict(config), "sampling": to_dict(sampling)}
    if editing is not None:
        record["editing"] = to_dict(editing)
    files.write_json(directory / CONFIG, record, indent=1)


def is_weights_directory(directory: PathLike) -> bool:
    """Returns True if `directory` has the files of a directory of weights. Raises UserError if it is incomplete."""
    path = resolve(directory)
    with read_explained(str(path)):
        files.check_complete(path)
        return (path / CONFIG).is_file() and any(native.is_part(path, part) for part in PARTS)


def read_editor_config(directory: PathLike) -> tuple[EditorConfig, SamplingConfig]:
    """The config of the editor in a directory of weights, and its default sampling.

    Raises UserError if there is none, or it is not one of ours.
    """
    config, sampling, _ = _read_config(directory)
    return config, sampling


def read_editing_config(directory: PathLike) -> EditingConfig:
    """What a directory of weights records for editing: the defaults if it records nothing, as earlier versions did.

    Raises UserError as `read_editor_config`.
    """
    return _read_config(directory)[2]


def _read_config(directory: PathLike) -> tuple[EditorConfig, SamplingConfig, EditingConfig]:
    path = resolve(directory) / CONFIG
    with read_explained(str(path)):
        if not path.is_file():
            raise UserError(f"{directory} is not a directory of weights: it has no {CONFIG}")
        files.check_complete(path.parent)
        try:
            record = files.read_json(path)
            return (
                from_dict(EditorConfig, record["model"]),
                from_dict(SamplingConfig, record["sampling"]),
                from_dict(EditingConfig, record.get("editing", {})),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} does not describe an editor of this package: {error}") from error


def weights_hash(params: Params) -> str:
    """SHA-256 of names, shapes and values of a tree, in hexadecimal; precomputed features record it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(flax.traverse_util.flatten_dict(jax.device_get(params), sep="/").items()):
        array = np.ascontiguousarray(tensor)
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
