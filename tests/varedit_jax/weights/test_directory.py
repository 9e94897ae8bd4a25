"""Directories of weights: exact where promised, complete or absent, and clear about what does not fit."""

import json
import pathlib
import resource
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import pytest
import safetensors.numpy

import varedit_jax
from varedit_jax.config import SamplingConfig, preset
from varedit_jax.errors import UserError
from varedit_jax.parameters import abstract_params
from varedit_jax.text.vocabulary import Vocabulary
from varedit_jax.weights.directory import is_weights_directory, read_editor_config, save_weights, weights_hash
from varedit_jax.weights.manifest import read_manifest
from varedit_jax.weights.native import load_part
from varedit_jax.weights.run_directory import read_config

CONFIG = preset("tiny")
PACKAGE = pathlib.Path(varedit_jax.__file__).parent


@pytest.fixture(scope="module")
def params(lively: Any) -> dict[str, Any]:
    return {part: lively(abstract_params(CONFIG, part), seed) for seed, part in enumerate(("tokenizer", "transformer"))}


def flat(tree: Any) -> dict[str, np.ndarray]:
    return flax.traverse_util.flatten_dict(tree, sep="/")


@pytest.mark.parametrize(("stored_type", "digits"), [("float32", None), ("float16", 11), ("bfloat16", 8)])
def test_round_trip(tmp_path: pathlib.Path, params: dict, stored_type: str, digits: int | None) -> None:
    """Exact in float32; else to half a unit of the last of `digits` binary digits (float16 also to its smallest)."""
    save_weights(tmp_path / "weights", CONFIG, params, stored_type)
    for part, tree in params.items():
        loaded = load_part(tmp_path / "weights", part, abstract_params(CONFIG, part))
        assert jax.tree.structure(loaded) == jax.tree.structure(tree)
        wanted = flat(tree)
        for name, tensor in flat(loaded).items():
            assert tensor.dtype == np.float32
            error = np.abs(tensor - wanted[name])
            allowed = np.zeros_like(error) if digits is None else 2.0**-digits * np.abs(wanted[name]) + 2.0**-25
            assert (error <= allowed).all(), name
    size = sum(path.stat().st_size for path in (tmp_path / "weights").glob("*.safetensors"))
    count = sum(x.size for x in jax.tree.leaves(params))
    assert size == pytest.approx(count * (4 if stored_type == "float32" else 2), rel=0.2)


def test_configuration_comes_back(tmp_path: pathlib.Path, params: dict) -> None:
    sampling = SamplingConfig(guidance=(1.0, 4.0), temperature=0.7, top_p=0.9)
    save_weights(tmp_path / "weights", CONFIG, params, sampling=sampling)
    assert read_editor_config(tmp_path / "weights") == (CONFIG, sampling)
    assert is_weights_directory(tmp_path / "weights") and not is_weights_directory(tmp_path)


def test_an_existing_directory_is_left_alone(tmp_path: pathlib.Path, params: dict) -> None:
    (tmp_path / "weights").mkdir()
    with pytest.raises(UserError, match="weights exists; give a new directory"):
        save_weights(tmp_path / "weights", CONFIG, params)
    assert not list((tmp_path / "weights").iterdir())


@pytest.mark.parametrize(("stored_type", "value"), [("float32", np.nan), ("float32", np.inf), ("float16", 1e6)])
def test_values_that_do_not_fit_are_refused(tmp_path: pathlib.Path, stored_type: str, value: float) -> None:
    """Without NumPy's warning about it, and with nothing left behind."""
    params = {"tokenizer": {"a": {"kernel": np.array([1.0, value], np.float32)}}}
    with pytest.raises(UserError, match=f"tokenizer/a/kernel holds values that are not finite in {stored_type}"):
        save_weights(tmp_path / "weights", CONFIG, params, stored_type)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_behind(tmp_path: pathlib.Path, params: dict) -> None:
    """The system itself refuses the write: no file may grow beyond 10 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(UserError, match=r"writing the weights failed in .*weights: File too large; .*make room"):
            save_weights(tmp_path / "weights", CONFIG, params)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_replaced(tmp_path: pathlib.Path, params: dict) -> None:
    (tmp_path / ".weights.partial").mkdir()
    (tmp_path / ".weights.partial" / "stray.safetensors").write_bytes(b"half")
    save_weights(tmp_path / "weights", CONFIG, params)
    assert {path.name for path in tmp_path.iterdir()} == {"weights"}
    assert not (tmp_path / "weights" / "stray.safetensors").exists()


SMALL = {"a": {"kernel": np.ones((2, 3), np.float32)}, "b": np.zeros(4, np.float32)}


def expect(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({**SMALL, "a": {"kernel": np.ones((3, 2))}}, r"a/kernel has shape \(2, 3\), expected is \(3, 2\)"),
        ({**SMALL, "c": np.ones(1)}, r"c has shape nothing, expected is \(1,\)"),
        ({"a": SMALL["a"]}, r"b has shape \(4,\), expected is nothing"),
    ],
    ids=["shape", "missing", "unexpected"],
)
def test_weights_of_another_model(tmp_path: pathlib.Path, wanted: Any, sentence: str) -> None:
    save_weights(tmp_path / "weights", CONFIG, {"text": SMALL})
    load_part(tmp_path / "weights", "text", expect(SMALL))
    with pytest.raises(UserError, match=rf"text\.safetensors is of another model: {sentence}"):
        load_part(tmp_path / "weights", "text", expect(wanted))


def test_missing_and_damaged_parts(tmp_path: pathlib.Path) -> None:
    save_weights(tmp_path / "weights", CONFIG, {"text": SMALL})
    with pytest.raises(UserError, match=r"holds no tokenizer weights \(tokenizer\.safetensors is missing\)"):
        load_part(tmp_path / "weights", "tokenizer", expect(SMALL))
    path = tmp_path / "weights" / "text.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"text\.safetensors is damaged"):
        load_part(tmp_path / "weights", "text", expect(SMALL))


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_values_that_are_not_finite_are_named_when_loaded(tmp_path: pathlib.Path, value: float) -> None:
    """Whoever wrote them: the file may be of another program."""
    save_weights(tmp_path / "weights", CONFIG, {"text": SMALL})
    spoilt = {"a/kernel": np.array([[1, value, value], [1, 1, 1]], np.float16), "b": SMALL["b"]}
    safetensors.numpy.save_file(spoilt, tmp_path / "weights" / "text.safetensors")
    with pytest.raises(UserError, match=r"text\.safetensors: a/kernel holds 2 of 6 values that are NaN or infinite"):
        load_part(tmp_path / "weights", "text", expect(SMALL))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"model": {"depth": 3}, "sampling": {}}', '{"model": 3, "sampling": {}}', b"\xff\xfe"],
)
def test_foreign_configuration(tmp_path: pathlib.Path, text: str | bytes) -> None:
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"config\.json does not describe an editor"):
        read_editor_config(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"is not a directory of weights: it has no config\.json"):
        read_editor_config(tmp_path)


def test_configuration_that_contradicts_itself(tmp_path: pathlib.Path, params: dict) -> None:
    save_weights(tmp_path / "weights", CONFIG, params)
    path = tmp_path / "weights" / "config.json"
    record = json.loads(path.read_text())
    record["model"]["transformer"]["token_bits"] = 5
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="token_bits is 5, but the tokenizer gives 4"):
        read_editor_config(tmp_path / "weights")


def test_hash_is_of_names_shapes_types_and_values() -> None:
    """The same tree in another order has the same hash, any change another one."""
    nearly = SMALL["a"]["kernel"].copy()
    nearly[1, 2] = np.nextafter(np.float32(1), np.float32(2))
    others = [
        {**SMALL, "a": {"kernel": nearly}},
        {**SMALL, "a": {"kernel": SMALL["a"]["kernel"].reshape(3, 2)}},
        {**SMALL, "b": np.zeros(4, np.int32)},
        {"a": SMALL["a"], "c": SMALL["b"]},
    ]
    hashes = [weights_hash(tree) for tree in (SMALL, *others)]
    assert len(set(hashes)) == len(hashes)
    assert weights_hash(dict(reversed(SMALL.items()))) == hashes[0]
    assert weights_hash(jax.tree.map(jax.numpy.asarray, SMALL)) == hashes[0]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_that_were_edited_by_hand_on_windows_are_read(tmp_path: pathlib.Path, encoding: str) -> None:
    """A configuration of weights or of a run, a manifest, a vocabulary, with a byte order mark."""
    record = (PACKAGE / "data" / "shapes" / "config.json").read_text()
    (tmp_path / "config.json").write_bytes(record.encode(encoding))
    (tmp_path / "manifest.json").write_bytes('{"version": 1, "tensors": []}'.encode(encoding))
    (tmp_path / "words.json").write_bytes(
        (PACKAGE / "text" / "t5_tokenizer.json").read_text(encoding="utf-8").encode(encoding)
    )
    assert read_editor_config(tmp_path) == read_editor_config(PACKAGE / "data" / "shapes")
    assert read_config(tmp_path) == json.loads(record)
    assert read_manifest(tmp_path) == {"version": 1, "tensors": []}
    words = "add a red circle"
    assert Vocabulary.load(tmp_path / "words.json").tokens(words) == Vocabulary.load().tokens(words)
