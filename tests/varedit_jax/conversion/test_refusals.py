"""Refusals to convert, export or verify: one sentence that names the fault, and nothing is left behind."""

import errno
import json
import os
import pathlib
import shutil
import zipfile
from collections.abc import Callable

import jax
import numpy as np
import pytest
import safetensors.numpy

from varedit_jax.conversion import convert, stream
from varedit_jax.errors import UserError
from varedit_jax.parameters import abstract_params
from varedit_jax.weights.directory import read_editor_config
from varedit_jax.weights.export_source import open_source
from varedit_jax.weights.native import load_part
from varedit_jax.weights.reader import StateDict, open_weights, read_state_dict

Write = Callable[..., pathlib.Path]
Spoil = Callable[[Write, pathlib.Path, StateDict], pathlib.Path]


def spoilt(change: Callable[[StateDict], StateDict]) -> Spoil:
    return lambda write, directory, state: write(directory / "in.pth", change(state))


def truncated(write: Write, directory: pathlib.Path, state: StateDict) -> pathlib.Path:
    path = write(directory / "in.pth", state)
    path.write_bytes(path.read_bytes()[:-5000])
    return path


def running_code(write: Write, directory: pathlib.Path, state: StateDict) -> pathlib.Path:
    with zipfile.ZipFile(directory / "in.pth", "w") as archive:
        archive.writestr("x/data.pkl", f"cos\nsystem\n(S'touch {directory / 'ran'}'\ntR.".encode())
    return directory / "in.pth"


def with_nan(state: StateDict) -> StateDict:
    damaged = state["head.weight"].copy()
    damaged[3, 4:6] = [np.nan, np.inf]
    return state | {"head.weight": damaged}


SIZES = ("word_embed.weight", "pos_start", "cfg_uncond", "lvl_embed.weight")
HEADS = "block_chunks.1.module.0.sa.scale_mul_1H11"
REFUSED: dict[str, tuple[Spoil, str]] = {
    "truncated": (truncated, r"in\.pth is damaged, cut short, or not in the zip form"),
    "code": (running_code, r"in\.pth asks to run os\.system when it is opened"),
    "shape": (
        spoilt(lambda state: state | {"head.bias": state["head.bias"][:-2]}),
        r"in\.pth: the file is of another transformer: head\.bias has shape \[30\], the model's is \[32\]",
    ),
    "missing": (
        spoilt(lambda state: {name: x for name, x in state.items() if name not in ("head.bias", "word_embed.bias")}),
        r"it lacks \(2\): word_embed\.bias, head\.bias",
    ),
    "what tells sizes is missing": (
        spoilt(lambda state: {name: x for name, x in state.items() if name not in SIZES}),
        r"it lacks \(4\): cfg_uncond, pos_start, lvl_embed\.weight, word_embed\.weight$",
    ),
    "what tells sizes is misshapen": (
        spoilt(lambda state: state | {"pos_start": state["pos_start"][0], HEADS: state[HEADS][:, :-1]}),
        rf"pos_start has shape \[1, 128\], the model's is \[1, 1, 128\]; {HEADS} has shape \[1, 3, 1, 1\], the model's",
    ),
    "a block is missing": (
        spoilt(lambda state: {name: x for name, x in state.items() if not name.startswith("block_chunks.0.")}),
        r"it lacks \(19\): block_chunks\.0\.module\.0\.ada_gss, ",
    ),
    "widths at odds": (
        spoilt(lambda state: state | {name: x[:, :3] for name, x in state.items() if "scale_mul" in name}),
        r"these parts do not make an editor: width 128 over 3 heads",
    ),
    "unexpected": (
        spoilt(lambda state: state | {"b.x": np.zeros(1, np.float32), "a": np.zeros(1, np.float32)}),
        r"it has besides \(2\): b\.x, a$",
    ),
    "NaN": (spoilt(with_nan), r"head\.weight holds 2 of 4096 values that are NaN or infinite"),
    "integers": (
        spoilt(lambda state: state | {"head.bias": np.zeros(32, np.int32)}),
        r"head\.bias is of type int32; weights are floating-point numbers",
    ),
    "another model": (
        spoilt(lambda state: {"conv1.weight": np.zeros(1, np.float32)}),
        r"no tensor word_embed\.weight, which every published transformer has",
    ),
    "no weights": (lambda write, directory, state: directory / "in.pth", r"in\.pth does not exist"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_inputs_leave_nothing_behind(
    states: dict[str, StateDict],
    tmp_path: pathlib.Path,
    name: str,
    write_pth: Write,
    published: Callable[..., convert.Published],
) -> None:
    spoil, sentence = REFUSED[name]
    path = spoil(write_pth, tmp_path, states["transformer"])
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=sentence):
        convert.to_jax(published("transformer", path), tmp_path / "out", quiet=True)
    assert set(tmp_path.iterdir()) == before


def test_refused_outputs(
    states: dict[str, StateDict],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    write_pth: Write,
    published: Callable[..., convert.Published],
) -> None:
    path = write_pth(tmp_path / "in.pth", states["transformer"])
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists; give a new directory, or remove it first"):
        convert.to_jax(published("transformer", path), tmp_path / "out", quiet=True)
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match=r"the rest of .*new takes up to 3\.3 MB, but only 0\.0 MB are free in"):
        convert.to_jax(published("transformer", path), tmp_path / "new", quiet=True)
    assert not (tmp_path / "new").exists()


def test_a_disk_that_runs_full(
    states: dict[str, StateDict],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    write_pth: Write,
    published: Callable[..., convert.Published],
) -> None:
    """One sentence, nothing lost: the same command resumes when there is room."""
    path = write_pth(tmp_path / "in.pth", states["transformer"])
    convert.to_jax(published("transformer", path), tmp_path / "ours", quiet=True)
    source = open_source(tmp_path / "ours")
    calls = []

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, offset)

    pwrite = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match="failed in .*out: No space left on device; .* make room and run the same"):
            convert.to_torch(source, tmp_path / "out", quiet=True)
    assert (tmp_path / ".out.partial").is_dir()
    convert.to_torch(source, tmp_path / "out", quiet=True)
    back = read_state_dict(tmp_path / "out" / "transformer.pth")
    jax.tree.map(np.testing.assert_array_equal, back, states["transformer"])


def test_two_conversions_into_one_directory(
    states: dict[str, StateDict], tmp_path: pathlib.Path, write_pth: Write, published: Callable[..., convert.Published]
) -> None:
    path = write_pth(tmp_path / "in.pth", states["transformer"])
    first = stream.ConversionJob(tmp_path / "out", {"to": "jax"})
    with (
        first,
        pytest.raises(UserError, match="out.partial is in use by process .*; wait for it, .* another --output"),
    ):
        convert.to_jax(published("transformer", path), tmp_path / "out", quiet=True)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"transformer": {"conditioning": "full"}},
            "conditioning=full, but published code computes conditioning=sar only",
        ),
        ({"quantized_source": True}, "quantized_source=True, but published code computes quantized_source=False only"),
    ],
    ids=["conditioning", "source"],
)
def test_what_published_code_would_compute_otherwise_is_not_exported(
    states: dict[str, StateDict],
    tmp_path: pathlib.Path,
    change: dict,
    sentence: str,
    write_pth: Write,
    published: Callable[..., convert.Published],
) -> None:
    """Its tensors have the published names, but mean something else."""
    path = write_pth(tmp_path / "in.pth", states["transformer"])
    convert.to_jax(published("transformer", path), tmp_path / "ours", quiet=True)
    file = tmp_path / "ours" / "config.json"
    record = json.loads(file.read_text())
    for name, value in change.items():
        record["model"][name] = record["model"][name] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match=sentence):
        convert.to_torch(open_source(tmp_path / "ours"), tmp_path / "out", quiet=True)
    assert not list(tmp_path.glob("*out*"))


def test_values_that_do_not_fit_a_type_are_named(
    states: dict[str, StateDict], tmp_path: pathlib.Path, write_pth: Write, published: Callable[..., convert.Published]
) -> None:
    state = states["transformer"] | {"head.bias": states["transformer"]["head.bias"] + np.float32(1e6)}
    convert.to_jax(published("transformer", write_pth(tmp_path / "in.pth", state)), tmp_path / "ours", quiet=True)
    with pytest.raises(UserError, match=r"head\.bias, as float16, holds 32 of 32 values that are NaN or infinite"):
        convert.to_torch(open_source(tmp_path / "ours"), tmp_path / "out", dtype="float16", quiet=True)
    with pytest.raises(UserError, match=r"ours holds no text weights, but transformer"):
        open_source(tmp_path / "ours", ["text"])


# --- what is damaged afterwards


def test_a_flipped_bit_is_found(
    states: dict[str, StateDict], tmp_path: pathlib.Path, write_pth: Write, published: Callable[..., convert.Published]
) -> None:
    """And a chunk that is gone is damage, not zeros."""
    path = write_pth(tmp_path / "in.pth", states["transformer"])
    convert.to_jax(published("transformer", path), tmp_path / "ours", quiet=True)
    chunk = tmp_path / "ours" / "transformer" / "blocks.mlp.fc1.kernel" / "0.0.0"
    content = bytearray(chunk.read_bytes())
    content[100] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(UserError, match=r"the checksum of transformer/blocks/mlp/fc1/kernel\[0\] differs"):
        convert.verify(tmp_path / "ours")
    chunk.unlink()
    with pytest.raises(UserError, match=r"the checksum of transformer/blocks/mlp/fc1/kernel\[0\] differs"):
        convert.verify(tmp_path / "ours")
    config, _ = read_editor_config(tmp_path / "ours")
    with pytest.raises(UserError, match="damaged"):
        load_part(tmp_path / "ours", "transformer", abstract_params(config, "transformer"))


def test_damage_of_published_files_is_found(
    states: dict[str, StateDict], tmp_path: pathlib.Path, write_pth: Write, published: Callable[..., convert.Published]
) -> None:
    """A file that is gone, a shard that is gone, and one that holds another tensor in its place."""
    path = write_pth(tmp_path / "in.bin", states["text"])
    convert.to_jax(published("text", path), tmp_path / "ours", quiet=True)
    source = open_source(tmp_path / "ours")
    convert.to_torch(source, tmp_path / "shards", "safetensors", shard_bytes=20_000, quiet=True)
    convert.to_torch(source, tmp_path / "one", quiet=True)
    name = "encoder.final_layer_norm.weight"
    holder = next(x for x in (tmp_path / "shards" / "text").glob("*.safetensors") if name in open_weights(x))
    held = safetensors.numpy.load_file(holder)
    safetensors.numpy.save_file(held | {name: held[name] * 2}, holder)
    with pytest.raises(UserError, match=f"shards is damaged: the checksum of {name} differs"):
        convert.verify(tmp_path / "shards")
    holder.unlink()
    with pytest.raises(UserError, match=f"^[^:]*{holder.name} does not exist$"):
        convert.verify(tmp_path / "shards")
    state = {key: x for key, x in states["text"].items() if key != name}
    (tmp_path / "one" / "text" / "pytorch_model.bin").unlink()
    write_pth(tmp_path / "one" / "text" / "pytorch_model.bin", state)
    with pytest.raises(UserError, match=f"the checksum of {name} differs"):
        convert.verify(tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "text")
    with pytest.raises(UserError, match=r"one/text\.pth does not exist"):
        convert.verify(tmp_path / "one")
