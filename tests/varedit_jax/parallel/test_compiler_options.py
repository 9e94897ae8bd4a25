"""Options of the compiler: by chip, changed by a run; every one is known to the compiler they are for."""

import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding

from varedit_jax.errors import UserError
from varedit_jax.parallel import compiler_options as compiler_options_lib
from varedit_jax.parallel.compiler_options import (
    CHIP_OPTIONS,
    compiler_options,
    jit_everywhere,
    options_everywhere,
    options_explained,
)
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
    assert compiler_options(types.SimpleNamespace(device_kind="a new one", platform="tpu")) == {}


def test_options_of_cpus_are_for_any_program_and_may_be_left_out():
    cpu = jax.devices()[0]
    assert compiler_options(cpu) == options_everywhere(cpu) == CHIP_OPTIONS["CPU"]
    assert compiler_options(cpu, tuple(f"{name}=" for name in CHIP_OPTIONS["CPU"])) == {}
    assert options_everywhere(V6E) == {}


@pytest.mark.subprocess
def test_options_of_cpus_are_found_on_a_mesh_too():
    """The first call of a run is made where its mesh is set."""
    code = """
import jax
from varedit_jax.parallel.compiler_options import CHIP_OPTIONS, options_everywhere
with jax.set_mesh(jax.make_mesh((4,), ("fsdp",))):
    assert options_everywhere(jax.devices()[0]) == CHIP_OPTIONS["CPU"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "JAX_NUM_CPU_DEVICES": "4"})


def test_an_option_that_another_jaxlib_may_not_know_is_left_out(monkeypatch):
    known = dict(CHIP_OPTIONS["CPU"])
    monkeypatch.setitem(CHIP_OPTIONS, "CPU", {"xla_cpu_unheard_of": "A", **dict.fromkeys(known, "UNHEARD_OF")})
    compiler_options_lib._known_on_cpus.cache_clear()
    assert options_everywhere(jax.devices()[0]) == {}
    monkeypatch.setitem(CHIP_OPTIONS, "CPU", {"xla_cpu_unheard_of": "A", **known})
    compiler_options_lib._known_on_cpus.cache_clear()
    assert options_everywhere(jax.devices()[0]) == known
    compiler_options_lib._known_on_cpus.cache_clear()


def test_sums_behind_small_matmuls_are_right_on_cpus():
    """With jaxlib 0.10.2 and without the option they are 0.2 to 0.8 % too small (jax-ml/jax issue 39103)."""
    rows_L3 = np.zeros((32769, 3), np.float32)
    rows_L3[:, 0] = np.arange(len(rows_L3))

    def squares(rows_L3):
        return jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))(rows_L3)

    found = jax.jit(squares, compiler_options=options_everywhere(jax.devices()[0]))(rows_L3)
    np.testing.assert_array_equal(found, rows_L3[:, 0] ** 2)


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


def test_any_program_has_the_options_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_options_lib, "_known_on_cpus", lambda: {"xla_not_known": True})
    of_cpus, others = (
        jit_everywhere(jnp.negative, types.SimpleNamespace(platform=platform)) for platform in ("cpu", "tpu")
    )
    assert others(1.0) == -1.0
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_not_known"):
        of_cpus(1.0)
