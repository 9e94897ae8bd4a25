"""Weights on every kind of storage, in directories of any name; a failure of the machine is no damage of weights."""

import errno
import os
import pathlib
import resource
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.emulators import gs_bucket, gs_server, s3_bucket, s3_server
from tests.varedit_jax.storage.test_paths import ODD_NAMES
from varedit_jax.config import preset
from varedit_jax.errors import UserError
from varedit_jax.parameters import abstract_params
from varedit_jax.sampling.editor import Editor
from varedit_jax.storage import files, orbax
from varedit_jax.storage.paths import child_names, resolve
from varedit_jax.weights import native
from varedit_jax.weights.directory import PARTS, is_weights_directory, read_editor_config, save_weights
from varedit_jax.weights.native import load_part
from varedit_jax.weights.reader import open_weights

__all__ = ["gs_bucket", "gs_server", "s3_bucket", "s3_server"]

TINY = preset("tiny")
VALUES = np.arange(6, dtype=np.float32).reshape(3, 2)
SMALL = {"blocks": {"kernel": VALUES}, "bias": VALUES[0]}
EXPECTED = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), SMALL)


@pytest.fixture(params=["gs", "s3"])
def bucket(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(f"{request.param}_bucket")


def save_part(directory: pathlib.Path) -> None:
    """Writes SMALL as the part `text` in the form of a conversion."""
    leaves = {"blocks/kernel": native.Leaf(VALUES.shape, VALUES.dtype), "bias": native.Leaf((2,), VALUES.dtype)}
    part = native.OrbaxPart(directory / "text", leaves)
    part.create()
    for index, row in enumerate(VALUES):
        part.write("blocks/kernel", index, row)
    part.write("bias", None, VALUES[0])


def assert_same(found: Any, wanted: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_directories_of_any_name(tmp_path: pathlib.Path, name: str) -> None:
    """In each form: safetensors, a conversion's, and a run's (which Orbax itself cannot read below a bracket)."""
    save_weights(tmp_path / "s" / name, TINY, {"text": SMALL})
    save_part(tmp_path / "o" / name)
    for form in ("s", "o"):
        assert_same(load_part(tmp_path / form / name, "text", EXPECTED), SMALL)
    if "[" not in name:
        state = tmp_path / "r" / name / "checkpoints" / "3" / "state"
        with orbax.checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(state, args=ocp.args.StandardSave({"params": {"text": SMALL}}))
        assert_same(load_part(tmp_path / "r" / name, "text", EXPECTED), SMALL)


def test_paths_relative_to_the_parent(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    save_weights("../s", TINY, {"text": SMALL})
    save_part(tmp_path / "o")
    for form in ("s", "o"):
        assert_same(load_part(f"../{form}", "text", EXPECTED), SMALL)
    assert read_editor_config("../s")[0] == TINY and is_weights_directory("../s/../s")


@pytest.mark.parametrize("name", ["plain", "run#1", "50%20off", "what?", "a b"])
def test_directories_in_buckets(bucket: str, name: str) -> None:
    directory = resolve(f"{bucket}/{name}")
    save_weights(directory / "s", TINY, {"text": SMALL})
    assert child_names(directory / "s") == ["config.json", "text.safetensors"]
    save_part(directory / "o")
    for form in ("s", "o"):
        assert_same(load_part(directory / form, "text", EXPECTED), SMALL)
    with pytest.raises(UserError, match="s exists; give a new directory"):
        save_weights(directory / "s", TINY, {"text": SMALL})


def test_an_editor_is_loaded_from_a_bucket(tmp_path: pathlib.Path, gs_bucket: str, lively: Any) -> None:
    """Bit for bit as from a local directory; the tokenizer and text encoder may lie elsewhere. Incomplete it is not."""
    params = {part: lively(abstract_params(TINY, part), seed) for seed, part in enumerate(PARTS)}
    save_weights(tmp_path / "tiny", TINY, params)
    save_weights(f"{gs_bucket}/tiny", TINY, params)
    local = Editor.load(tmp_path / "tiny")
    for editor in (Editor.load(f"{gs_bucket}/tiny"), Editor.load(tmp_path / "tiny", text=f"{gs_bucket}/tiny")):
        assert editor.config == local.config
        assert_same(editor.params, local.params)
    (resolve(gs_bucket) / "tiny" / files.INCOMPLETE).write_text("")
    with pytest.raises(UserError, match="tiny is incomplete: it is still being written, or what wrote it"):
        Editor.load(f"{gs_bucket}/tiny")
    with pytest.raises(UserError, match="tiny is incomplete"):
        Editor.load(tmp_path / "tiny", text=f"{gs_bucket}/tiny")


# --- failures of the machine


@pytest.fixture
def weights(tmp_path: pathlib.Path) -> pathlib.Path:
    save_weights(tmp_path / "s", TINY, {"text": SMALL})
    save_part(tmp_path / "o")
    return tmp_path


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("form", ["s", "o"])
def test_what_the_system_cannot_read_is_not_called_damaged(
    weights: pathlib.Path, monkeypatch: pytest.MonkeyPatch, form: str, number: int
) -> None:
    def failing(self: pathlib.Path, *_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(pathlib.Path, "open", failing)
    reads = [lambda: load_part(weights / form, "text", EXPECTED)]
    if form == "s":
        reads += [lambda: read_editor_config(weights / "s"), lambda: open_weights(weights / "s" / "text.safetensors")]
    for read in reads:
        with pytest.raises(UserError, match=f"cannot read .*: {os.strerror(number)}; put that right") as refused:
            read()
        assert "damaged" not in str(refused.value) and "\n" not in str(refused.value)


def test_arrays_that_cannot_be_opened_are_not_called_damaged(weights: pathlib.Path) -> None:
    """The system opens no file more."""
    leaves = native.open_part(weights / "o", "text", EXPECTED)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot read .*o/text: bias: Too many open files"):
            leaves["bias"].read()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_store_that_does_not_answer_is_not_called_damaged(
    weights: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorStore tells of it with an error of the type that damage has."""
    said = 'ABORTED: Error opening "zarr" driver: All 32 retry attempts failed: CURL error Could not connect to server'

    def failing(*_: Any, **__: Any) -> Any:
        raise ValueError(said)

    monkeypatch.setattr(native.ts, "open", failing)
    with pytest.raises(UserError, match="cannot read .*o: ABORTED: .*Could not connect to server; put that right"):
        load_part(weights / "o", "text", EXPECTED)
