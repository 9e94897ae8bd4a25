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
        ("runs/0.06M-8K.pth", "0.06M"),
        ("1M-60K.pth", "1M"),
        ("0.25M-512K.pth", "0.25M"),
        ("0.60M-1024/model.safetensors", ""),
        ("varedit_2b_0.60M/ar-ckpt-giter120K-ep1-iter256-last.pth", "0.60M"),
        ("512-0.25M.pth", "0.25M"),
        ("1M-512.pth", ""),
        ("10.06M.pth", ""),
        ("infinity_125M_256x256.pth", "0.06M"),
        ("11M-steps.pth", ""),
        ("global_step_512.pth", ""),
        ("1024/checkpoint-256.pth", "1M"),
    ],
)
def test_names_of_files_tell_the_size_of_images(path: str, budget: str) -> None:
    assert infer_config.pixel_budget_of(path) == budget


def test_settings_in_a_checkpoint_tell_the_size_of_images() -> None:
    assert infer_config.stated_pixel_budget({"args.pn": "0.60M", "args.model": "1M"}) == "0.60M"
    assert infer_config.stated_pixel_budget({"args.pn": "0.40M"}) == ""
    assert infer_config.stated_pixel_budget({"pn": "1M"}) == ""
