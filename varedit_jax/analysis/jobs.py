"""What is compiled ahead of time: a program of a run, for machines that need not be there."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from varedit_jax import hardware
from varedit_jax.config import RunConfig, from_dict, to_dict
from varedit_jax.errors import UserError
from varedit_jax.parallel.compiler_options import jit_everywhere
from varedit_jax.parallel.constrain import batch_only
from varedit_jax.parallel.mesh import make_mesh, replicated, whole_batch
from varedit_jax.parallel.topology import topology_devices
from varedit_jax.sampling import sampler
from varedit_jax.sampling.guidance import Controls, controls, guided_scales
from varedit_jax.scales import Pyramid, editor_pyramid, image_size
from varedit_jax.training.compile_step import (
    abstract_arguments,
    abstract_frozen,
    abstract_state,
    check_attention,
    sharded_step,
)
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.setup import jitted_evaluation
from varedit_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A TPU topology that a step is compiled for."""

    topology: str  # as in "v5p:4x4x4"
    slices: int = 1
    hbm_gib: float = 0.0  # limit on a program's memory per chip; 0: that of the chip
    stand_in_for: str = ""  # the JAX `device_kind` of a GPU that the chips stand in for

    @functools.cached_property
    def devices(self) -> list[Any]:
        """Its JAX devices, on which nothing can run. Raises UserError as `topology_devices`."""
        return topology_devices(self.topology, self.slices)

    @property
    def chip(self) -> hardware.Chip:
        """The accelerator."""
        found = hardware.chip_of(self.devices[0])
        if found is None:
            raise UserError(f"topology {self.topology!r}: varedit_jax/hardware.py does not know its chip")
        return found

    @property
    def gpu(self) -> hardware.Chip | None:
        """What the chips stand in for. Raises UserError for a GPU that varedit_jax/hardware.py does not know."""
        found = hardware.chip(self.stand_in_for)
        if self.stand_in_for and not (found and self.stand_in_for.startswith("NVIDIA")):
            raise UserError(
                f"--stand_in_for={self.stand_in_for}: varedit_jax/hardware.py knows no such GPU; give JAX's name of "
                "one, such as 'NVIDIA H100 80GB HBM3'"
            )
        return found

    @property
    def hbm_bytes(self) -> int:
        """HBM that a program gets on one device."""
        return int(self.hbm_gib * hardware.GIB) if self.hbm_gib else self.chip.device_hbm


@dataclasses.dataclass(frozen=True)
class Job:
    """A program of a run to compile."""

    what: str  # step, evaluation, sampling
    config: RunConfig
    target: Target
    images: int = 0  # of a sheet

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The mesh. Raises UserError as `make_mesh`."""
        return make_mesh(self.config.mesh, self.target.devices)

    @functools.cached_property
    def function_and_arguments(self) -> tuple[Any, tuple[Any, ...]]:
        """The jitted function and its abstract arguments. Raises UserError for a batch or kernel that do not fit."""
        config, mesh, pyramid = self.config, self.mesh, editor_pyramid(self.config.model)
        optimizer = make_optimizer(config.optimizer, config.steps)
        with jax.set_mesh(mesh):
            check_attention(config)
        if self.what == "sampling":
            params = abstract_frozen(config, mesh) | abstract_state(config, optimizer, mesh).params
            return _jitted_edit(config, pyramid, mesh, self.images, params)
        arguments = abstract_arguments(config, pyramid, optimizer, mesh)
        if self.what == "evaluation":
            state, frozen, batch, _ = arguments
            return jitted_evaluation(config, pyramid, mesh), (state.params, frozen, batch)
        return sharded_step(config, pyramid, optimizer, mesh), arguments

    def lower(self) -> Any:
        """Traces the program; `compile` of what it returns compiles it."""
        function, arguments = self.function_and_arguments
        with jax.set_mesh(self.mesh):
            return function.lower(*arguments)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "what": self.what,
            "config": to_dict(self.config),
            "target": dataclasses.asdict(self.target),
            "images": self.images,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Job":
        """The job of `to_dict`."""
        config, target = from_dict(RunConfig, values["config"]), Target(**values["target"])
        return cls(values["what"], config, target, values["images"])


def _jitted_edit(
    config: RunConfig, pyramid: Pyramid, mesh: Mesh, images: int, params: Params
) -> tuple[Any, tuple[Any, ...]]:
    """A whole edit as one program, and its abstract arguments for so many images."""
    batch = whole_batch(mesh, images)
    sampling = [config.sampling] * batch
    guided = guided_scales(sampling, pyramid.scales)

    def edit(
        params: Params, images: jax.Array, ids_BT: jax.Array, length_B: jax.Array, seeds_B: jax.Array, choices: Controls
    ) -> jax.Array:
        images, ids_BT, length_B, seeds_B = map(batch_only, (images, ids_BT, length_B, seeds_B))
        request = params, images, ids_BT, length_B, jax.vmap(jax.random.key)(seeds_B), choices
        return sampler.edit(
            *request,
            config=config.model,
            pyramid=pyramid,
            guided_scales=guided,
            editing=config.editing,
            every_scale=True,
        )

    request = (
        np.zeros((batch, *image_size(config.model, pyramid), 3), np.uint8),
        np.zeros((batch, config.data.text_tokens), np.int32),
        np.zeros((batch,), np.int32),
        np.zeros((batch,), np.uint32),
        controls(sampling, pyramid.scales),
    )
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), request)
    return jit_everywhere(edit, mesh.devices.flat[0], out_shardings=replicated(mesh)), (params, *abstract)
