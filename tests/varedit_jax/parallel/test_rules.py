"""Shardings of parameters: the table is complete for every model, and strict."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from varedit_jax.config import PRESETS, DataConfig, OptimizerConfig, RunConfig, preset
from varedit_jax.errors import UserError
from varedit_jax.parallel import rules
from varedit_jax.parallel.rules import check_rules, param_shardings, path_name, state_shardings
from varedit_jax.parameters import abstract_params
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.state import make_init

PARTS = ("tokenizer", "text", "transformer")


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))


def params_of(name: str) -> dict:
    return {part: abstract_params(preset(name), part) for part in PARTS}


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_of_every_preset_has_one_rule(name):
    params = params_of(name)
    check_rules(params)
    large, whole = 0, sum(leaf.size for leaf in jax.tree.leaves(params))
    sizes = {"fsdp": 16, "tensor": 4} if name != "tiny" else {"fsdp": 4, "tensor": 2}
    shardings = param_shardings(params, mesh(**sizes))
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
    ):
        if leaf.size > 0.005 * whole:
            large += leaf.size
            assert leaf.size >= sizes["fsdp"] * np.prod(sharding.shard_shape(leaf.shape)), path_name(path)
    assert large > 0.5 * whole


@pytest.mark.parametrize("sizes", [{"fsdp": 256}, {"data": 2, "fsdp": 64, "tensor": 4}, {"tensor": 28}])
def test_the_8b_divides_over_the_meshes_of_pods(sizes):
    """Bytes of a device come down with fsdp and tensor, to what cannot be split."""
    params = {"transformer": abstract_params(preset("8b"), "transformer")}
    shardings = param_shardings(params, mesh(**sizes))
    whole = sum(leaf.size for leaf in jax.tree.leaves(params))
    held = sum(
        int(np.prod(sharding.shard_shape(leaf.shape)))
        for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True)
    )
    shards = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    assert whole / shards <= held <= whole / shards + 0.02 * whole


def test_a_dimension_that_does_not_divide_is_named():
    params = {"transformer": abstract_params(preset("8b"), "transformer")}
    with pytest.raises(UserError, match=r"kv_kernel of shape .*: dimension H = 28 does not divide over tensor = 8"):
        param_shardings(params, mesh(tensor=8))
    with pytest.raises(UserError, match=r"dimension C = 3584 does not divide over fsdp = 48; choose a mesh.fsdp"):
        param_shardings(params, mesh(fsdp=48))


def test_the_state_lies_as_its_parameters_do():
    """Moments and EMA of a parameter are split as it is; counters are whole."""
    config = RunConfig(
        name="test", model=preset("tiny"), optimizer=OptimizerConfig(ema_decay=0.9), data=DataConfig(text_tokens=5)
    )
    state = jax.eval_shape(make_init(config, make_optimizer(config.optimizer, 10)))
    shardings = state_shardings(state, mesh(fsdp=2, tensor=2))
    found = {
        path_name(path): sharding.spec
        for path, sharding in jax.tree_util.tree_leaves_with_path(
            shardings, is_leaf=lambda leaf: isinstance(leaf, jax.sharding.Sharding)
        )
    }
    kernel = "transformer/blocks/mlp/fc1/kernel"
    of_kernel = {path: spec for path, spec in found.items() if path.endswith(kernel)}
    assert len(of_kernel) == 4  # params, two moments, ema
    assert set(of_kernel.values()) == {PartitionSpec(None, "fsdp", "tensor")}
    assert found["step"] == PartitionSpec()
    with pytest.raises(ValueError, match="other/thing of shape .* belongs to no parameter"):
        state_shardings(state.replace(opt_state={"other": {"thing": np.zeros((3, 3))}}), mesh(fsdp=2))


@pytest.mark.parametrize("algorithm", ["adamw", "muon"])
def test_the_state_of_every_optimizer_has_its_place(algorithm):
    """Every large array of it is split as its parameter is; coefficients are whole."""
    config = RunConfig(
        name="test",
        model=preset("tiny"),
        optimizer=OptimizerConfig(algorithm=algorithm),
        data=DataConfig(text_tokens=5),
        train_text=True,
    )
    state = jax.eval_shape(make_init(config, make_optimizer(config.optimizer, 10)))
    shardings = state_shardings(state, mesh(fsdp=2, tensor=2))
    held, whole = 0, 0
    for leaf, sharding in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(shardings.opt_state), strict=True):
        held += np.prod(sharding.shard_shape(leaf.shape))
        whole += leaf.size
    assert held < 0.6 * whole


def test_the_table_is_strict(monkeypatch):
    """A parameter without a rule, one with two, and a rule without a parameter: all are errors."""
    params = {"text": abstract_params(preset("tiny"), "text")}
    with pytest.raises(ValueError, match="0 rules .* match the parameter text/new"):
        check_rules({"text": {**params["text"], "new": jax.ShapeDtypeStruct((2,), np.float32)}})
    more = {**rules.RULES, "text": (*rules.RULES["text"], ("gone/kernel", "E"))}
    monkeypatch.setattr(rules, "RULES", more)
    with pytest.raises(ValueError, match="the rule gone/kernel of text .* matches no parameter"):
        check_rules(params)
    twice = {**rules.RULES, "text": (*rules.RULES["text"][:-1], ("embedding/.*", "V E"))}
    monkeypatch.setattr(rules, "RULES", twice)
    rules._axes_of.cache_clear()
    with pytest.raises(ValueError, match="2 rules .* match the parameter text/embedding/embedding"):
        check_rules(params)
    rules._axes_of.cache_clear()
