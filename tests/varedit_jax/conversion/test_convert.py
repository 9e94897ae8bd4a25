"""Whole conversions on small models: exact both ways, restartable, and with a sentence for what cannot be done."""

import dataclasses
import errno
import json
import os
import pathlib
import shutil
import zipfile
from collections.abc import Callable, Iterator

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from varedit_jax.config import TextConfig, preset
from varedit_jax.conversion import convert, infer, names, ours, stream
from varedit_jax.conversion.folder import load_folder, read_config
from varedit_jax.conversion.reader import StateDict, open_weights, read_state_dict
from varedit_jax.conversion.source import open_source
from varedit_jax.conversion.writer import Planned, PthFile, safetensors_shards, shard_index
from varedit_jax.errors import UserError
from varedit_jax.parameters import abstract_params, init_text
from varedit_jax.sampling.editor import Editor

DATA = pathlib.Path(__file__).parents[2] / "data"
GOLDEN = DATA / "golden" / "mini_a"


@pytest.fixture(scope="module")
def states() -> dict[str, StateDict]:
    """A transformer, a tokenizer, and a text encoder of another width, by part, in float32."""
    text = safetensors.numpy.load_file(DATA / "t5_encoder_heads.safetensors")
    found = {
        "transformer": read_state_dict(GOLDEN / "transformer.pth"),
        "tokenizer": {name.removeprefix("vae."): x for name, x in read_state_dict(GOLDEN / "vae.pth").items()},
        "text": {name: x for name, x in text.items() if name not in ("ids", "lengths", "features")},
    }
    return {part: {name: _as(x, np.float32) for name, x in state.items()} for part, state in found.items()}


def _as(tensor: np.ndarray, dtype: type) -> np.ndarray:
    return tensor if tensor.dtype.kind == "i" else np.asarray(tensor, np.float32).astype(dtype)


def write_pth(path: pathlib.Path, state: StateDict, under: str = "") -> pathlib.Path:
    file = PthFile(path, [Planned(name, x.shape, x.dtype) for name, x in state.items()], under)
    file.begin()
    file.finish({name: file.write(name, x) for name, x in state.items()})
    return path


def write_shards(folder: pathlib.Path, state: StateDict, shard_bytes: int) -> pathlib.Path:
    files = safetensors_shards(folder, [Planned(name, x.shape, x.dtype) for name, x in state.items()], shard_bytes)
    for file in files:
        file.begin()
        file.finish({tensor.name: file.write(tensor.name, state[tensor.name]) for tensor in file.tensors})
    (folder / "model.safetensors.index.json").write_text(json.dumps(shard_index(files)))
    return folder


def request(part: str, path: pathlib.Path, **options: str) -> convert.Published:
    return convert.Published(files={part: str(path)}, family="varedit", pixel_budget="0.06M", **options)


def same(one: StateDict, other: StateDict) -> bool:
    """The same names, types and bytes."""
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype and one[name].tobytes() == other[name].tobytes() for name in one
    )


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("part", ["transformer", "tokenizer", "text"])
def test_round_trip_is_exact(states: dict[str, StateDict], tmp_path: pathlib.Path, part: str, dtype: type) -> None:
    """Published -> ours -> published, as .pth and as shards: every name, type and byte."""
    state = {name: _as(x, dtype) for name, x in states[part].items()}
    path = write_pth(tmp_path / "in.pth", state, under="vae" if part == "tokenizer" else "")
    convert.to_jax(request(part, path), tmp_path / "ours", quiet=True)
    assert convert.verify(tmp_path / "ours") == len(state)
    source = open_source(tmp_path / "ours")
    assert source.parts == (part,)
    for file_format in convert.FORMATS:
        output = tmp_path / file_format
        convert.to_torch(source, output, file_format, shard_bytes=300_000, quiet=True)
        assert convert.verify(output) == len(state)
        where = output / f"{part}.pth" if file_format == "pth" and part != "text" else output / part
        assert same({name.removeprefix("vae."): x for name, x in read_state_dict(where).items()}, state)
    if part != "text":
        with zipfile.ZipFile(tmp_path / "pth" / f"{part}.pth") as archive:
            assert archive.testzip() is None
    assert len(list((tmp_path / "safetensors" / part).glob("*.safetensors"))) > (0 if part == "text" else 1)


def test_written_pth_lies_as_torch_writes_it(states: dict[str, StateDict], tmp_path: pathlib.Path) -> None:
    """Storages begin at multiples of 64 bytes; the pickle asks for nothing that torch.load refuses."""
    path = write_pth(tmp_path / "x.pth", states["tokenizer"], under="vae")
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
        content = path.read_bytes()
        for key, tensor in enumerate(states["tokenizer"].values()):
            info = archive.getinfo(f"archive/data/{key}")
            start = content.index(tensor.tobytes()[:64], info.header_offset)
            assert start % 64 == 0
        assert archive.read("archive/version") == b"3\n"
        assert archive.read("archive/byteorder") == b"little"


def test_a_stack_of_mixed_types_is_exact(states: dict[str, StateDict], tmp_path: pathlib.Path) -> None:
    """Blocks in different types are stacked in one that holds both, and come out in their own."""
    types = [np.float16, ml_dtypes.bfloat16, np.float32]
    state = {name: _as(x, types[place % 3]) for place, (name, x) in enumerate(states["text"].items())}
    path = write_pth(tmp_path / "in.bin", state)
    convert.to_jax(request("text", path), tmp_path / "ours", quiet=True)
    convert.to_torch(open_source(tmp_path / "ours"), tmp_path / "out", quiet=True)
    assert same(read_state_dict(tmp_path / "out" / "text"), state)


def test_files_that_hold_more(states: dict[str, StateDict], tmp_path: pathlib.Path) -> None:
    """A trainer's checkpoint with averaged weights, names of wrappers, shards with an index, T5 with its decoder."""
    plain = states["transformer"]
    averaged = {name: x if x.dtype.kind == "i" else x * np.float32(0.5) for name, x in plain.items()}
    trainer = {f"gpt_fsdp._orig_mod.{name}": x for name, x in plain.items()}
    trainer |= {f"gpt_ema_fsdp.{name}": x for name, x in averaged.items()} | {"opt.step": np.zeros(1, np.float32)}
    file = write_pth(tmp_path / "ar-ckpt.pth", trainer, under="trainer")
    expected: dict[str, StateDict] = {"model": plain, "ema": averaged}
    for weights, state in expected.items():
        convert.to_jax(request("transformer", file, weights=weights), tmp_path / weights, quiet=True)
        config, _ = read_config(tmp_path / weights)
        wanted = names.to_tree("transformer", state, abstract_params(config, "transformer"))
        found = load_folder(tmp_path / weights, "transformer", abstract_params(config, "transformer"))
        for path, tensor in names.flat(wanted).items():
            np.testing.assert_array_equal(names.flat(found)[path], tensor)
    alone = write_pth(tmp_path / "in.pth", plain)
    with pytest.raises(UserError, match=r"in\.pth holds no averaged \(EMA\) transformer weights; use --weights=model"):
        convert.mapping_in(request("transformer", alone, weights="ema"))

    whole = states["text"] | {"decoder.block.0.x": np.zeros(2, np.float32), "lm_head.weight": np.zeros(2, np.float32)}
    folder = tmp_path / "flan-t5"
    folder.mkdir()
    convert.to_jax(request("text", write_shards(folder, whole, 4000)), tmp_path / "t5", quiet=True)
    assert read_config(tmp_path / "t5")[0].text.heads == 5
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=rf"{lost.name} does not exist"):
        convert.to_jax(request("text", folder), tmp_path / "lost", quiet=True)


def test_each_part_has_its_own_averaged_weights(states: dict[str, StateDict], tmp_path: pathlib.Path) -> None:
    """A trainer's checkpoint with an average goes together with a tokenizer that has none, and the other way round."""
    vae = states["tokenizer"]
    averaged = {name: x if x.dtype.kind == "i" else x * np.float32(0.5) for name, x in vae.items()}
    both = {f"vae.{name}": x for name, x in vae.items()} | {f"ema.{name}": x for name, x in averaged.items()}
    files = {
        "transformer": str(write_pth(tmp_path / "varedit.pth", states["transformer"], under="gpt_ema_fsdp")),
        "tokenizer": str(write_pth(tmp_path / "vae.pth", both)),
    }
    wanted: dict[str, StateDict] = {"model": vae, "ema": averaged}
    for weights, state in wanted.items():
        published = convert.Published(files=files, weights="ema", tokenizer_weights=weights)
        convert.to_jax(published, tmp_path / weights, quiet=True)
        source = open_source(tmp_path / weights, ["tokenizer"])
        convert.to_torch(source, tmp_path / f"{weights} back", quiet=True)
        back = read_state_dict(tmp_path / f"{weights} back" / "tokenizer.pth")
        assert same({name.removeprefix("vae."): x for name, x in back.items()}, state)
    files["tokenizer"] = str(write_pth(tmp_path / "in.pth", vae, under="vae"))
    with pytest.raises(UserError, match=r"in\.pth holds no averaged \(EMA\) tokenizer .* --tokenizer_weights=model"):
        convert.mapping_in(convert.Published(files=files, weights="ema", tokenizer_weights="ema"))


def test_what_is_converted_chooses_the_positions(states: dict[str, StateDict], tmp_path: pathlib.Path) -> None:
    """`released` for VAREdit, `paper` for Infinity, by file name or by word; it can be overridden; it must be known."""
    for name, options, layout in (
        ("VAREdit-8B-512.pth", {}, "released"),
        ("infinity_8b_512x512_weights.pth", {}, "paper"),
        ("infinity.pth", {"rope_layout": "released"}, "released"),
        ("mine.pth", {"family": "infinity"}, "paper"),
    ):
        path = write_pth(tmp_path / name, states["transformer"])
        convert.to_jax(convert.Published(files={"transformer": str(path)}, **options), tmp_path / "out", quiet=True)
        config, _ = read_config(tmp_path / "out")
        assert (config.transformer.rope_layout, config.pixel_budget) == (layout, "0.25M")
        shutil.rmtree(tmp_path / "out")
    for name, budget in (
        ("VAREdit/8B-1024.pth", "1M"),
        ("VAREdit-2B-256.pth", "0.06M"),
        ("infinity_8b_512x512_weights", "0.25M"),
        ("varedit_512px/weights.pth", "0.25M"),
        ("run1024/step.512000/256_to_512.pth", ""),
    ):
        assert infer.pixel_budget_of(name) == budget
    with pytest.raises(UserError, match=r"mine\.pth does not say .* give --family=varedit or --family=infinity"):
        convert.mapping_in(convert.Published(files={"transformer": str(tmp_path / "mine.pth")}))


@pytest.mark.parametrize(
    ("file", "size", "part"),
    [
        ("varedit_2b", "2b", "transformer"),
        ("varedit_8b", "8b", "transformer"),
        ("vae_2b", "2b", "tokenizer"),
        ("vae_8b", "8b", "tokenizer"),
    ],
)
def test_full_size_names_shapes_and_types(file: str, size: str, part: str) -> None:
    """Exactly those of the published models; nothing is allocated."""
    published = json.loads((DATA / "state_dict" / f"{file}.json").read_text())
    mapped = convert.mapping_of(preset(size), [part])
    assert {m.link.name: [list(m.link.shape), str(m.dtype)] for m in mapped} == published
    shapes = {name: tuple(shape) for name, (shape, _) in published.items()}
    config = infer.editor_config({part: shapes}, "0.25M", "released")
    assert getattr(config, part) == getattr(preset(size), part)
    assert config.patchify == preset(size).patchify
    matched = names.match(part, shapes, abstract_params(config, part))
    assert {link.name for link in matched} == set(published)


@pytest.mark.parametrize("size", ["125m", "350m", "700m", "2.2b", "4.5b", "8.5b", "20b"])
def test_other_sizes_convert_by_shape(size: str) -> None:
    """Both ways: the names of a size give its configuration again, and a place for each."""
    config = preset(size)
    shapes = {m.link.name: m.link.shape for m in convert.mapping_of(config, ["transformer"])}
    assert infer.transformer_config(shapes, "released") == config.transformer
    links = names.match("transformer", shapes, abstract_params(config, "transformer"))
    assert [link.name for link in links] == list(shapes)


# --- what cannot be converted


def spoilt(change: Callable[[StateDict], StateDict]) -> Callable[[pathlib.Path, StateDict], pathlib.Path]:
    return lambda folder, state: write_pth(folder / "in.pth", change(state))


def truncated(folder: pathlib.Path, state: StateDict) -> pathlib.Path:
    path = write_pth(folder / "in.pth", state)
    path.write_bytes(path.read_bytes()[:-5000])
    return path


def running_code(folder: pathlib.Path, state: StateDict) -> pathlib.Path:
    with zipfile.ZipFile(folder / "in.pth", "w") as archive:
        archive.writestr("x/data.pkl", f"cos\nsystem\n(S'touch {folder / 'ran'}'\ntR.".encode())
    return folder / "in.pth"


def with_nan(state: StateDict) -> StateDict:
    damaged = state["head.weight"].copy()
    damaged[3, 4:6] = [np.nan, np.inf]
    return state | {"head.weight": damaged}


SIZES = ("word_embed.weight", "pos_start", "cfg_uncond", "lvl_embed.weight")
HEADS = "block_chunks.1.module.0.sa.scale_mul_1H11"
REFUSED: dict[str, tuple[Callable[[pathlib.Path, StateDict], pathlib.Path], str]] = {
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
    "no weights": (lambda folder, state: folder / "in.pth", r"in\.pth does not exist"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_inputs_leave_nothing_behind(states: dict[str, StateDict], tmp_path: pathlib.Path, name: str) -> None:
    spoil, sentence = REFUSED[name]
    path = spoil(tmp_path, states["transformer"])
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError, match=sentence):
        convert.to_jax(request("transformer", path), tmp_path / "out", quiet=True)
    assert set(tmp_path.iterdir()) == before


def test_refused_outputs(states: dict[str, StateDict], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_pth(tmp_path / "in.pth", states["transformer"])
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists; give a new folder, or remove it first"):
        convert.to_jax(request("transformer", path), tmp_path / "out", quiet=True)
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match=r"takes 3\.3 MB more, but only 0\.0 MB are free there; make room"):
        convert.to_jax(request("transformer", path), tmp_path / "new", quiet=True)
    assert not (tmp_path / "new").exists()


def test_a_disk_that_runs_full(
    states: dict[str, StateDict], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence, nothing lost: the same command goes on when there is room."""
    path = write_pth(tmp_path / "in.pth", states["transformer"])
    convert.to_jax(request("transformer", path), tmp_path / "ours", quiet=True)
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
        with pytest.raises(UserError, match="out failed: No space left on device; make room and run the same command"):
            convert.to_torch(source, tmp_path / "out", quiet=True)
    assert (tmp_path / ".out.partial").is_dir()
    convert.to_torch(source, tmp_path / "out", quiet=True)
    assert same(read_state_dict(tmp_path / "out" / "transformer.pth"), states["transformer"])


def test_two_conversions_into_one_folder(states: dict[str, StateDict], tmp_path: pathlib.Path) -> None:
    path = write_pth(tmp_path / "in.pth", states["transformer"])
    first = stream.Job(tmp_path / "out", {"to": "jax"})
    with first, pytest.raises(UserError, match="another conversion is writing .*out; wait for it, or end it first"):
        convert.to_jax(request("transformer", path), tmp_path / "out", quiet=True)


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
    states: dict[str, StateDict], tmp_path: pathlib.Path, change: dict, sentence: str
) -> None:
    """Its tensors have the published names, but mean something else."""
    path = write_pth(tmp_path / "in.pth", states["transformer"])
    convert.to_jax(request("transformer", path), tmp_path / "ours", quiet=True)
    file = tmp_path / "ours" / "config.json"
    record = json.loads(file.read_text())
    for name, value in change.items():
        record["model"][name] = record["model"][name] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match=sentence):
        convert.to_torch(open_source(tmp_path / "ours"), tmp_path / "out", quiet=True)
    assert not list(tmp_path.glob("*out*"))


def test_values_that_do_not_fit_a_type_are_named(states: dict[str, StateDict], tmp_path: pathlib.Path) -> None:
    state = states["transformer"] | {"head.bias": states["transformer"]["head.bias"] + np.float32(1e6)}
    convert.to_jax(request("transformer", write_pth(tmp_path / "in.pth", state)), tmp_path / "ours", quiet=True)
    with pytest.raises(UserError, match=r"head\.bias, as float16, holds 32 of 32 values that are NaN or infinite"):
        convert.to_torch(open_source(tmp_path / "ours"), tmp_path / "out", dtype="float16", quiet=True)
    with pytest.raises(UserError, match=r"ours holds no text weights, but transformer"):
        open_source(tmp_path / "ours", ["text"])


# --- ended and gone on with


@pytest.mark.parametrize("direction", ["jax", "torch", "folder"])
def test_an_ended_conversion_goes_on(
    states: dict[str, StateDict],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    direction: str,
) -> None:
    """What is done is not done again, and the result is that of a conversion that was not ended."""
    path = write_pth(tmp_path / "in.pth", states["transformer"])
    convert.to_jax(request("transformer", path), tmp_path / "ours", quiet=True)
    start = {
        "jax": lambda output: convert.to_jax(request("transformer", path), output),
        "torch": lambda output: convert.to_torch(open_source(tmp_path / "ours"), output),
        "folder": lambda output: convert.to_folder(open_source(tmp_path / "ours"), output),
    }[direction]
    start(tmp_path / "whole")

    made: list[object] = []

    def ends(tensor: np.ndarray) -> str:
        made.append(tensor)
        if len(made) == 20:
            raise KeyboardInterrupt
        return checksum(tensor)

    checksum = stream.sha256
    monkeypatch.setattr(stream, "sha256", ends)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    done = len(journal.read_text().splitlines()) - 1
    assert done > 3
    with journal.open("a") as file:
        file.write('{"key": "transformer/cfg_un')  # a line that was cut short
    made.clear()
    monkeypatch.setattr(stream, "sha256", lambda tensor: made.append(tensor) or checksum(tensor))
    capsys.readouterr()
    start(tmp_path / "out")
    assert f"{done} of " in capsys.readouterr().out
    assert len(made) < 2 * sum(1 for _ in files_of(tmp_path / "whole")) + 2 * len(states["transformer"])
    whole = {name: content for name, content in files_of(tmp_path / "whole")}
    assert whole == dict(files_of(tmp_path / "out"))
    assert not (tmp_path / ".out.partial").exists()


def files_of(folder: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Files by relative path; times that Orbax notes aside."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            yield str(path.relative_to(folder)), path.read_bytes()


def test_another_input_is_not_gone_on_with(
    states: dict[str, StateDict], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_pth(tmp_path / "in.pth", states["transformer"])

    def ends(tensor: np.ndarray, link: names.Link) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(names, "check_buffer", ends)
        convert.to_jax(request("transformer", path), tmp_path / "out", quiet=True)
    changed = {name: x if x.dtype.kind == "i" else x * np.float32(2) for name, x in states["transformer"].items()}
    path.unlink()
    write_pth(path, changed)
    convert.to_jax(request("transformer", path), tmp_path / "out", quiet=True)
    assert convert.verify(tmp_path / "out") == len(changed)
    convert.to_torch(open_source(tmp_path / "out"), tmp_path / "back", quiet=True)
    assert same(read_state_dict(tmp_path / "back" / "transformer.pth"), changed)


# --- what comes out


def test_a_flipped_bit_is_found(states: dict[str, StateDict], tmp_path: pathlib.Path) -> None:
    """And a chunk that is gone is damage, not zeros."""
    path = write_pth(tmp_path / "in.pth", states["transformer"])
    convert.to_jax(request("transformer", path), tmp_path / "ours", quiet=True)
    chunk = tmp_path / "ours" / "transformer" / "blocks.mlp.fc1.kernel" / "0.0.0"
    content = bytearray(chunk.read_bytes())
    content[100] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(UserError, match=r"the checksum of transformer/blocks/mlp/fc1/kernel\[0\] differs"):
        convert.verify(tmp_path / "ours")
    chunk.unlink()
    with pytest.raises(UserError, match=r"the checksum of transformer/blocks/mlp/fc1/kernel\[0\] differs"):
        convert.verify(tmp_path / "ours")
    config, _ = read_config(tmp_path / "ours")
    with pytest.raises(UserError, match="damaged"):
        load_folder(tmp_path / "ours", "transformer", abstract_params(config, "transformer"))


def test_damage_of_published_files_is_found(states: dict[str, StateDict], tmp_path: pathlib.Path) -> None:
    """A file that is gone, a shard that is gone, and one that holds another tensor in its place."""
    path = write_pth(tmp_path / "in.bin", states["text"])
    convert.to_jax(request("text", path), tmp_path / "ours", quiet=True)
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


def test_an_editor_of_converted_parts(states: dict[str, StateDict], tmp_path: pathlib.Path) -> None:
    """All parts at once, loaded by `Editor`, from the Orbax form and from our own safetensors."""
    files = {
        part: str(write_pth(tmp_path / f"{part}.pth", states[part])) for part in ("transformer", "tokenizer", "text")
    }  # a text encoder of width 24 does not go with this transformer
    with pytest.raises(UserError, match=r"transformer\.text_width is 128, but text\.width is 24"):
        convert.mapping_in(convert.Published(files=files, family="varedit"))
    del files["text"]
    convert.to_jax(convert.Published(files=files, family="varedit", pixel_budget="0.06M"), tmp_path / "o", quiet=True)
    config, _ = read_config(tmp_path / "o")
    assert (tmp_path / "o" / "t5_tokenizer.json").is_file()
    convert.to_folder(open_source(tmp_path / "o"), tmp_path / "s", "float32", "apache-2.0", quiet=True)
    card = (tmp_path / "s" / "README.md").read_text()
    assert (
        "license: apache-2.0" in card and "2 blocks, width 128" in card and "THIS_FOLDER --text=FOLDER --image" in card
    )
    assert convert.verify(tmp_path / "s")
    for part in ("transformer", "tokenizer"):
        wanted = names.flat(names.to_tree(part, states[part], abstract_params(config, part)))
        for folder in ("o", "s"):
            found = names.flat(load_folder(tmp_path / folder, part, abstract_params(config, part)))
            for path, tensor in wanted.items():
                np.testing.assert_array_equal(found[path], tensor)
    with pytest.raises(UserError, match="holds no text weights"):
        Editor.load(tmp_path / "o")

    fitting = TextConfig(width=128, layers=2, heads=2, head_size=8, mlp_width=16, vocabulary_size=40)
    whole = dataclasses.replace(config, text=fitting)
    text = init_text(whole, jax.random.key(0))
    state = {
        link.name: np.asarray(names.to_published(leaf if link.index is None else leaf[link.index], link))
        for link in names.links("text", text)
        for leaf in [np.asarray(names.flat(text)[link.path])]
    }
    files["text"] = str(write_pth(tmp_path / "t5.bin", state))
    convert.to_jax(convert.Published(files=files, family="varedit", pixel_budget="0.06M"), tmp_path / "e", quiet=True)
    editor = Editor.load(tmp_path / "e")
    assert editor.config == whole
    assert editor.vocabulary.path == str(tmp_path / "e" / "t5_tokenizer.json")
    jax.tree.map(np.testing.assert_array_equal, editor.params["text"], text)
    assert editor.params["transformer"].keys() == abstract_params(config, "transformer").keys()


def test_memory_maps_are_views(states: dict[str, StateDict], tmp_path: pathlib.Path) -> None:
    """A tensor of a file is not copied before it is used, and what was read can be given back."""
    file = open_weights(write_pth(tmp_path / "in.pth", states["transformer"]))
    tensor = file["head.weight"].load()
    assert not tensor.flags.owndata and not tensor.flags.writeable
    file.release()
    np.testing.assert_array_equal(tensor, states["transformer"]["head.weight"])


def test_chunks_are_small_enough_to_read_alone() -> None:
    assert ours._chunks((39, 3584, 14336), 4, stacked=True) == (1, 3584, 3584)
    assert ours._chunks((32128, 2048), 4, stacked=False) == (8032, 2048)
    assert ours._chunks((5, 7), 4, stacked=False) == (5, 7)
