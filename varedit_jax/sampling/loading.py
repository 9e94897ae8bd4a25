"""Weights from files to the devices that edit with them."""

import dataclasses
from typing import NamedTuple, cast, get_args

import jax

from varedit_jax.config import ComputeType, EditingConfig, EditorConfig, SamplingConfig
from varedit_jax.errors import UserError
from varedit_jax.parallel.rules import param_shardings, with_shardings
from varedit_jax.parameters import stored_params, summed_axes
from varedit_jax.quantized import Int8
from varedit_jax.storage.paths import PathLike
from varedit_jax.text.vocabulary import Vocabulary
from varedit_jax.types import Params
from varedit_jax.weights import int8, names, native
from varedit_jax.weights.directory import PARTS, VOCABULARY
from varedit_jax.weights.export_source import ExportSource, open_source

INT8 = "int8"
DTYPES = (*get_args(ComputeType), INT8)  # that weights can be loaded in


class Loaded(NamedTuple):
    """Weights on their devices, and what they are to be used with."""

    config: EditorConfig  # its transformer.dtype is the type that the blocks compute in
    params: Params  # {"tokenizer", "text", "transformer"}, in the types of `stored_params`
    sampling: SamplingConfig
    editing: EditingConfig
    vocabulary: Vocabulary


def load(
    where: PathLike,
    *,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    weights: str = "model",
    step: int | None = None,
    tokenizer: PathLike = "",
    text: PathLike = "",
) -> Loaded:
    """Loads a directory of weights, or a checkpoint of a training run.

    Arrays come one at a time, in parts, from the disk to the device in the type that they are kept in: a host needs
    memory for the largest one, and some 100 MB. Of a run's checkpoint the parts are what one of its devices wrote.

    Args:
      where: directory with config.json and weights, or the working directory of a run.
      dtype: float32 or bfloat16, of the transformer's blocks and of the text encoder; by default what the directory
        records: that of the published models, or of the run. With int8 their matrices are kept in int8, rounded as they
        are read if they are not on disk so, and compute in the type recorded. Weights that are int8 on disk stay so by
        default; the other types give what they stand for, not what they were before they were rounded.
      mesh: devices to split the parameters over, by parallel/rules.py; by default the mesh that is set, or else the
        first device.
      weights: "model", or "ema" for the EMA that a run with optimizer.ema_decay keeps.
      step: of a run's checkpoint; the newest by default.
      tokenizer, text: directories of these parts, if `where` has none, or a run's have moved.

    Raises:
      UserError: no weights there, or weights that do not fit their configuration, the mesh or the type.
    """
    if weights not in ("model", "ema"):
        raise UserError(f"there are no weights {weights!r}; give model or ema")
    source = open_source(where, weights=weights, step=step)
    config, editing = _typed(source, dtype)
    leaves = {part: _open(source, part, {"tokenizer": tokenizer, "text": text}) for part in PARTS}
    abstract = {
        part: stored_params(config, part, editing.text_dtype, dtype == INT8 or (dtype is None and _is_int8(found)))
        for part, found in leaves.items()
    }
    mesh = mesh or jax.sharding.get_mesh()
    if not mesh.empty:
        abstract = with_shardings(abstract, param_shardings(abstract, mesh))
    params: Params = {}
    for part, found in leaves.items():
        like = names.flat(abstract[part])
        params[part] = names.tree({path: _place(part, path, leaf, like[path]) for path, leaf in found.items()})
    own = source.directory / VOCABULARY
    vocabulary = Vocabulary.load(own) if source.run is None and own.is_file() else Vocabulary.load()
    return Loaded(config, params, source.sampling, editing, vocabulary)


def _is_int8(leaves: dict[str, native.Leaf]) -> bool:
    """Returns True for a part that is on disk in int8."""
    return any(isinstance(leaf.source, native.StoredInt8) for leaf in leaves.values())


def _place(part: str, path: str, leaf: native.Leaf, like: jax.ShapeDtypeStruct | Int8) -> jax.Array | Int8:
    if isinstance(like, Int8):
        return int8.load(leaf, like, summed_axes(part, path))
    return native.load_sharded(leaf, like)


def _typed(source: ExportSource, dtype: str | None) -> tuple[EditorConfig, EditingConfig]:
    """The configurations, with another type where one is asked for. Raises UserError for a type that there is not."""
    if dtype is None or dtype == INT8:
        return source.config, source.editing
    if dtype not in DTYPES:
        raise UserError(f"weights cannot be loaded as {dtype!r}; give {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    wanted = cast(ComputeType, dtype)
    transformer = dataclasses.replace(source.config.transformer, dtype=wanted)
    return (
        dataclasses.replace(source.config, transformer=transformer),
        dataclasses.replace(source.editing, text_dtype=wanted),
    )


def _open(source: ExportSource, part: str, moved: dict[str, PathLike]) -> dict[str, native.Leaf]:
    """Arrays of a part, not yet read: the run's own, or those of the directory that is given or recorded."""
    run, elsewhere = source.run, moved.get(part, "")
    if part in source.parts and (run is not None or not elsewhere):
        return source.open(part)
    recorded: dict[str, PathLike] = {"tokenizer": run.tokenizer_weights, "text": run.text_weights} if run else {}
    directory = elsewhere or (recorded[part] if run else source.directory)
    if not directory:
        raise UserError(f"the run {source.directory} names no directory of its {part} weights; give --{part}=DIRECTORY")
    return native.open_part(directory, part, stored_params(source.config, part))
