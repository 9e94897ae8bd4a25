"""Whole conversions on small models: exact both ways, and restartable."""

import dataclasses
import json
import pathlib
import shutil
import zipfile
from collections.abc import Callable, Iterator

import jax
import ml_dtypes
import numpy as np
import pytest

from varedit_jax.config import EditingConfig, SamplingConfig, TextConfig
from varedit_jax.conversion import convert
from varedit_jax.conversion.writer import Planned, safetensors_shards, shard_index
from varedit_jax.errors import UserError
from varedit_jax.parameters import abstract_params, init_text
from varedit_jax.sampling.editor import Editor
from varedit_jax.weights import names, native
from varedit_jax.weights.directory import read_editing_config, read_editor_config
from varedit_jax.weights.export_source import open_source
from varedit_jax.weights.native import load_part
from varedit_jax.weights.reader import StateDict, read_state_dict

DATA = pathlib.Path(__file__).parents[2] / "data"
GOLDEN = DATA / "golden" / "mini_a"


def _as(tensor: np.ndarray, dtype: type) -> np.ndarray:
    return tensor if tensor.dtype.kind == "i" else np.asarray(tensor, np.float32).astype(dtype)


def write_shards(directory: pathlib.Path, state: StateDict, shard_bytes: int) -> pathlib.Path:
    files = safetensors_shards(directory, [Planned(name, x.shape, x.dtype) for name, x in state.items()], shard_bytes)
    for file in files:
        file.create()
        file.finish({tensor.name: file.write(tensor.name, state[tensor.name]) for tensor in file.tensors})
    (directory / "model.safetensors.index.json").write_text(json.dumps(shard_index(files)))
    return directory


def same(one: StateDict, other: StateDict) -> bool:
    """The same names, types and bytes."""
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype and one[name].tobytes() == other[name].tobytes() for name in one
    )


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("part", ["transformer", "tokenizer", "text"])
def test_round_trip_is_exact(
    states: dict[str, StateDict],
    tmp_path: pathlib.Path,
    part: str,
    dtype: type,
    write_pth: Callable[..., pathlib.Path],
    published: Callable[..., convert.Published],
) -> None:
    """Published -> ours -> published, as .pth and as shards: every name, type and byte."""
    state = {name: _as(x, dtype) for name, x in states[part].items()}
    path = write_pth(tmp_path / "in.pth", state, under="vae" if part == "tokenizer" else "")
    convert.to_jax(published(part, path), tmp_path / "ours", quiet=True)
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


def test_written_pth_lies_as_torch_writes_it(
    states: dict[str, StateDict], tmp_path: pathlib.Path, write_pth: Callable[..., pathlib.Path]
) -> None:
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


def test_a_stack_of_mixed_types_is_exact(
    states: dict[str, StateDict],
    tmp_path: pathlib.Path,
    write_pth: Callable[..., pathlib.Path],
    published: Callable[..., convert.Published],
) -> None:
    """Blocks in different types are stacked in one that holds both, and come out in their own."""
    types = [np.float16, ml_dtypes.bfloat16, np.float32]
    state = {name: _as(x, types[place % 3]) for place, (name, x) in enumerate(states["text"].items())}
    path = write_pth(tmp_path / "in.bin", state)
    convert.to_jax(published("text", path), tmp_path / "ours", quiet=True)
    convert.to_torch(open_source(tmp_path / "ours"), tmp_path / "out", quiet=True)
    assert same(read_state_dict(tmp_path / "out" / "text"), state)


def test_files_that_hold_more(
    states: dict[str, StateDict],
    tmp_path: pathlib.Path,
    write_pth: Callable[..., pathlib.Path],
    published: Callable[..., convert.Published],
) -> None:
    """A trainer's checkpoint with averaged weights, names of wrappers, shards with an index, T5 with its decoder."""
    plain = states["transformer"]
    averaged = {name: x if x.dtype.kind == "i" else x * np.float32(0.5) for name, x in plain.items()}
    trainer = {f"gpt_fsdp._orig_mod.{name}": x for name, x in plain.items()}
    trainer |= {f"gpt_ema_fsdp.{name}": x for name, x in averaged.items()} | {"opt.step": np.zeros(1, np.float32)}
    file = write_pth(tmp_path / "ar-ckpt.pth", trainer, under="trainer")
    expected: dict[str, StateDict] = {"model": plain, "ema": averaged}
    for weights, state in expected.items():
        convert.to_jax(published("transformer", file, weights=weights), tmp_path / weights, quiet=True)
        config, _ = read_editor_config(tmp_path / weights)
        wanted = names.to_tree("transformer", state, abstract_params(config, "transformer"))
        found = load_part(tmp_path / weights, "transformer", abstract_params(config, "transformer"))
        for path, tensor in names.flat(wanted).items():
            np.testing.assert_array_equal(names.flat(found)[path], tensor)
    alone = write_pth(tmp_path / "in.pth", plain)
    with pytest.raises(UserError, match=r"in\.pth holds no EMA of the transformer weights; use --weights=model"):
        convert.mapping_in(published("transformer", alone, weights="ema"))

    whole = states["text"] | {"decoder.block.0.x": np.zeros(2, np.float32), "lm_head.weight": np.zeros(2, np.float32)}
    directory = tmp_path / "flan-t5"
    directory.mkdir()
    convert.to_jax(published("text", write_shards(directory, whole, 4000)), tmp_path / "t5", quiet=True)
    assert read_editor_config(tmp_path / "t5")[0].text.heads == 5
    lost = sorted(directory.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=rf"{lost.name} does not exist"):
        convert.to_jax(published("text", directory), tmp_path / "lost", quiet=True)


def test_each_part_has_its_own_averaged_weights(
    states: dict[str, StateDict],
    tmp_path: pathlib.Path,
    write_pth: Callable[..., pathlib.Path],
) -> None:
    """A tokenizer's file with an EMA; and a trainer's checkpoint with one beside a tokenizer that has none."""
    vae = states["tokenizer"]
    averaged = {name: x if x.dtype.kind == "i" else x * np.float32(0.5) for name, x in vae.items()}
    both = {f"vae.{name}": x for name, x in vae.items()} | {f"ema.{name}": x for name, x in averaged.items()}
    files = {"tokenizer": str(write_pth(tmp_path / "both.pth", both))}
    convert.to_jax(convert.Published(files=files, tokenizer_weights="ema"), tmp_path / "ours", quiet=True)
    convert.to_torch(open_source(tmp_path / "ours"), tmp_path / "back", quiet=True)
    back = read_state_dict(tmp_path / "back" / "tokenizer.pth")
    assert same({name.removeprefix("vae."): x for name, x in back.items()}, averaged)
    files = {
        "transformer": str(write_pth(tmp_path / "varedit.pth", states["transformer"], under="gpt_ema_fsdp")),
        "tokenizer": str(write_pth(tmp_path / "in.pth", vae, under="vae")),
    }
    convert.mapping_in(convert.Published(files=files, weights="ema"))
    with pytest.raises(UserError, match=r"in\.pth holds no EMA of the tokenizer .* --tokenizer_weights=model"):
        convert.mapping_in(convert.Published(files=files, weights="ema", tokenizer_weights="ema"))


def test_what_is_converted_chooses_the_positions(
    states: dict[str, StateDict],
    tmp_path: pathlib.Path,
    write_pth: Callable[..., pathlib.Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`released` for VAREdit, `paper` for Infinity, by file name or by word; it can be overridden; it must be known.

    The way back says so where VAREdit's code would compute others.
    """
    for name, options, layout in (
        ("VAREdit-8B-512.pth", {}, "released"),
        ("infinity_8b_512x512_weights.pth", {}, "paper"),
        ("infinity.pth", {"rope_layout": "released"}, "released"),
        ("mine.pth", {"family": "infinity"}, "paper"),
        ("VAREdit-8B-512.pth", {"rope_layout": "paper"}, "paper"),
    ):
        path = write_pth(tmp_path / name, states["transformer"])
        convert.to_jax(convert.Published(files={"transformer": str(path)}, **options), tmp_path / "out", quiet=True)
        config, _ = read_editor_config(tmp_path / "out")
        assert (config.transformer.rope_layout, config.pixel_budget) == (layout, "0.25M")
        convert.to_torch(open_source(tmp_path / "out"), tmp_path / "back")
        differs = name.startswith("VAREdit") and layout == "paper"
        assert ("published code computes the released positions" in capsys.readouterr().out) == differs
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "back")
    with pytest.raises(UserError, match=r"mine\.pth does not say .* give --family=varedit or --family=infinity"):
        convert.mapping_in(convert.Published(files={"transformer": str(tmp_path / "mine.pth")}))


# --- interrupted and resumed


@pytest.mark.parametrize("direction", ["jax", "torch", "directory"])
def test_an_interrupted_conversion_resumes(
    states: dict[str, StateDict],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    direction: str,
    write_pth: Callable[..., pathlib.Path],
    published: Callable[..., convert.Published],
) -> None:
    """Finished tensors are not converted again, and the result is that of a conversion that was not interrupted."""
    path = write_pth(tmp_path / "in.pth", states["transformer"])
    convert.to_jax(published("transformer", path), tmp_path / "ours", quiet=True)
    start = {
        "jax": lambda output: convert.to_jax(published("transformer", path), output),
        "torch": lambda output: convert.to_torch(open_source(tmp_path / "ours"), output),
        "directory": lambda output: convert.to_directory(open_source(tmp_path / "ours"), output),
    }[direction]
    start(tmp_path / "whole")

    made: list[object] = []

    def ends(tensor: np.ndarray) -> str:
        made.append(tensor)
        if len(made) == 20:
            raise KeyboardInterrupt
        return checksum(tensor)

    checksum = convert.sha256
    monkeypatch.setattr(convert, "sha256", ends)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    done = len(journal.read_text().splitlines()) - 2  # what is converted; that its files have been created
    assert done > 3
    with journal.open("a") as file:
        file.write('{"key": "transformer/cfg_un')  # a line that was cut short
    made.clear()
    monkeypatch.setattr(convert, "sha256", lambda tensor: made.append(tensor) or checksum(tensor))
    capsys.readouterr()
    start(tmp_path / "out")
    assert f"{done} of " in capsys.readouterr().out
    assert len(made) < 2 * sum(1 for _ in files_of(tmp_path / "whole")) + 2 * len(states["transformer"])
    whole = {name: content for name, content in files_of(tmp_path / "whole")}
    assert whole == dict(files_of(tmp_path / "out"))
    assert not (tmp_path / ".out.partial").exists()


def files_of(directory: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Files by relative path; times that Orbax notes aside."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name not in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            yield str(path.relative_to(directory)), path.read_bytes()


def test_another_input_is_not_resumed(
    states: dict[str, StateDict],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    write_pth: Callable[..., pathlib.Path],
    published: Callable[..., convert.Published],
) -> None:
    path = write_pth(tmp_path / "in.pth", states["transformer"])

    def ends(tensor: np.ndarray, link: names.Link) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(names, "check_buffer", ends)
        convert.to_jax(published("transformer", path), tmp_path / "out", quiet=True)
    changed = {name: x if x.dtype.kind == "i" else x * np.float32(2) for name, x in states["transformer"].items()}
    path.unlink()
    write_pth(path, changed)
    convert.to_jax(published("transformer", path), tmp_path / "out", quiet=True)
    assert convert.verify(tmp_path / "out") == len(changed)
    convert.to_torch(open_source(tmp_path / "out"), tmp_path / "back", quiet=True)
    assert same(read_state_dict(tmp_path / "back" / "transformer.pth"), changed)


def test_an_editor_of_converted_parts(
    states: dict[str, StateDict], tmp_path: pathlib.Path, write_pth: Callable[..., pathlib.Path]
) -> None:
    """All parts at once, loaded by `Editor`, from the Orbax form and from our own safetensors."""
    files = {
        part: str(write_pth(tmp_path / f"{part}.pth", states[part])) for part in ("transformer", "tokenizer", "text")
    }  # a text encoder of width 24 does not go with this transformer
    with pytest.raises(UserError, match=r"transformer\.text_width is 128, but text\.width is 24"):
        convert.mapping_in(convert.Published(files=files, family="varedit"))
    del files["text"]
    convert.to_jax(convert.Published(files=files, family="varedit", pixel_budget="0.06M"), tmp_path / "o", quiet=True)
    config, _ = read_editor_config(tmp_path / "o")
    assert (tmp_path / "o" / "t5_tokenizer.json").is_file()
    convert.to_directory(open_source(tmp_path / "o"), tmp_path / "s", "float32", "apache-2.0", quiet=True)
    card = (tmp_path / "s" / "README.md").read_text()
    assert (
        "license: apache-2.0" in card
        and "2 blocks, width 128" in card
        and "THIS_DIRECTORY --text=DIRECTORY --image" in card
    )
    assert convert.verify(tmp_path / "s")
    assert read_editing_config(tmp_path / "s") == read_editing_config(tmp_path / "o")
    for part in ("transformer", "tokenizer"):
        wanted = names.flat(names.to_tree(part, states[part], abstract_params(config, part)))
        for directory in ("o", "s"):
            found = names.flat(load_part(tmp_path / directory, part, abstract_params(config, part)))
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
    transformer = dataclasses.replace(config.transformer, dtype="bfloat16")
    assert editor.config == dataclasses.replace(whole, transformer=transformer)
    assert editor.sampling == SamplingConfig(guidance=4.0, temperature=0.5, top_p=0.97)
    assert editor.editing == EditingConfig(text_dtype="bfloat16", tokenizer_precision="highest", aspects=("1.0",))
    for part, path, dtype in (
        ("text", "layers/mlp/up/kernel", "bfloat16"),
        ("tokenizer", "encoder/conv_in/kernel", "float32"),
        ("transformer", "block_0/mlp/fc1/kernel", "bfloat16"),
        ("transformer", "head/kernel", "float32"),
    ):
        assert names.flat(editor.params[part])[path].dtype == dtype
    assert read_editing_config(tmp_path / "e") == editor.editing
    editor = Editor.load(tmp_path / "e", dtype="float32")
    assert editor.vocabulary.path == str(tmp_path / "e" / "t5_tokenizer.json")
    jax.tree.map(np.testing.assert_array_equal, editor.params["text"], text)
    assert editor.params["transformer"].keys() == abstract_params(config, "transformer").keys()


def test_chunks_are_small_enough_to_read_alone() -> None:
    assert native._chunks((39, 3584, 14336), 4, stacked=True) == (1, 3584, 3584)
    assert native._chunks((32128, 2048), 4, stacked=False) == (8032, 2048)
    assert native._chunks((5, 7), 4, stacked=False) == (5, 7)
