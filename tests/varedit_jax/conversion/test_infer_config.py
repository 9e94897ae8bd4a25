"""Configurations read off files: names, shapes and types of every published size, and what is in a file's name."""

import json
import pathlib

import pytest

from varedit_jax.config import preset
from varedit_jax.conversion import convert, infer_config
from varedit_jax.parameters import abstract_params
from varedit_jax.weights import names

DATA = pathlib.Path(__file__).parents[2] / "data"


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
    config = infer_config.editor_config({part: shapes}, "0.25M", "released")
    assert getattr(config, part) == getattr(preset(size), part)
    assert config.patchify == preset(size).patchify
    matched = names.match(part, shapes, abstract_params(config, part))
    assert {link.name for link in matched} == set(published)


@pytest.mark.parametrize("size", ["125m", "350m", "700m", "2.2b", "4.5b", "8.5b", "20b"])
def test_other_sizes_convert_by_shape(size: str) -> None:
    """Both ways: the names of a size give its configuration again, and a place for each."""
    config = preset(size)
    shapes = {m.link.name: m.link.shape for m in convert.mapping_of(config, ["transformer"])}
    assert infer_config.transformer_config(shapes, "released") == config.transformer
    links = names.match("transformer", shapes, abstract_params(config, "transformer"))
    assert [link.name for link in links] == list(shapes)


@pytest.mark.parametrize(
    ("path", "budget"),
    [
        ("VAREdit/8B-1024.pth", "1M"),
        ("VAREdit-2B-256.pth", "0.06M"),
        ("infinity_8b_512x512_weights", "0.25M"),
        ("varedit_512px/weights.pth", "0.25M"),
        ("run1024/step.512000/256_to_512.pth", ""),
    ],
)
def test_names_of_files_tell_the_size_of_images(path: str, budget: str) -> None:
    assert infer_config.pixel_budget_of(path) == budget
