"""Instructions to token ids: the vocabulary of T5, which all Flan-T5 sizes share (model.md, section 4)."""

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Sequence

import numpy as np
import tokenizers

from varedit_jax.errors import UserError
from varedit_jax.storage.disk import read_explained
from varedit_jax.storage.paths import PathLike, resolve

PAD_ID = 0  # `<pad>`
END_ID = 1  # `</s>`, the last token of every instruction
UNKNOWN_ID = 2  # `<unk>`: emoji, Chinese and all else that the vocabulary does not cover


@functools.lru_cache(maxsize=4)
def _tokenizer(path: str) -> tokenizers.Tokenizer:
    """The tokenizer in file `path`, or the package's if that is empty."""
    if path:
        try:
            with read_explained(path):
                data = resolve(path).read_bytes()
            text = data.decode(json.detect_encoding(data))  # without a byte order mark
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the vocabulary {path}: {error}; give the tokenizer.json of a T5") from error
    else:
        text = importlib.resources.files(__package__).joinpath("t5_tokenizer.json").read_text(encoding="utf-8")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for any fault of the file
        raise UserError(f"{path} is not a vocabulary: {error}; give the tokenizer.json of a T5") from error
    for token, wanted in (("<pad>", PAD_ID), ("</s>", END_ID), ("<unk>", UNKNOWN_ID)):
        if tokenizer.token_to_id(token) != wanted:
            raise UserError(
                f"{path} is not a vocabulary of T5: {token} has the id {tokenizer.token_to_id(token)}, but must have "
                f"{wanted}; give the tokenizer.json of a T5"
            )
    # A file may set truncation and padding; `encode` does both itself, without changing shared state.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _preview(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "...")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The T5 vocabulary. Cheap to build and to pickle (it holds a path only), and safe to use from threads.

    Special tokens spelled out in a text (`</s>`, `<extra_id_0>`) are read as such, as Hugging Face's tokenizer does.
    """

    path: str = ""  # a tokenizer.json; "" means the one that comes with the package

    @classmethod
    def load(cls, path: PathLike | None = None) -> "Vocabulary":
        """The vocabulary of a tokenizer.json at `path`, or of the package. Raises UserError if it is none of T5."""
        vocabulary = cls("" if path is None else str(resolve(path)))
        _tokenizer(vocabulary.path)
        return vocabulary

    def tokens(self, text: str) -> list[int]:
        """All ids of one instruction, uncut, the last one `END_ID`. Raises UserError if `text` is not Unicode."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # an undecodable byte of a command line comes as a lone surrogate
            raise UserError(f"the instruction {_preview(text)} is not valid Unicode; write it in UTF-8") from error
        # One text at a time: encode_batch starts a thread pool that does not survive a fork of the process.
        return _tokenizer(self.path).encode(text).ids

    def encode(self, instructions: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a batch of instructions, padded or cut to `length` tokens.

        Returns (ids int32 [B, length], lengths int32 [B]). Each row ends with `END_ID`, also when it was cut, and is
        filled up with `PAD_ID`; lengths count the tokens without the padding. An empty instruction gives `END_ID`
        alone: use `check_instruction` on what a person typed. Raises UserError for a text that is not Unicode.
        """
        if isinstance(instructions, str):
            raise TypeError("instructions is one string; give a sequence of them")
        if length < 1:
            raise ValueError(f"length is {length}; it must be at least 1, for the end of the instruction")
        ids_BT = np.full((len(instructions), length), PAD_ID, np.int32)
        lengths_B = np.empty(len(instructions), np.int32)
        for row, text in enumerate(instructions):
            tokens = self.tokens(text)
            if len(tokens) > length:
                tokens = [*tokens[: length - 1], END_ID]
            ids_BT[row, : len(tokens)] = tokens
            lengths_B[row] = len(tokens)
        return ids_BT, lengths_B

    def check_instruction(self, text: str, max_tokens: int) -> None:
        """Raises UserError for an instruction that cannot be edited by.

        That is one without text, one of characters outside of the vocabulary (the model would see only `UNKNOWN_ID`),
        and one of more than `max_tokens` tokens, the end included (the model would see only a part).
        """
        tokens = self.tokens(text)
        tokenizer = _tokenizer(self.path)
        pieces = [(tokenizer.id_to_token(token) or "").strip("▁ ") for token in tokens if token not in (PAD_ID, END_ID)]
        if not any(pieces):
            raise UserError(f"the instruction {_preview(text)} is empty; say what to change in the image")
        if set(pieces) <= {"", tokenizer.id_to_token(UNKNOWN_ID)}:
            raise UserError(
                f"the instruction {_preview(text)} has only characters that the text encoder does not know; "
                f"write it in English"
            )
        if len(tokens) > max_tokens:
            raise UserError(
                f"the instruction {_preview(text)} is {len(tokens)} tokens long, but at most {max_tokens} fit; "
                f"shorten it"
            )
