"""Finds the tensors of a part in a published file, or in a checkpoint of a trainer."""

import re

from varedit_jax.errors import UserError
from varedit_jax.storage.paths import PathLike
from varedit_jax.weights.reader import WeightsFile, check_whole, open_weights

# Modules around a model, or around a block of it; DDP's `module.` is part of the prefix of a state dict, see below.
_WRAPPERS = re.compile(r"_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module|fpw_module)\.")

# A tensor of each part that every file has. What stands in front of it is where a file holds the part: nothing, or the
# names of dicts and modules, such as `trainer.gpt_fsdp.`, `model.module.` or `text_encoder.`.
_LANDMARKS = {
    "transformer": re.compile(r"(|.*?\.)(?:block_chunks\.\d+\.module|blocks)\.\d+\.sa\.proj\.weight"),
    "tokenizer": re.compile(r"(|.*?\.)encoder\.conv_in(?:\.conv)?\.weight"),
    "text": re.compile(r"(|.*?\.)encoder\.block\.\d+\.layer\.0\.SelfAttention\.q\.weight"),
}


def find_part(path: PathLike, part: str, which: str = "model", flag: str = "") -> tuple[WeightsFile, str]:
    """Returns the tensors of a part in a file that may hold more, by their own names, and a sentence on which they are.

    Names lose what wrappers add. The sentence is empty if the file holds nothing else. Raises UserError as
    `open_weights` does, and if the file holds no weights of the kind that is asked for, or several.

    Args:
      path: file or directory.
      part: transformer, tokenizer or text.
      which: model, or ema: the averaged weights.
      flag: the flag that chooses `which`; "" if none does: all are taken for parameters.
    """
    check_whole(path)
    whole = open_weights(path).renamed(lambda name: _WRAPPERS.sub("", name))
    places: dict[str, list[str]] = {"model": [], "ema": []}
    for place in dict.fromkeys(match[1] for name in whole if (match := _LANDMARKS[part].fullmatch(name))):
        places["ema" if flag and "ema" in re.split(r"[._]", place.lower()) else "model"].append(place)
    other = "model" if which == "ema" else "ema"
    _check_one(path, part, places, which, flag)
    file = whole.under(places[which][0]) if places[which] else whole
    if len(file) == len(whole):
        return file, ""
    left = f"{len(whole) - len(file)} other tensors of the file are passed over"
    choice = f"; --{flag}={other} takes {_place_text(places[other][0])}" if places[other] else ""
    return file, f"{part}: {_place_text(places[which][0])} of {path} is taken ({left}{choice})"


def _check_one(path: PathLike, part: str, places: dict[str, list[str]], which: str, flag: str) -> None:
    """Raises UserError if there are several sets of weights of a kind, or one of the other kind alone."""
    if which == "ema" and not places["ema"]:
        raise UserError(f"{path} holds no EMA of the {part} weights; use --{flag}=model")
    if places["ema"] and not places[which]:
        place = _place_text(places["ema"][0])
        raise UserError(f"{path} holds the {part} weights as an EMA alone, {place}; use --{flag}=ema")
    if len(places[which]) > 1:
        found = ", ".join(map(_place_text, places[which]))
        raise UserError(
            f"{path} holds {len(places[which])} sets of {part} weights: {found}; save the one that is meant alone"
        )


def _place_text(place: str) -> str:
    return place.removesuffix(".") or "the top level"
