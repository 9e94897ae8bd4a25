"""Instructions that say what to change, and those that say nothing: empty, placeholders, captions, foreign scripts."""

import ast
import json
import re
import unicodedata
from collections.abc import Iterable

from data_pipelines.record import clean_text

# Letters in the vocabulary of T5, which reads all others as one unknown token. A test compares them with it.
_LETTERS = frozenset(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    "ÉÎÜßàáâäçèéêîóôöùûüăşţșț"
    "авдеиклмнорсту"
)  # fmt: skip
_SPECIAL = re.compile(r"</?s>|<pad>|<unk>|<extra_id_\d+>")  # tokens of T5 that are no text
_WORD = re.compile(r"n/a(?!\w)|[^\W_]+")
# Words, without case and punctuation, that stand for no text, also repeated: "None, None".
_NOTHING = frozenset(("none", "nan", "null", "nil", "na", "n/a", "nat", "undefined", "tbd", "todo"))
_NO_TEXT = frozenset(("not available", "not applicable", "no instruction", "no prompt", "no text"))
_FIELDS = frozenset((
    "instruction", "instructions", "prompt", "prompts", "edit instruction", "edit prompt", "edited prompt",
    "edited prompt list", "caption", "ori",
))  # fmt: skip
_FILE = re.compile(r"\S+\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif)|https?://\S+", re.IGNORECASE)
_OBJECT = re.compile(r"<[^<>]* at 0x[0-9a-f]+>", re.IGNORECASE)
# A single sentence that tells what an image shows, and asks for nothing.
_DESCRIPTION = re.compile(
    r"(?:the|this) (?:image|photo|photograph|picture) (?:shows|depicts|features|displays|portrays)\b[^.;!?]*\.?",
    re.IGNORECASE,
)
_LONGEST = 2000  # characters of what is tried as a list; thousands of brackets would exhaust the parser
_SHOWN = 60


def wordings(texts: Iterable[object], captions: Iterable[object] = ()) -> tuple[tuple[str, ...], str]:
    """Returns the texts that say what to change, stripped and without repeats; and what is wrong with the first other.

    What is no text says nothing. `captions` are what the data set says of the images themselves.
    """
    known = frozenset(words for text in captions if isinstance(text, str) if (words := _words(text)))
    kept, wrong = dict[str, None](), ""
    for text in texts:
        fault = _fault(text := clean_text(text).strip(), known) if isinstance(text, str) else "is no text"
        if not fault:
            kept[str(text)] = None
        elif text not in ("", None) and not wrong:
            wrong = f"{str(text)[:_SHOWN]!r} {fault}"
    return tuple(kept), wrong


def is_partly_unknown(text: str) -> bool:
    """Returns True if the text encoder reads some letters of a text as unknown."""
    return any(letter.isalpha() and letter not in _LETTERS for letter in unicodedata.normalize("NFKC", text))


def _words(text: str) -> str:
    """Returns a text without case, punctuation and underscores."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def _fault(text: str, captions: frozenset[str]) -> str:
    """Returns why a text does not say what to change; "" if it may."""
    text = _SPECIAL.sub(" ", text).strip()
    words = _words(text)
    letters = [letter for letter in unicodedata.normalize("NFKC", text) if letter.isalpha()]
    if not letters:
        return "has no words"
    if not _LETTERS.intersection(letters):
        return "has no letter that the text encoder knows"
    if _NOTHING.issuperset(words.split(" ")) or words in _NO_TEXT:
        return "stands for no text"
    if words in _FIELDS or _FILE.fullmatch(text):
        return "is a name"
    if _OBJECT.fullmatch(text) or _is_value(text):
        return "is a value of a program"
    if words in captions or _DESCRIPTION.fullmatch(text):
        return "describes an image"
    return ""


def _is_value(text: str) -> bool:
    """Returns True for the text of a list or dictionary, such as ['ori', 'edit']."""
    if len(text) > _LONGEST or not re.fullmatch(r"\[.*\]|\{.*\}|\(.*\)", text, re.DOTALL):
        return False
    for parse in (ast.literal_eval, json.loads):
        try:
            return isinstance(parse(text), (list, dict, tuple, set))
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return False
