"""Edits an image by an instruction.

    python -m experiments.edit --image=image.png --instruction="add a red circle at the top left" --output=edited.png

`--checkpoint` is a directory of weights or the working directory of a training run; the shipped `shapes` editor by
default.
"""

import dataclasses
from typing import Any

from absl import flags

from experiments import program
from experiments.configs import shapes
from varedit_jax import command, images
from varedit_jax.config import SamplingConfig
from varedit_jax.conversion import convert
from varedit_jax.sampling.editor import Editor

_CHECKPOINT = command.DEFINE_path("checkpoint", shapes.SHIPPED, "directory of weights, or of a training run")
_IMAGE = command.DEFINE_path("image", None, "image to edit", required=True)
_INSTRUCTION = flags.DEFINE_string("instruction", None, "what to do, in words", required=True)
_OUTPUT = command.DEFINE_path("output", None, "image to write (.png, .jpg, .webp)", required=True)
_SEED = flags.DEFINE_integer("seed", 0, "of sampling", lower_bound=0, upper_bound=2**32 - 1)
_GUIDANCE = flags.DEFINE_float("guidance", None, "classifier-free guidance; 1 = off; the checkpoint's own by default")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "of sampling; the checkpoint's own by default", lower_bound=1e-3)
_TOP_P = flags.DEFINE_float(
    "top_p", None, "0.97 removes bit values of probability <= 0.03", lower_bound=0, upper_bound=1
)
_GREEDY = flags.DEFINE_bool("greedy", None, "most likely bits; the checkpoint's own by default")
_TOKENIZER = command.DEFINE_path(
    "tokenizer", "", "directory of the tokenizer, if the checkpoint has none or it has moved"
)
_TEXT = command.DEFINE_path("text", "", "directory of the text encoder, likewise")
_VERIFY = flags.DEFINE_bool("verify", False, "first compare the tensors of these directories with their manifests")


def _sampling(own: SamplingConfig) -> SamplingConfig:
    given: dict[str, Any] = {
        "guidance": _GUIDANCE.value,
        "temperature": _TEMPERATURE.value,
        "top_p": _TOP_P.value,
        "greedy": _GREEDY.value,
    }
    return dataclasses.replace(own, **{name: value for name, value in given.items() if value is not None})


def main(argv: list[str]) -> None:
    """Edits one image."""
    del argv
    images.check_output(_OUTPUT.value)
    image = images.read_image(_IMAGE.value)
    if _VERIFY.value:
        for directory in filter(None, dict.fromkeys((_CHECKPOINT.value, _TOKENIZER.value, _TEXT.value))):
            print(f"{convert.verify(directory)} tensors of {directory} are as they were written")
    editor = Editor.load(_CHECKPOINT.value, tokenizer=_TOKENIZER.value, text=_TEXT.value)
    [edited] = editor.edit([image], [_INSTRUCTION.value], [_SEED.value], _sampling(editor.sampling))
    images.write_image(_OUTPUT.value, edited)
    print(f"{_OUTPUT.value}: {edited.shape[1]} x {edited.shape[0]} px")


if __name__ == "__main__":
    program.run(main)
