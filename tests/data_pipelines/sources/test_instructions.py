"""Instructions that say nothing leave every source for the same reason."""

import pathlib
import sys
import unicodedata
from collections.abc import Callable

import pytest

from data_pipelines.record import Record
from data_pipelines.sources import Refused, entries, instructions, read
from data_pipelines.sources.entries import make_entry
from data_pipelines.sources.instructions import is_partly_unknown, wordings
from tests.data_pipelines.sources.layouts import Download
from tests.data_pipelines.sources.test_sources import LAYOUTS
from varedit_jax.text.vocabulary import UNKNOWN_ID, Vocabulary


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("!?", "has no words"), ("1.", "has no words"), ("</s>", "has no words"), ("<extra_id_0> ...", "has no words"),
        ("None", "stands for no text"), ("nan", "stands for no text"), ("NULL.", "stands for no text"),
        ("N/A", "stands for no text"), ("none, nan", "stands for no text"), ("not available", "stands for no text"),
        ("edit_prompt", "is a name"), ("Instruction:", "is a name"), ("IMG_1.jpg", "is a name"),
        ("https://a.org/b", "is a name"),
        ("['ori', 'edit']", "is a value of a program"), ('["a", null]', "is a value of a program"),
        ("{'edit': 'x'}", "is a value of a program"), ("<PIL.Image object at 0x7F00>", "is a value of a program"),
        ("变成红色", "has no letter that the text encoder knows"),
        ("Жю", "has no letter that the text encoder knows"),
        ("A cat, on a sofa", "describes an image"), ("The image shows a cat on a sofa.", "describes an image"),
    ],
)  # fmt: skip
def test_what_says_nothing_is_told(text: str, why: str) -> None:
    assert wordings([None, "", 7]) == ((), "'7' is no text")
    kept, wrong = wordings(["", text], captions=["a cat on a sofa", None, ""])
    assert kept == () and wrong.endswith(why) and repr(text) in wrong


@pytest.mark.parametrize(
    "text",
    [
        "make it foggy", "a cat on a sofa", "Fog", "4K", "add none of them", "(make it red)", "[remove] the dog", "Né",
        "remove 图", "use null island", "The image shows a cat; remove it", "the text", "edit", "turn a.jpg into b.jpg",
        "[" * 5000 + "a",
    ],
)  # fmt: skip
def test_what_may_be_an_instruction_stays(text: str) -> None:
    assert wordings([text, None, "", f" {text} "]) == ((text,), "")


def test_letters_are_known_exactly_where_the_vocabulary_knows_them() -> None:
    old = unicodedata.ucd_3_2_0  # T5's own tables do not know letters of later versions
    letters = [letter for letter in map(chr, range(sys.maxunicode + 1)) if old.category(letter).startswith("L")]
    kept = [letter for letter in letters if wordings([letter])[0]]
    others = [letter for letter in letters if not wordings([letter])[0]]
    assert len(kept) > 600 and len(others) > 80_000
    vocabulary = Vocabulary()
    single = [letter for letter in kept if sum(map(str.isalpha, unicodedata.normalize("NFKC", letter))) == 1]
    assert [letter for letter in single if UNKNOWN_ID in vocabulary.tokens(letter)] == ["Ŀ", "ŀ"]  # for their dots
    plain = [letter for letter in others if len(unicodedata.normalize("NFKC", letter)) == 1]
    assert vocabulary.tokens(" ".join(plain)).count(UNKNOWN_ID) == len(plain)
    spelled = [letter for letter in plain if unicodedata.normalize("NFKC", letter).isalpha()]
    assert len(spelled) > 80_000 and all(map(is_partly_unknown, spelled)) and not any(map(is_partly_unknown, single))


def test_an_instruction_is_partly_unknown_if_a_letter_of_it_is() -> None:
    assert is_partly_unknown("remove 图") and is_partly_unknown("piñata") and not is_partly_unknown("Café, 5 € – ①!")


@pytest.mark.parametrize(("source", "write"), LAYOUTS, ids=[write.__name__ for _, write in LAYOUTS])
def test_every_source_asks_the_one_test(
    source: str, write: Callable[[pathlib.Path], Download], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instructions, "_fault", lambda text, captions: "is not wanted")
    layout = write(tmp_path / "data")
    found = list(read(source, layout.inputs, layout.options))
    left = {entry.id for entry in found if isinstance(entry, Refused) and entry.reason == "empty instruction"}
    assert not any(isinstance(entry, Record) for entry in found) and left >= layout.records.keys()
    details = [entry.detail for entry in found if isinstance(entry, Refused) and entry.id in layout.records]
    assert all(detail.endswith("is not wanted") for detail in details)


def test_a_caption_is_none_beside_another_instruction() -> None:
    fields = {"id": "1", "dataset": "d", "source": b"s", "target": b"t", "captions": ["A cat."]}
    entry = entries.make_entry(instructions=["a cat", "make it foggy"], **fields)  # type: ignore[arg-type]
    assert isinstance(entry, Record) and entry.instructions == ("make it foggy",)
    entry = make_entry(instructions=["a cat"], **fields)  # type: ignore[arg-type]
    assert isinstance(entry, Refused) and entry.detail == "'a cat' describes an image"
