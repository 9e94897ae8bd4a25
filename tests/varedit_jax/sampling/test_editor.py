"""`Editor`: images of any size in one call, loading from directories and runs, and what it says to a mistake."""

import contextlib
import dataclasses
import json
import pathlib
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.emulators import gs_bucket, gs_server
from varedit_jax import hardware
from varedit_jax.config import DataConfig, EditorConfig, RunConfig, SamplingConfig, TokenizerRunConfig, preset, to_dict
from varedit_jax.errors import UserError
from varedit_jax.parameters import abstract_params
from varedit_jax.sampling import pipeline
from varedit_jax.sampling.editor import Editor
from varedit_jax.sampling.sampler import Prefilled
from varedit_jax.scales import editor_pyramid
from varedit_jax.storage.paths import resolve
from varedit_jax.training.checkpoint import Checkpoints
from varedit_jax.training.run_config import write_config
from varedit_jax.training.state import TrainState
from varedit_jax.transformer.model import TextMemory
from varedit_jax.weights import names
from varedit_jax.weights.directory import PARTS, save_weights
from varedit_jax.weights.export_source import open_source

__all__ = ["gs_bucket", "gs_server"]

TINY = preset("tiny")
GREEDY = SamplingConfig(guidance=1.0, greedy=True)
ADD = "add a red circle"
REMOVE = "remove the square"


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def params(lively) -> dict[str, Any]:
    return {part: lively(abstract_params(TINY, part)) for part in PARTS}


@pytest.fixture(scope="module")
def tiny(params) -> Editor:
    return Editor(TINY, params, GREEDY)


# --- editing


def test_greedy_edits_are_equal_alone_and_batched_and_have_their_own_sizes(monkeypatch, quick_jit, tiny):
    monkeypatch.setattr(jax, "jit", quick_jit)
    images = [noise(16, 16), noise(40, 17, seed=1)]
    batched = tiny.edit(images, [ADD, REMOVE])
    assert [image.shape for image in batched] == [(16, 16, 3), (40, 17, 3)]
    assert all(image.dtype == np.uint8 for image in batched)
    for image, instruction, wanted in zip(images, [ADD, REMOVE], batched, strict=True):
        np.testing.assert_array_equal(tiny.edit([image], [instruction])[0], wanted)
    assert batched[0].std() > 5
    assert (tiny.edit([images[0]], [REMOVE])[0] != batched[0]).any()  # the instruction matters
    assert (tiny.edit([images[0] // 2], [ADD])[0] != batched[0]).any()  # and so does the image


class Call:
    """Stands for the compiled stages: remembers what they are given, and gives the images back."""

    def __init__(self) -> None:
        self.batches: list[tuple[tuple[int, ...], list[tuple[float, list[int], int]]]] = []

    def __call__(self, stage: pipeline.Stage, *arguments: Any) -> Any:
        if stage.name == "source":
            self.images = arguments[1]
            return self.images
        if stage.name == "text":
            self.ids, self.lengths = arguments[1:]
            return self.ids
        if stage.name == "prefill":
            mask = np.zeros(arguments[2].shape)
            return Prefilled(TextMemory(mask, mask, mask), None)
        if stage.name == "begin":
            return None
        if stage.name == "scale":
            if stage.scale == 0:
                self._remember(arguments[-1])
            return None, np.zeros((stage.batch,))
        return np.stack([np.zeros_like(self.images), self.images])

    def _remember(self, seeds: np.ndarray) -> None:
        rows = [
            (float(image.min()), row[:length].tolist(), int(seed))
            for image, row, length, seed in zip(self.images, self.ids, self.lengths, seeds, strict=True)
        ]
        self.batches.append((self.images.shape, rows))


def calls(monkeypatch) -> Call:
    """What stands for the stages from now on."""
    call = Call()
    monkeypatch.setattr(pipeline, "run", call)
    monkeypatch.setattr(pipeline, "compiling", lambda: contextlib.nullcontext(Call()))
    return call


def test_sizes_and_aspects_mix_in_one_call(monkeypatch, params):
    """One batch for each aspect; every image keeps its instruction, its seed and its place."""
    config = dataclasses.replace(TINY, grids=(), pixel_budget="0.06M")  # 16 x 16 tokens of 4 px, and other aspects
    editor, call = Editor(config, params), calls(monkeypatch)
    shapes = [(40, 40), (120, 60), (64, 64), (30, 60), (60, 30), (500, 500)]
    images = [np.full((*shape, 3), 10 * (index + 1), np.uint8) for index, shape in enumerate(shapes)]
    instructions = [f"make it {word}" for word in ("red", "blue", "green", "dark", "round", "small")]
    results = editor.edit(images, instructions, seeds=[7, 8, 9, 10, 11, 12])
    assert [result.shape[:2] for result in results] == shapes
    for result, image in zip(results, images, strict=True):
        np.testing.assert_array_equal(result, image)

    sizes = {shape[1:3]: {row[0] for row in rows} for shape, rows in call.batches}
    assert sizes == {(64, 64): {10.0, 30.0, 60.0}, (88, 44): {20.0, 50.0}, (44, 88): {40.0}}
    for _, rows in call.batches:
        for value, ids, seed in rows:
            index = round(value) // 10 - 1
            assert ids == editor.vocabulary.tokens(instructions[index])
            assert seed == 7 + index


def test_default_seeds_and_text_room(monkeypatch, params):
    """Seeds 0, 1, 2, ...; text is padded to 16 tokens, or to the next power of two that holds it."""
    wide = dataclasses.replace(TINY, transformer=dataclasses.replace(TINY.transformer, unconditional_rows=100))
    editor, call = Editor(wide, params), calls(monkeypatch)
    rooms = []
    for words in (1, 15, 16, 40, 99):
        editor.edit([noise(16, 16)] * 2, [" ".join(["red"] * words)] * 2)
        rooms.append((call.ids.shape[1], int(call.lengths.max()), [row[2] for row in call.batches[-1][1]]))
    assert rooms == [(16, 2, [0, 1]), (16, 16, [0, 1]), (32, 17, [0, 1]), (64, 41, [0, 1]), (100, 100, [0, 1])]


@pytest.mark.parametrize("images, most, wanted", [
    (1, 4, [1]), (2, 4, [2]), (3, 4, [4]), (4, 4, [4]), (7, 4, [4, 4]), (5, 4, [4, 1]), (3, 1, [1, 1, 1]), (6, 8, [8])
])  # fmt: skip
def test_batches_are_padded_and_split(monkeypatch, params, images, most, wanted):
    """Powers of two, the last image again as padding; at most `max_batch` at a time, each with its own seed."""
    editor, call = Editor(TINY, params, GREEDY, max_batch=most), calls(monkeypatch)
    results = editor.edit([np.full((16, 16, 3), index, np.uint8) for index in range(images)], [ADD] * images)
    assert [int(result[0, 0, 0]) for result in results] == list(range(images))
    assert [shape[0] for shape, _ in call.batches] == wanted
    seeds = [row[2] for _, rows in call.batches for row in rows]
    assert seeds[:images] == list(range(images)) if len(wanted) == 1 else set(seeds) == set(range(images))


def test_a_batch_is_what_there_is_memory_for(monkeypatch, params):
    editor, call = Editor(TINY, params, GREEDY), calls(monkeypatch)
    each = pipeline.image_bytes(TINY, editor_pyramid(TINY), guided=False)
    for free, wanted in ((0, 1), (each, 1), (3 * each, 2), (5 * each, 4), (1e15, 8)):
        monkeypatch.setattr(hardware, "free_memory", lambda device, free=free: int(free))
        call.batches.clear()
        editor.edit([noise(16, 16)] * 8, [ADD] * 8)
        assert {shape[0] for shape, _ in call.batches} == {wanted}


def test_no_images_give_no_images(tiny):
    assert tiny.edit([], []) == []


# --- mistakes in a call


@pytest.mark.parametrize("instruction, sentence", [
    ("", "the instruction '' is empty; say what to change in the image"),
    ("  \n", "is empty"),
    ("改变颜色", "only characters that the text encoder does not know; write it in English"),
    ("red " * 15 + "red", "17 tokens long, but at most 16 fit; shorten it"),
])  # fmt: skip
def test_instructions_that_cannot_be_used(monkeypatch, tiny, instruction, sentence):
    """They are refused before the first image is edited, wherever they stand."""
    monkeypatch.setattr(pipeline, "run", lambda *_: pytest.fail("edited"))
    with pytest.raises(UserError, match=sentence):
        tiny.edit([noise(16, 16), noise(40, 16)], [ADD, instruction])


@pytest.mark.parametrize("images, instructions, seeds", [(1, 2, None), (2, 1, None), (2, 2, 1)])
def test_lists_of_different_lengths(tiny, images, instructions, seeds):
    seeds = None if seeds is None else [0] * seeds
    sentence = f"{images} images, {instructions} instructions and .* seeds: give one of each"
    with pytest.raises(UserError, match=sentence):
        tiny.edit([noise(16, 16)] * images, [ADD] * instructions, seeds)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_out_of_range(tiny, seed):
    with pytest.raises(UserError, match=f"the seed {seed} cannot be used; give a whole number from 0 to 4294967295"):
        tiny.edit([noise(16, 16)], [ADD], [seed])


def test_guidance_of_more_scales_than_there_are(tiny):
    with pytest.raises(UserError, match=r"\(4.0, 3.0, 2.0, 1.0\) is not a list of 1 to 3 finite numbers"):
        tiny.edit([noise(16, 16)], [ADD], sampling=SamplingConfig(guidance=(4.0, 3.0, 2.0, 1.0)))


def test_images_that_cannot_be_read(tiny, tmp_path):
    with pytest.raises(UserError, match="there is no image .*none.png"):
        tiny.edit([noise(16, 16), tmp_path / "none.png"], [ADD, ADD])


# --- loading


def assert_same(editor: Editor, config: EditorConfig, params: Any) -> None:
    assert editor.config == config
    jax.tree.map(np.testing.assert_array_equal, editor.params, params)


@pytest.fixture(scope="module")
def directory(params, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("weights") / "tiny"
    save_weights(path, TINY, params, sampling=GREEDY)
    return path


def test_directory_of_weights(directory, params):
    for name in (directory, str(directory)):
        editor = Editor.load(name)
        assert_same(editor, TINY, params)
        assert editor.sampling == GREEDY


def run_of(directory: pathlib.Path, **changes: Any) -> RunConfig:
    data = DataConfig(text_tokens=16)
    return RunConfig(name="r", model=TINY, data=data, sampling=GREEDY, tokenizer_weights=str(directory), **changes)


def save_run(workdir: pathlib.Path, run: Any, params: Any) -> pathlib.Path:
    """The working directory of a run that has saved one checkpoint."""
    state = TrainState(
        step=jnp.int32(3), params=jax.tree.map(jnp.asarray, params), opt_state=optax.sgd(1e-3).init(params)
    )
    write_config(workdir, to_dict(run))
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(3, state, iter(grain.MapDataset.range(4).to_iter_dataset()))
    return workdir


@pytest.fixture(scope="module")
def run(directory, params, tmp_path_factory) -> pathlib.Path:
    trained = {part: params[part] for part in ("transformer", "text")}
    return save_run(tmp_path_factory.mktemp("run"), run_of(directory, train_text=True), trained)


def test_run_that_trained_its_text_encoder(run, params):
    editor = Editor.load(run)
    assert_same(editor, TINY, params)
    assert editor.sampling == GREEDY


def test_run_in_a_bucket(directory, gs_bucket, params):
    """Bit for bit; its frozen parts lie on this disk, or beside it."""
    trained = {part: params[part] for part in ("transformer", "text")}
    workdir = resolve(f"{gs_bucket}/run#1")
    save_run(workdir, run_of(directory, train_text=True), trained)
    assert_same(Editor.load(workdir), TINY, params)
    save_weights(f"{gs_bucket}/frozen", TINY, {"tokenizer": params["tokenizer"]})
    assert_same(Editor.load(str(workdir), tokenizer=f"{gs_bucket}/frozen"), TINY, params)
    source = open_source(workdir, ["text"])
    for path, leaf in source.open("text").items():
        np.testing.assert_array_equal(leaf.read(), names.flat(params["text"])[path])


def test_run_whose_frozen_parts_have_moved(directory, params, tmp_path):
    """Their new places can be given; otherwise the sentence names the old one."""
    config = dataclasses.replace(run_of(tmp_path / "old"), text_weights=str(tmp_path / "older"))
    workdir = save_run(tmp_path / "run", config, {"transformer": params["transformer"]})
    assert_same(Editor.load(workdir, tokenizer=str(directory), text=str(directory)), TINY, params)
    with pytest.raises(UserError, match=r"/old holds no tokenizer weights \(tokenizer.safetensors is missing\)"):
        Editor.load(workdir)
    with pytest.raises(UserError, match="/older holds no text weights"):
        Editor.load(workdir, tokenizer=str(directory))


def test_missing_directory(tmp_path):
    with pytest.raises(UserError, match="none is not .*has no config.json"):
        Editor.load(tmp_path / "none")


def test_foreign_directories(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(UserError, match="it has no config.json"):
        Editor.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 2048}))
    with pytest.raises(UserError, match="is a run of something else, not of an editor"):
        Editor.load(tmp_path)
    (tmp_path / "transformer.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="config.json does not describe an editor of this package"):
        Editor.load(tmp_path)


def test_run_of_a_tokenizer(tmp_path, params):
    config = TokenizerRunConfig(name="shapes_tokenizer", model=TINY)
    workdir = save_run(tmp_path / "run", config, params["tokenizer"])
    with pytest.raises(UserError, match="is a run of shapes_tokenizer, not of an editor"):
        Editor.load(workdir)


def test_directory_of_a_tokenizer_alone(tmp_path, params):
    save_weights(tmp_path / "tokenizer", TINY, {"tokenizer": params["tokenizer"]})
    with pytest.raises(UserError, match=r"holds no text weights \(text.safetensors is missing\)"):
        Editor.load(tmp_path / "tokenizer")


def test_weights_of_another_preset(tmp_path, params):
    """The first tensor that differs, with both shapes."""
    other = dataclasses.replace(TINY, transformer=dataclasses.replace(TINY.transformer, width=64))
    save_weights(tmp_path / "mixed", other, params)
    with pytest.raises(UserError, match=r"transformer.safetensors is of another model: .* shape .*32.*expected .*64"):
        Editor.load(tmp_path / "mixed")


def test_run_of_another_version(tmp_path, directory):
    values = to_dict(run_of(directory)) | {"magic": 1}
    write_config(tmp_path, values)
    with pytest.raises(UserError, match="does not describe a run of this version: RunConfig has no field 'magic'"):
        Editor.load(tmp_path)


def test_run_without_a_checkpoint(tmp_path, directory):
    write_config(tmp_path, to_dict(run_of(directory, train_text=True)))
    with pytest.raises(UserError, match="has no checkpoint yet"):
        Editor.load(tmp_path)
