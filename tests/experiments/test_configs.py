"""Every experiment config traces: abstract shapes go through its complete training step, nothing is allocated."""

import dataclasses
import importlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from experiments import configs as package
from experiments.configs import published
from varedit_jax.config import RunConfig, TokenizerRunConfig, per_scale
from varedit_jax.parallel import topology
from varedit_jax.parallel.mesh import check_batch, mesh_sizes
from varedit_jax.parallel.rules import param_shardings
from varedit_jax.parameters import abstract_params
from varedit_jax.scales import editor_pyramid, image_size
from varedit_jax.training import tokenizer_step
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.state import make_init
from varedit_jax.training.step import make_step
from varedit_jax.weights.native import load_part

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
DIRECTORY = pathlib.Path(package.__file__).parent
MODULES = {
    path.stem: importlib.import_module(f"experiments.configs.{path.stem}")
    for path in sorted(DIRECTORY.glob("*.py"))
    if path.stem != "__init__"
}
CONFIGS = [
    (name, variant)
    for name, module in MODULES.items()
    if hasattr(module, "get_config")
    for variant in getattr(module, "VARIANTS", ("",))
    if variant not in published.MACHINES  # the same run, laid out for a machine
]


def load(name: str, variant: str) -> RunConfig | TokenizerRunConfig:
    return MODULES[name].get_config(*[variant] if variant else [])


def described(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def batch_of(config: RunConfig | TokenizerRunConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the loader's batches for a config."""
    pyramid, batch = editor_pyramid(config.model), config.data.batch_size
    text = {
        "text_ids": described((batch, config.data.text_tokens), jnp.int32),
        "text_length": described((batch,), jnp.int32),
    }
    if config.data.features == "precomputed":
        shape = (batch, *pyramid.cells(config.model.patchify).last, config.model.tokenizer.bits)
        return text | {f"{side}_features": described(shape, jnp.float32) for side in ("source", "target")}
    shape = (batch, *image_size(config.model, pyramid), 3)
    return text | {side: described(shape, jnp.uint8) for side in ("source", "target")}


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize(("name", "variant"), CONFIGS)
def test_training_step_of_every_config(name: str, variant: str) -> None:
    """Loss and gradient norm are scalars, every scale has its metric, and the state keeps its structure."""
    config = load(name, variant)
    optimizer = make_optimizer(config.optimizer, config.steps)
    batch, key = batch_of(config), jax.eval_shape(lambda: jax.random.key(0))
    if isinstance(config, RunConfig):
        pyramid = editor_pyramid(config.model)
        state = jax.eval_shape(make_init(config, optimizer))
        parts = ["tokenizer", *([] if config.train_text else ["text"])]
        frozen = {part: abstract_params(config.model, part) for part in parts}
        after, metrics = jax.eval_shape(make_step(config, pyramid, optimizer), state, frozen, batch, key)
        per_scale(config.sampling.guidance, pyramid.scales)  # raises where its sampling does not fit
        per_scale(config.sampling.temperature, pyramid.scales)
    else:
        state = jax.eval_shape(tokenizer_step.make_init(config, optimizer))
        after, metrics = jax.eval_shape(tokenizer_step.make_step(config, optimizer), state, batch, key)
    assert shapes_of(after) == shapes_of(state)
    for number in ("loss", "gradient_norm"):
        assert (metrics[number].shape, metrics[number].dtype) == ((), jnp.float32)
    scales = editor_pyramid(config.model).scales
    assert {value.shape for value in metrics.values()} == {(), (scales,)}


@pytest.mark.parametrize("name", published.LAYOUTS)
def test_layouts_on_machines(name: str) -> None:
    """Every machine has a layout that fills it; batch and parameters divide, and nothing else changes."""
    base = load(name, "")
    assert set(published.LAYOUTS[name]) == set(published.MACHINES) <= set(MODULES[name].VARIANTS)
    for machine, about in published.MACHINES.items():
        run = load(name, machine)
        if about.topology:
            assert about.chips == topology.chips(about.topology)
        sizes = mesh_sizes(run.mesh, about.chips)
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        check_batch(mesh, run.data.batch_size, run.optimizer.accumulation)
        param_shardings({part: abstract_params(base.model, part) for part in ("transformer", "text")}, mesh)
        ours, kept = base.model.transformer, run.model.transformer
        transformer = dataclasses.replace(kept, remat=ours.remat, remat_saved=ours.remat_saved)
        model = dataclasses.replace(run.model, transformer=transformer)
        optimizer = dataclasses.replace(run.optimizer, accumulation=1)
        assert run.cadence.sample_every == base.cadence.sample_every * published.LAYOUTS[name][machine].samples
        run = dataclasses.replace(run, cadence=base.cadence)
        assert dataclasses.replace(run, model=model, optimizer=optimizer, mesh=base.mesh) == base


@pytest.mark.parametrize(("name", "variant"), CONFIGS)
def test_weights_that_a_config_ships_with_fit_it(name: str, variant: str) -> None:
    config = load(name, variant)
    directories = {config.init_from if isinstance(config, TokenizerRunConfig) else config.tokenizer_weights} - {""}
    for directory in directories:
        expected = abstract_params(config.model, "tokenizer")
        loaded = load_part(ROOT / directory, "tokenizer", expected)
        assert shapes_of(loaded) == shapes_of(expected)


def test_every_file_is_a_config_or_serves_one() -> None:
    """New configs are tested without being listed here; a file that defines no config must be imported by one."""
    names = {name for name, _ in CONFIGS}
    assert {"shapes", *published.LAYOUTS} <= names
    for other in set(MODULES) - names:
        assert any(f"configs import {other}" in (DIRECTORY / f"{name}.py").read_text() for name in names), other


@pytest.mark.parametrize(("name", "variant"), CONFIGS)
def test_names_of_runs_tell_configs_apart(name: str, variant: str) -> None:
    runs = [load(*other).name for other in CONFIGS]
    assert runs.count(load(name, variant).name) == 1


@pytest.mark.parametrize("name", sorted(published.LAYOUTS))
def test_checkpoints_on_the_disk_are_bounded(name: str) -> None:
    """Those that are kept forever fall on saves, and are few."""
    run = load(name, "")
    assert run.cadence.keep_every % run.cadence.save_every == 0
    assert 1 < run.steps // run.cadence.keep_every <= published.KEPT
