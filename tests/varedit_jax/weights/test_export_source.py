"""Weights of ours to export: what a run holds, its EMA included."""

import dataclasses
import pathlib
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from varedit_jax.config import DataConfig, OptimizerConfig, RunConfig, preset, to_dict
from varedit_jax.conversion import convert
from varedit_jax.errors import UserError
from varedit_jax.parameters import abstract_params
from varedit_jax.training.checkpoint import Checkpoints
from varedit_jax.training.run_config import write_config
from varedit_jax.training.state import TrainState
from varedit_jax.weights import names
from varedit_jax.weights.export_source import open_source

RUN = RunConfig(
    name="test", model=preset("tiny"), data=DataConfig(text_tokens=5), optimizer=OptimizerConfig(ema_decay=0.9)
)


def saved(directory: pathlib.Path, run: RunConfig, params: Any, ema: Any) -> pathlib.Path:
    """The directory of a run with one checkpoint."""
    write_config(directory, to_dict(run))
    iterator = iter(grain.MapDataset.range(8).to_iter_dataset())
    with Checkpoints(directory) as checkpoints:
        state = TrainState(step=jnp.int32(3), params=params, opt_state={"count": jnp.int32(3)}, ema=ema)
        checkpoints.save(3, state, iterator)
    return directory


def test_a_run_gives_its_parameters_or_their_ema(tmp_path: pathlib.Path, lively: Any) -> None:
    params = {"transformer": jax.device_put(lively(abstract_params(RUN.model, "transformer")))}
    ema = jax.tree.map(lambda x: x + 1, params)
    directory = saved(tmp_path / "run", RUN, params, ema)
    for weights, wanted in (("model", params), ("ema", ema)):
        convert.to_directory(open_source(directory, weights=weights), tmp_path / weights, "float32", quiet=True)
        found = safetensors.numpy.load_file(tmp_path / weights / "transformer.safetensors")
        assert found.keys() == names.flat(wanted["transformer"]).keys()
        for path, value in names.flat(wanted["transformer"]).items():
            np.testing.assert_array_equal(found[path], value)


def test_an_ema_that_nobody_kept_is_one_sentence(tmp_path: pathlib.Path, lively: Any) -> None:
    """By the run's configuration, or because the checkpoint is older than the switch; a directory never has one."""
    params = {"transformer": jax.device_put(lively(abstract_params(RUN.model, "transformer")))}
    without = dataclasses.replace(RUN, optimizer=OptimizerConfig())
    with pytest.raises(UserError, match="holds no EMA of its parameters; only a run with optimizer.ema_decay"):
        open_source(saved(tmp_path / "without", without, params, None), weights="ema")
    source = open_source(saved(tmp_path / "before", RUN, params, None), weights="ema")
    with pytest.raises(UserError, match="holds no EMA of its transformer"):
        source.open("transformer")
    convert.to_directory(open_source(tmp_path / "without"), tmp_path / "directory", "float32", quiet=True)
    with pytest.raises(UserError, match="holds no EMA of its parameters"):
        open_source(tmp_path / "directory", weights="ema")
