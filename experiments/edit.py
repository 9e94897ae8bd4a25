"""Edits an image by an instruction.

    python -m experiments.edit --image=image.png --instruction="add a red circle at the top left" --output=edited.png

`--checkpoint` is a directory of weights or the working directory of a training run; the shipped `shapes` editor by
default.
"""

from typing import TYPE_CHECKING

from absl import flags

from experiments import program
from experiments.configs import shapes
from varedit_jax import command, images
from varedit_jax.config import SamplingConfig
from varedit_jax.lazy import LazyModule
from varedit_jax.sampling.editor import Editor
from varedit_jax.sampling.loading import DTYPES
from varedit_jax.scales import aspects_to_use

if TYPE_CHECKING:
    from varedit_jax.conversion import convert
else:
    convert = LazyModule("varedit_jax.conversion.convert")

_CHECKPOINT = command.DEFINE_path("checkpoint", shapes.SHIPPED, "directory of weights, or of a training run")
_IMAGE = command.DEFINE_path("image", None, "image to edit", required=True)
_INSTRUCTION = flags.DEFINE_string("instruction", None, "what to do, in words", required=True)
_OUTPUT = command.DEFINE_path("output", None, "image to write (.png, .jpg, .webp)", required=True)
_SEED = flags.DEFINE_integer("seed", 0, "of sampling", lower_bound=0, upper_bound=2**32 - 1)
_OWN = "the checkpoint's own by default"
_SAMPLING = program.FieldFlags(
    SamplingConfig,
    {"guidance": "guidance", "temperature": "temperature", "top_p": "top_p", "greedy": "greedy"},
    {
        "guidance": f"classifier-free guidance, or one per scale, as in 1.5,1.5,1; 1 = off; {_OWN}",
        "temperature": f"of sampling, or one per scale; {_OWN}",
        "top_p": f"0.97 removes bit values of probability <= 0.03; {_OWN}",
        "greedy": f"most likely bits; {_OWN}",
    },
)
_ASPECT = flags.DEFINE_string(
    "aspect", "", "square, auto (nearest of all templates) or a template; by default as the weights were trained"
)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, DTYPES, f"type of the transformer's blocks and the text encoder; int8 needs least memory; {_OWN}"
)
_WEIGHTS = flags.DEFINE_enum("weights", "model", ["model", "ema"], "parameters of a run, or their EMA")
_STEP = flags.DEFINE_integer("step", None, "of a run's checkpoint; the newest by default", lower_bound=0)
_TOKENIZER = command.DEFINE_path(
    "tokenizer", "", "directory of the tokenizer, if the checkpoint has none or it has moved"
)
_TEXT = command.DEFINE_path("text", "", "directory of the text encoder, likewise")
_VERIFY = flags.DEFINE_bool("verify", False, "first compare the tensors of these directories with their manifests")


def main(argv: list[str]) -> None:
    """Edits one image."""
    del argv
    images.check_output(_OUTPUT.value)
    _SAMPLING.override(SamplingConfig())  # mistakes, before anything is loaded
    aspects_to_use(_ASPECT.value, ())
    image = images.read_image(_IMAGE.value)
    if _VERIFY.value:
        for directory in filter(None, dict.fromkeys((_CHECKPOINT.value, _TOKENIZER.value, _TEXT.value))):
            print(f"{convert.verify(directory)} tensors of {directory} are as they were written")
    editor = Editor.load(
        _CHECKPOINT.value,
        dtype=_DTYPE.value,
        weights=_WEIGHTS.value,
        step=_STEP.value,
        tokenizer=_TOKENIZER.value,
        text=_TEXT.value,
    )
    sampling = _SAMPLING.override(editor.sampling)
    [edited] = editor.edit([image], [_INSTRUCTION.value], [_SEED.value], sampling, _ASPECT.value)
    images.write_image(_OUTPUT.value, edited)
    print(f"{_OUTPUT.value}: {edited.shape[1]} x {edited.shape[0]} px")


if __name__ == "__main__":
    program.run(main)
