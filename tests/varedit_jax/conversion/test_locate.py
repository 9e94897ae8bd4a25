"""Where files hold a part: checkpoints of trainers, wrappers of modules, pipelines; what is taken, what is guessed."""

import json
import pathlib
import struct
import zipfile
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from varedit_jax.conversion import convert, locate
from varedit_jax.errors import UserError
from varedit_jax.weights.directory import read_editor_config
from varedit_jax.weights.export_source import open_source
from varedit_jax.weights.reader import StateDict, open_weights

Write = Callable[..., pathlib.Path]
Ask = Callable[..., convert.Published]
OTHER = {"trainer.gpt_opt.state.0.exp_avg": np.zeros(2, np.float32), "random.0": np.zeros(2, np.uint8)}


def inside(state: StateDict, prefix: str, wrap: Callable[[str], str] = lambda name: name) -> StateDict:
    return {prefix + wrap(name): x for name, x in state.items()}


def compiled(name: str) -> str:
    """Names of a model whose blocks are wrapped for FSDP, for checkpoints of activations, and compiled."""
    for block in ("0.module.0.", "1.module.0."):
        name = name.replace(block, f"_fsdp_wrapped_module.{block}_checkpoint_wrapped_module._orig_mod.")
    return name.replace("head.", "_fpw_module.head.")


PLACES: dict[str, tuple[str, Callable[[str], str]]] = {
    "the trainer, FSDP": ("trainer.gpt_fsdp.", str),
    "the trainer, without FSDP": ("trainer.gpt_wo_ddp.", str),
    "the trainer's dictionary alone": ("gpt_wo_ddp.", str),
    "FSDP, activation checkpoints, compiled": ("trainer.gpt_fsdp._fsdp_wrapped_module.", compiled),
    "DDP of a compiled model": ("module._orig_mod.", str),
    "compiled DDP": ("_orig_mod.module.", str),
    "both, twice": ("_orig_mod.module._orig_mod.module.", compiled),
    "model": ("model.", str),
    "state_dict of Lightning": ("state_dict.model.", str),
    "model of DDP": ("model.module.", compiled),
    "a list": ("0.", str),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_transformer_is_found_wherever_it_lies(
    states: dict[str, StateDict], tmp_path: pathlib.Path, write_pth: Write, published: Ask, name: str
) -> None:
    """With the names and values of the plain file."""
    plain = states["transformer"]
    path = write_pth(tmp_path / "in.pth", OTHER | inside(plain, *PLACES[name]))
    found, sentence = locate.find_part(path, "transformer", flag="weights")
    assert list(found) == list(plain)
    assert all(np.array_equal(found[tensor].load(), plain[tensor]) for tensor in plain)
    assert sentence.endswith(f"of {path} is taken (2 other tensors of the file are passed over)")


@pytest.mark.parametrize("prefix", ["", "text_encoder.", "transformer.", "text_encoder.transformer.", "module."])
def test_a_text_encoder_is_found_wherever_it_lies(
    states: dict[str, StateDict], tmp_path: pathlib.Path, write_pth: Write, published: Ask, prefix: str
) -> None:
    """In a pipeline with other models, whose tensors are no part of it; with a decoder beside the encoder."""
    whole = states["text"] | {"decoder.block.0.layer.0.SelfAttention.q.weight": np.zeros((2, 2), np.float32)}
    others = {"vae.encoder.conv_in.weight": np.zeros(1, np.float32)} if prefix else {}
    path = write_pth(tmp_path / "in.bin", others | inside(whole, prefix))
    mapped = convert.mapping_in(published("text", path))
    plain = convert.mapping_in(published("text", write_pth(tmp_path / "plain.bin", states["text"])))
    assert [str(line) for line in mapped] == [str(line) for line in plain]


def test_which_set_of_weights_is_taken_is_said_and_chosen(
    states: dict[str, StateDict],
    tmp_path: pathlib.Path,
    write_pth: Write,
    published: Ask,
) -> None:
    """The parameters or their EMA, under the names of the trainer without FSDP, and of {"model", "ema"}."""
    vae = states["tokenizer"]
    half = {name: x if x.dtype.kind == "i" else x * np.float32(0.5) for name, x in vae.items()}
    path = write_pth(tmp_path / "both.pth", inside(vae, "model.") | inside(half, "model_ema.module."))
    for which, wanted, sentence in (
        ("model", vae, "tokenizer: model of {} is taken ({} other tensors of the file are passed over; "
         "--tokenizer_weights=ema takes model_ema.module)"),
        ("ema", half, "tokenizer: model_ema.module of {} is taken ({} other tensors of the file are passed over; "
         "--tokenizer_weights=model takes model)"),
    ):  # fmt: skip
        opened = convert._open(published("tokenizer", path, tokenizer_weights=which))
        assert str(opened).startswith(sentence.format(path, len(vae)))
        found = opened.files["tokenizer"]
        assert all(np.array_equal(found[name].load(), x) for name, x in wanted.items()) and len(found) == len(wanted)

    plain = states["transformer"]
    trainer = inside(plain, "trainer.gpt_wo_ddp.") | inside(plain, "trainer.gpt_ema_for_vis._orig_mod.")
    file = write_pth(tmp_path / "ckpt.pth", trainer | inside(vae, "trainer.vae_local."))
    for weights, place in (("model", "trainer.gpt_wo_ddp"), ("ema", "trainer.gpt_ema_for_vis")):
        assert locate.find_part(file, "transformer", weights, "weights")[1].startswith(
            f"transformer: {place} of {file} is taken"
        )
    assert list(locate.find_part(file, "tokenizer", flag="tokenizer_weights")[0]) == list(vae)


@pytest.mark.parametrize(
    ("prefixes", "sentence"),
    [
        (("ema.",), "in.pth holds the tokenizer weights as an EMA alone, ema; use --tokenizer_weights=ema"),
        (
            ("model.", "student.module."),
            "in.pth holds 2 sets of tokenizer weights: model, student.module; save the one",
        ),
        (("", "model."), "in.pth holds 2 sets of tokenizer weights: the top level, model; save the one"),
        (("module._orig_mod.", "_orig_mod.module."), r"in.pth holds module\..* more than once \(module\._orig_mod\."),
    ],
)
def test_no_set_is_taken_at_random(
    states: dict[str, StateDict],
    tmp_path: pathlib.Path,
    write_pth: Write,
    published: Ask,
    prefixes: tuple[str, ...],
    sentence: str,
) -> None:
    state = {name: x for prefix in prefixes for name, x in inside(states["tokenizer"], prefix).items()}
    with pytest.raises(UserError, match=sentence):
        convert.mapping_in(published("tokenizer", write_pth(tmp_path / "in.pth", state)))


def test_a_missing_tensor_inside_a_checkpoint_is_named(
    states: dict[str, StateDict], tmp_path: pathlib.Path, write_pth: Write, published: Ask
) -> None:
    """As exactly as in a plain file; what lies elsewhere in the checkpoint does not take its place."""
    lost = {name: x for name, x in states["text"].items() if name != "encoder.final_layer_norm.weight"}
    more = inside(lost, "text_encoder.") | {"encoder.final_layer_norm.weight": np.zeros(24, np.float32)}
    with pytest.raises(UserError, match=r"it lacks \(1\): encoder\.final_layer_norm\.weight$"):
        convert.mapping_in(published("text", write_pth(tmp_path / "in.bin", more)))


# --- what is guessed


def with_settings(path: pathlib.Path, settings: Mapping[str, str]) -> pathlib.Path:
    """Puts the state dict of a file under "trainer", and `settings` beside it, as a trainer's checkpoint has them."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    with zipfile.ZipFile(path) as file:
        entries = {info.filename: file.read(info) for info in file.infolist()}
    pairs = b"".join(text(name) + text(value) for name, value in settings.items())
    inner = entries["archive/data.pkl"][2:-1]
    entries["archive/data.pkl"] = b"\x80\x02}(" + text("args") + b"}(" + pairs + b"u" + text("trainer") + inner + b"u."
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("name", "settings", "flags", "budget", "warnings"),
    [
        ("varedit/0.06M-8K.pth", {}, {}, "0.06M", ("family states", "says pixel budget 0.06M")),
        ("1M-60K.pth", {}, {"family": "varedit"}, "1M", ("says pixel budget 1M",)),
        ("varedit/last.pth", {}, {}, "0.25M", ("family states", "0.25M is a guess")),
        ("varedit/0.25M-8K.pth", {"pn": "1M"}, {}, "1M", ("family states",)),
        ("varedit/0.25M-8K.pth", {"pn": "1M"}, {"pixel_budget": "0.60M"}, "0.60M", ("family states",)),
        ("varedit-512.pth", {}, {"family": "infinity", "pixel_budget": "0.06M"}, "0.06M", ()),
    ],
)
def test_what_neither_flag_nor_file_states_is_said(
    states: dict[str, StateDict],
    tmp_path: pathlib.Path,
    write_pth: Write,
    capsys: pytest.CaptureFixture[str],
    name: str,
    settings: dict[str, str],
    flags: dict[str, str],
    budget: str,
    warnings: tuple[str, ...],
) -> None:
    """A line each, with the flag; settings in the file are no guess."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    write_pth(path, states["transformer"], under="gpt_wo_ddp" if settings else "")
    request = convert.Published(
        files={"transformer": str(with_settings(path, settings) if settings else path)}, **flags
    )
    assert convert._open(request).config.pixel_budget == budget
    lines = capsys.readouterr().err.splitlines()
    wanted = {
        "family states": "these are weights of varedit; --family states it",
        "says pixel budget 0.06M": "its pixel budget is 0.06M; --pixel_budget states it",
        "says pixel budget 1M": "its pixel budget is 1M; --pixel_budget states it",
        "0.25M is a guess": "nor its name states a pixel budget; 0.25M is a guess, --pixel_budget states it",
    }
    assert len(lines) == len(warnings)
    for line, warning in zip(lines, warnings, strict=True):
        assert line.startswith("warning: ") and line.endswith(wanted[warning])


def test_an_index_lies_beside_a_single_file(
    states: dict[str, StateDict], tmp_path: pathlib.Path, write_pth: Write, published: Ask
) -> None:
    """The published loader finds the file by it; it is read with the index and without."""
    convert.to_jax(
        published("tokenizer", write_pth(tmp_path / "in.pth", states["tokenizer"])), tmp_path / "o", quiet=True
    )
    convert.to_torch(open_source(tmp_path / "o"), tmp_path / "out", "safetensors", quiet=True)
    directory = tmp_path / "out" / "tokenizer"
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(states["tokenizer"], "model.safetensors")
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in states["tokenizer"].values())
    assert set(open_weights(directory)) == set(states["tokenizer"])
    (directory / "model.safetensors.index.json").unlink()
    assert set(open_weights(directory)) == set(states["tokenizer"])


# --- an output that is a link


def test_an_output_on_a_link_is_written_where_it_points(
    states: dict[str, StateDict], tmp_path: pathlib.Path, write_pth: Write, published: Ask
) -> None:
    """In all directions, as to another disk; the link stays, and what is there already is kept."""
    (tmp_path / "disk").mkdir()
    path = write_pth(tmp_path / "in.bin", states["text"])
    for name, start in {
        "jax": lambda output: convert.to_jax(published("text", path), output, quiet=True),
        "torch": lambda output: convert.to_torch(open_source(tmp_path / "jax"), output, quiet=True),
        "directory": lambda output: convert.to_directory(open_source(tmp_path / "jax"), output, quiet=True),
    }.items():
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        start(tmp_path / name)
        assert (tmp_path / name).is_symlink() and not (tmp_path / "disk" / name).is_symlink()
        assert convert.verify(tmp_path / name) == convert.verify(tmp_path / "disk" / name) > 0
        with pytest.raises(UserError, match=f"disk/{name} exists; give a new directory, or remove it first"):
            start(tmp_path / name)
    assert read_editor_config(tmp_path / "jax") == read_editor_config(tmp_path / "disk" / "jax")
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"jax", "torch", "directory"}
    assert not list(tmp_path.glob(".*.partial"))
