"""Accelerators: peak speed, memory and links, by the `device_kind` of JAX."""

import dataclasses
import re
from typing import Any

import psutil

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator as it is sold. Figures are the vendor's, for dense matmuls; MFU is relative to them."""

    name: str
    tflops: float  # peak of bfloat16 matmuls, 1e12 operations/s; a multiply-add is two
    hbm_bytes: int
    hbm_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s to other chips of the pod or node, both directions and all links together
    cores: int = 1  # tensor cores, which JAX may show as separate devices
    devices: int = 1  # JAX devices per chip
    usable_bytes: int = 0  # of hbm_bytes, those a program gets; 0 if not known
    clock: float = 0.0  # cycles/s of its cores; 0 if not known
    links: int = 1  # to neighbors in its pod

    @property
    def device_hbm(self) -> int:
        """Bytes of HBM that a program gets on one JAX device."""
        return (self.usable_bytes or self.hbm_bytes) // self.devices


def _tpu(
    name: str, tflops: float, gib: float, hbm: float, link: float, usable: float, ghz: float, links: int, **more: Any
) -> Chip:
    return Chip(
        name=name,
        clock=ghz * 1e9,
        links=links,
        tflops=tflops,
        hbm_bytes=int(gib * GIB),
        hbm_bandwidth=hbm * 1e9,
        link_bandwidth=link * 1e9,
        usable_bytes=int(usable * GIB),
        **more,
    )


def _gpu(name: str, tflops: float, gib: float, hbm: float, link: float) -> Chip:
    # Vendors print GB for GiB, of which the driver keeps a little.
    return Chip(
        name=name,
        tflops=tflops,
        hbm_bytes=int(gib * GIB),
        hbm_bandwidth=hbm * 1e9,
        link_bandwidth=link * 1e9,
    )


# Patterns of a whole `device_kind`. TPU kinds are those of libtpu's topologies; their usable memory is the limit that
# libtpu 0.0.42 states when a program is too large. Other figures: Cloud TPU's documentation of each version, NVIDIA's
# data sheets (half of the figures with sparsity). The link of v4 is six times 100 GB/s (arXiv 2304.01433), that of PCIe
# cards is PCIe. Clocks of v4 and v5e are published (there, and 1.5 GHz in "How to Scale Your Model"); others follow
# from the peak as theirs do: peak = matrix units x 2 x side^2 x clock. How many units are meant, the compiler tells,
# which estimates for a product of two 4096 x 4096 matrices 252 216 operations a cycle on v5p (eight of side 128),
# 126 898 on v5e (four of 128), 455 675 on v6e (four of 256, although two are documented) and 434 504 on a device of
# TPU7x (four of 256).
CHIPS: dict[str, Chip] = {
    r"TPU v4": _tpu("TPU v4", 275, 32, 1228, 600, 30.5, 1.05, 6, cores=2),
    r"TPU v5 ?(lite|e)": _tpu("TPU v5e", 197, 16, 819, 400, 15.75, 1.5, 4),
    r"TPU v5p?": _tpu("TPU v5p", 459, 95, 2765, 1200, 95.74, 1.75, 6, cores=2),
    r"TPU v6 ?(lite|e)": _tpu("TPU v6e", 918, 32, 1640, 800, 31.25, 1.75, 4),
    r"TPU ?(v7x?|7x)": _tpu("TPU7x", 2307, 192, 7380, 1200, 189.5, 2.2, 6, cores=2, devices=2),
    r"NVIDIA A100.*40GB.*": _gpu("A100 40 GB", 312, 40, 1555, 600),
    r"NVIDIA A100.*80GB.*": _gpu("A100 80 GB", 312, 80, 2039, 600),
    r"NVIDIA H100 PCIe": _gpu("H100 PCIe", 756, 80, 2000, 128),
    r"NVIDIA H100 NVL": _gpu("H100 NVL", 835, 94, 3900, 600),
    r"NVIDIA H100( 80GB HBM3)?": _gpu("H100", 989, 80, 3350, 900),
    r"NVIDIA H200 NVL": _gpu("H200 NVL", 835, 141, 4800, 900),
    r"NVIDIA H200": _gpu("H200", 989, 141, 4800, 900),
    r"NVIDIA B200": _gpu("B200", 2250, 180, 7700, 1800),
}


def chip(device_kind: str, num_cores: int | None = None) -> Chip | None:
    """The chip of a JAX `device_kind`; None for a CPU and for kinds that are not in the table.

    num_cores: of `device.num_cores`, where the backend has it: a v4 or v5p chip without megacore is two devices.
    """
    for pattern, found in CHIPS.items():
        if re.fullmatch(pattern, device_kind):
            if num_cores and found.cores > 1:
                return dataclasses.replace(found, devices=max(found.cores // num_cores, 1))
            return found
    return None


def chip_of(device: Any) -> Chip | None:
    """The chip that a JAX device is, or is a core of."""
    return chip(device.device_kind, getattr(device, "num_cores", None))


def memory(devices: list[Any]) -> dict[str, int]:
    """Most bytes that any of these local devices holds (`in_use`), and has held (`peak`).

    Empty where the backend does not report them, as on a CPU.
    """
    stats = [device.memory_stats() or {} for device in devices]
    names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use"}
    return {
        name: max(entry[key] for entry in stats)
        for name, key in names.items()
        if stats and all(key in entry for entry in stats)
    }


def free_memory(device: Any) -> int:
    """Bytes that a device has left, or the machine where the backend does not say, as on a CPU."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats["bytes_in_use"])
    return int(psutil.virtual_memory().available)
