"""Options of the compiler: by chip, changed by a run; every one is known to the compiler they are for."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding

from varedit_jax.errors import UserError
from varedit_jax.parallel.compiler_options import CHIP_OPTIONS, compiler_options, options_explained
from varedit_jax.parallel.topology import topology_devices


@pytest.fixture(autouse=True)
def no_cache():
    """Programs for other machines cannot be loaded from the compilation cache."""
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # or it stays as it was at its first use
    yield
    jax.config.update("jax_enable_compilation_cache", kept)
    compilation_cache.reset_cache()


V6E = types.SimpleNamespace(device_kind="TPU v6 lite")
VMEM = "xla_tpu_scoped_vmem_limit_kib"


def test_options_are_those_of_the_chip_changed_by_the_run():
    assert compiler_options(V6E) == CHIP_OPTIONS["TPU v6e"]
    found = compiler_options(V6E, (f"{VMEM}=65536", "xla_enable_async_all_gather=", "xla_a=true", "xla_b=some"))
    assert (found.pop(VMEM), found.pop("xla_a"), found.pop("xla_b")) == (65536, True, "some")
    left_out = {VMEM, "xla_enable_async_all_gather"}
    assert found == {name: value for name, value in CHIP_OPTIONS["TPU v6e"].items() if name not in left_out}
    assert compiler_options(jax.devices()[0]) == {}


@pytest.mark.parametrize("entry", ["xla_a", "=true", "--xla_a=true"])
def test_another_form_is_an_error(entry):
    with pytest.raises(UserError, match=rf"compiler_options has '{entry}'; give NAME=VALUE"):
        compiler_options(V6E, (entry,))


@pytest.mark.parametrize("chip", CHIP_OPTIONS)
def test_the_compiler_knows_every_option(chip):
    """Those of GPUs are options of XLA that the compiler for CPUs reads, too."""
    device = topology_devices("v5e:2x2")[0] if chip.startswith("TPU") else jax.devices()[0]
    argument = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=SingleDeviceSharding(device))
    jax.jit(lambda x: x + 1, compiler_options=CHIP_OPTIONS[chip]).lower(argument).compile()


@pytest.mark.parametrize(
    "name, value", [("xla_tpu_unheard_of", True), (VMEM, "many"), ("xla_tpu_enable_async_collective_fusion", 3)]
)
def test_an_option_that_the_compiler_does_not_take_is_a_sentence(name, value):
    argument = jax.ShapeDtypeStruct(
        (8, 128), jnp.float32, sharding=SingleDeviceSharding(topology_devices("v5e:2x2")[0])
    )
    with (
        pytest.raises(UserError, match=rf"does not take the option {name} \(.*leave it out by --config"),
        options_explained(),
    ):
        jax.jit(lambda x: x + 1, compiler_options={name: value}).lower(argument).compile()
