"""The table of chips."""

import types

import jax
import pytest

from varedit_jax.hardware import CHIPS, GIB, chip, chip_of, memory

# What JAX calls them: TPUs as libtpu's topologies v4:2x2x1, v5e:2x2, v5p:2x2x1, v6e:2x2 and tpu7x:2x2x1 do.
KINDS = {
    "TPU v4": ("TPU v4", 275),
    "TPU v5 lite": ("TPU v5e", 197),
    "TPU v5e": ("TPU v5e", 197),
    "TPU v5": ("TPU v5p", 459),
    "TPU v5p": ("TPU v5p", 459),
    "TPU v6 lite": ("TPU v6e", 918),
    "TPU7x": ("TPU7x", 2307),
    "NVIDIA A100-SXM4-40GB": ("A100 40 GB", 312),
    "NVIDIA A100 80GB PCIe": ("A100 80 GB", 312),
    "NVIDIA H100 80GB HBM3": ("H100", 989),
    "NVIDIA H100 PCIe": ("H100 PCIe", 756),
    "NVIDIA H200": ("H200", 989),
    "NVIDIA B200": ("B200", 2250),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    found = chip(kind)
    assert found is not None and (found.name, found.tflops) == KINDS[kind]


@pytest.mark.parametrize("kind", ["cpu", "", "TPU v4 lite", "TPU v3", "NVIDIA H20", "NVIDIA GB200", "NVIDIA A10"])
def test_what_is_not_known_is_none(kind):
    """A neighbor's peak would be worse than none."""
    assert chip(kind) is None


def test_every_row_is_reached():
    assert {found.name for kind in KINDS if (found := chip(kind))} | {"H100 NVL", "H200 NVL"} == {
        row.name for row in CHIPS.values()
    }


def test_a_device_can_be_half_a_chip():
    """TPU7x shows each core as a device; v5p both as one, unless megacore is off."""
    ironwood, v5p = chip("TPU7x", 1), chip("TPU v5", 2)
    assert (ironwood.devices, ironwood.device_hbm) == (2, int(94.75 * GIB))
    assert (v5p.devices, v5p.device_hbm) == (1, int(95.74 * GIB))
    half = chip_of(types.SimpleNamespace(device_kind="TPU v4", num_cores=1))
    assert (half.devices, half.device_hbm) == (2, int(15.25 * GIB))
    assert chip("TPU v5 lite", 1).devices == 1


def test_memory_is_that_of_the_fullest_device():
    devices = [
        types.SimpleNamespace(memory_stats=lambda used=used: {"bytes_in_use": used, "peak_bytes_in_use": 9 - used})
        for used in (3, 5)
    ]
    assert memory(devices) == {"in_use": 5, "peak": 6}
    assert memory(jax.local_devices()) == {}  # a CPU does not say
