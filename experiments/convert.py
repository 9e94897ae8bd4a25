"""Converts weights: published PyTorch files to our format, and back, or to a directory to share; ours to int8.

    python -m experiments.convert --transformer=VAREdit/8B-512.pth --tokenizer=infinity_vae_d56_f8_14_patchify.pth \\
        --text=flan-t5-xl --output=weights/varedit_8b_512
    python -m experiments.convert --to=torch --input=runs/varedit_8b_512 --output=published --format=safetensors
    python -m experiments.convert --to=directory --input=runs/varedit_8b_512 --output=shared --license=apache-2.0
    python -m experiments.convert --to=int8 --input=weights/varedit_8b_512 --output=weights/varedit_8b_512_int8
    python -m experiments.convert --dry_run --preset=8b --to=torch
    python -m experiments.convert --verify=weights/varedit_8b_512

The family of a transformer (VAREdit's and Infinity's differ in positions) and its image size are inferred from the name
of its file or directory, unless --family, --rope_layout and --pixel_budget give them, or a trainer's checkpoint records
the size; a guess is a warning, and what is used is printed and recorded.
Memory use does not depend on the model. The same command resumes an interrupted conversion; the output appears complete
or not at all, with a manifest of the SHA-256 of every tensor.
"""

import resource
import time
from typing import Any, get_args

from absl import flags

from experiments import program
from varedit_jax import command
from varedit_jax.config import PIXEL_BUDGETS, RopeLayout, preset
from varedit_jax.conversion import convert, quantize
from varedit_jax.conversion.infer_config import FAMILIES
from varedit_jax.errors import UserError
from varedit_jax.storage.disk import size_text
from varedit_jax.weights.directory import PARTS, STORED_TYPES
from varedit_jax.weights.export_source import open_source

_TO = flags.DEFINE_enum("to", "jax", ["jax", "torch", "directory", "int8"], "what to write")
_OUTPUT = command.DEFINE_path("output", "", "new directory")
_FILES = {
    "transformer": command.DEFINE_path(
        "transformer", "", "transformer, published or in a trainer's checkpoint: a file, or shards"
    ),
    "tokenizer": command.DEFINE_path("tokenizer", "", "published BSQ tokenizer"),
    "text": command.DEFINE_path("text", "", "Flan-T5 of any size: file or directory as on Hugging Face"),
}
_WEIGHTS = flags.DEFINE_enum(
    "weights", "model", ["model", "ema"], "parameters or their EMA, of a trainer's checkpoint or of a run"
)
_TOKENIZER_WEIGHTS = flags.DEFINE_enum("tokenizer_weights", "model", ["model", "ema"], "weights of its file to convert")
_FAMILY = flags.DEFINE_enum("family", None, list(FAMILIES), "family of the transformer; default: by file name")
_ROPE = flags.DEFINE_enum("rope_layout", None, list(get_args(RopeLayout)), "positions; the family's by default")
_BUDGET: flags.FlagHolder[Any] = flags.DEFINE_enum(
    "pixel_budget",
    None,
    list(PIXEL_BUDGETS),
    "resolution of the transformer; by default from its file or the name of that, or 0.25M, with a warning",
)
_INPUT = command.DEFINE_path(
    "input", "", "directory of weights, or of a training run, for --to=torch, --to=directory and --to=int8"
)
_PARTS = flags.DEFINE_multi_enum("parts", [], list(PARTS), "parts to write, one per flag; all by default")
_FORMAT = flags.DEFINE_enum("format", "pth", list(convert.FORMATS), "of published files")
_SHARD = flags.DEFINE_float("shard_gb", 5.0, "largest safetensors file, in GB", lower_bound=1e-6)
_DTYPE = flags.DEFINE_enum("dtype", "", ["", *STORED_TYPES], "type to round to; by default the published or stored one")
_CHUNKS = flags.DEFINE_integer("chunks", None, "chunks of blocks in published names, 0 for none", lower_bound=0)
_LICENSE = flags.DEFINE_string("license", "", "license for the model card, such as apache-2.0")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "print every mapping, one published tensor per line, and write nothing")
_PRESET = flags.DEFINE_string("preset", "", "size for a dry run without weights, such as 8b")
_VERIFY = command.DEFINE_path(
    "verify", "", "directory whose tensors are compared with its manifest; nothing is written"
)


def _published() -> convert.Published:
    files = {part: flag.value for part, flag in _FILES.items() if flag.value}
    if not files:
        raise UserError("give at least one of --transformer, --tokenizer and --text")
    return convert.Published(
        files=files,
        weights=_WEIGHTS.value,
        tokenizer_weights=_TOKENIZER_WEIGHTS.value,
        family=_FAMILY.value or "",
        rope_layout=_ROPE.value or "",
        pixel_budget=_BUDGET.value or "",
    )


def _dry_run() -> list[convert.Mapped]:
    if _PRESET.value:
        try:
            config = preset(_PRESET.value)
        except ValueError as error:
            raise UserError(str(error)) from error
        return convert.mapping_of(config, _PARTS.value or ["transformer"], _DTYPE.value or "float32")
    if _TO.value == "jax":
        return convert.mapping_in(_published())
    if not _INPUT.value:
        raise UserError("--dry_run needs --preset, --input, or published files")
    return convert.mapping_from(open_source(_INPUT.value, _PARTS.value, _WEIGHTS.value), _DTYPE.value, _CHUNKS.value)


def _convert() -> int:
    if not _OUTPUT.value:
        raise UserError("--output is missing; give a new directory")
    if _TO.value == "jax":
        return convert.to_jax(_published(), _OUTPUT.value)
    if not _INPUT.value:
        raise UserError(f"--to={_TO.value} needs --input, a directory of weights or of a run")
    source = open_source(_INPUT.value, _PARTS.value, _WEIGHTS.value)
    if _TO.value == "directory":
        return convert.to_directory(source, _OUTPUT.value, _DTYPE.value, _LICENSE.value)
    if _TO.value == "int8":
        return quantize.to_int8(source, _OUTPUT.value)
    shard_bytes = int(_SHARD.value * 1e9)
    return convert.to_torch(source, _OUTPUT.value, _FORMAT.value, shard_bytes, _DTYPE.value, _CHUNKS.value)


def main(argv: list[str]) -> None:
    """Converts, verifies, or prints the mapping."""
    del argv
    if _VERIFY.value:
        print(f"{convert.verify(_VERIFY.value)} tensors of {_VERIFY.value} are as they were written")
        return
    if _DRY_RUN.value:
        print("\n".join(map(str, _dry_run())))
        return
    start = time.perf_counter()
    size = _convert()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{_OUTPUT.value}: {size_text(size)} in {seconds:.1f} s ({size / 1e6 / seconds:.0f} MB/s), "
        f"peak memory {size_text(peak)}"
    )


if __name__ == "__main__":
    program.run(main)
