"""The vocabulary against Hugging Face's tokenizer, and what it says to a person."""

import json
import pathlib
import pickle
from concurrent import futures

import numpy as np
import pytest

from varedit_jax.errors import UserError
from varedit_jax.text.vocabulary import END_ID, PAD_ID, Vocabulary

DATA = pathlib.Path(__file__).parents[2] / "data"
PROMPTS = json.loads((DATA / "t5_prompts.json").read_text())  # text, all ids, length, ids cut to it


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.load()


def test_ids_equal_hugging_face(vocabulary):
    assert len(PROMPTS) == 320
    wrong = [text for text, ids, _, _ in PROMPTS if vocabulary.tokens(text) != ids]
    assert not wrong


def test_cut_and_padded_batches_equal_hugging_face(vocabulary):
    cut_rows = 0
    for length in sorted({row[2] for row in PROMPTS}):
        rows = [row for row in PROMPTS if row[2] == length]
        ids_BT, lengths_B = vocabulary.encode([row[0] for row in rows], length)
        assert ids_BT.dtype == lengths_B.dtype == np.int32
        assert ids_BT.shape == (len(rows), length)
        for ids_T, count, (_, uncut, _, wanted) in zip(ids_BT, lengths_B, rows, strict=True):
            assert ids_T[:count].tolist() == wanted
            assert (ids_T[count:] == PAD_ID).all()
            assert ids_T[count - 1] == END_ID
            cut_rows += len(uncut) > length
    assert cut_rows > 50  # the fixture does try the cut


def test_empty_batch(vocabulary):
    ids_BT, lengths_B = vocabulary.encode([], 8)
    assert ids_BT.shape == (0, 8)
    assert lengths_B.shape == (0,)


def test_one_string_is_not_a_batch(vocabulary):
    with pytest.raises(TypeError, match="one string"):
        vocabulary.encode("red", 8)


def test_length_must_hold_the_end(vocabulary):
    with pytest.raises(ValueError, match="length is 0"):
        vocabulary.encode(["red"], 0)


@pytest.mark.parametrize("text", ["", " ", "\n\t ", "\u3000", "\u200b", "</s>", "<pad>"])
def test_empty_instruction_is_refused(vocabulary, text):
    with pytest.raises(UserError, match="is empty; say what to change"):
        vocabulary.check_instruction(text, 512)


@pytest.mark.parametrize("text", ["\U0001f600", "\u628a\u5929\u7a7a\u53d8\u6210\u7ea2\u8272", "\x00"])
def test_instruction_of_unknown_characters_is_refused(vocabulary, text):
    with pytest.raises(UserError, match="write it in English"):
        vocabulary.check_instruction(text, 512)


def test_some_unknown_characters_pass(vocabulary):
    vocabulary.check_instruction("make it \U0001f600", 512)


def test_long_instruction_is_refused_with_both_numbers(vocabulary):
    text = "Turn the sky red."  # five tokens and the end
    vocabulary.check_instruction(text, 6)
    with pytest.raises(UserError, match="is 6 tokens long, but at most 5 fit") as caught:
        vocabulary.check_instruction(text, 5)
    assert "Turn the sky red." in str(caught.value)
    with pytest.raises(UserError) as caught:
        vocabulary.check_instruction("word " * 700, 512)
    assert len(str(caught.value)) < 200  # the text is shortened in the message


def test_undecodable_bytes_are_refused(vocabulary):
    text = b"sky \xff red".decode("utf-8", "surrogateescape")  # as a command line would bring them
    for use in (lambda: vocabulary.check_instruction(text, 512), lambda: vocabulary.encode([text], 8)):
        with pytest.raises(UserError, match="not valid Unicode"):
            use()


def test_own_file_is_read_and_its_cut_and_padding_are_ignored(tmp_path, vocabulary):
    definition = json.loads(
        (pathlib.Path(__file__).parents[3] / "varedit_jax" / "text" / "t5_tokenizer.json").read_text()
    )
    definition["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(definition))
    assert Vocabulary.load(path).tokens("Turn the sky red.") == vocabulary.tokens("Turn the sky red.")


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe\x00", b'{"version": "1.0"}'])
def test_bad_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.json of a T5") as caught:
        Vocabulary.load(path)
    assert str(path) in str(caught.value)


def test_file_of_another_model_is_refused(tmp_path):
    vocab = [["<unk>", 0.0], ["<pad>", 0.0], ["</s>", 0.0], ["a", -1.0]]
    path = tmp_path / "tokenizer.json"
    path.write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab}})
    )
    with pytest.raises(UserError, match="<pad> has the id 1, but must have 0"):
        Vocabulary.load(path)


def test_cheap_to_pickle_and_equal(vocabulary):
    data = pickle.dumps(vocabulary)
    assert len(data) < 500
    assert pickle.loads(data) == vocabulary == Vocabulary.load()


def test_threads_agree(vocabulary):
    texts = [row[0] for row in PROMPTS[:40]]

    def encode(length: int) -> bool:
        ids_BT, lengths_B = Vocabulary.load().encode(texts, length)
        return all(
            ids_T[:count].tolist() == ([*row[1][: length - 1], END_ID] if len(row[1]) > length else row[1])
            for ids_T, count, row in zip(ids_BT, lengths_B, PROMPTS[:40], strict=True)
        )

    with futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(encode, [4, 8, 16, 32, 64, 512] * 4))
