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
from varedit_jax.parallel.mesh import make_mesh
from varedit_jax.parallel.rules import param_shardings, with_shardings
from varedit_jax.parallel.topology import topology_devices
from varedit_jax.parameters import stored_params
from varedit_jax.sampling import pipeline
from varedit_jax.sampling.pipeline import Program, Stage
from varedit_jax.scales import editor_pyramid, image_size
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
from varedit_jax.weights.directory import PARTS


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

    what: str  # step, evaluation, sampling (a stage of it, beside the run), edit (with weights that are not trained)
    config: RunConfig
    target: Target
    images: int = 0  # that are edited together
    stage: str = ""  # of sampling and edit: `Stage.title`
    quantized: bool = False  # edit: with matrices in int8

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The mesh. Raises UserError as `make_mesh`."""
        return make_mesh(self.config.mesh, self.target.devices)

    @functools.cached_property
    def function_and_arguments(self) -> tuple[Any, tuple[Any, ...]]:
        """The jitted function and its abstract arguments. Raises UserError for a batch or kernel that do not fit."""
        config, mesh, pyramid = self.config, self.mesh, editor_pyramid(self.config.model)
        if self.what in ("sampling", "edit"):
            _, program, arguments = self.stages[self.stage]
            return program, arguments
        optimizer = make_optimizer(config.optimizer, config.steps)
        with jax.set_mesh(mesh):
            check_attention(config)
        arguments = abstract_arguments(config, pyramid, optimizer, mesh)
        if self.what == "evaluation":
            state, frozen, batch, _ = arguments
            return jitted_evaluation(config, pyramid, mesh), (state.params, frozen, batch)
        return sharded_step(config, pyramid, optimizer, mesh), arguments

    @functools.cached_property
    def editor_params(self) -> Params:
        """The abstract parameters of all parts: of a run between two steps, or as they are kept where none trains."""
        config, mesh = self.config, self.mesh
        if self.what == "sampling":
            optimizer = make_optimizer(config.optimizer, config.steps)
            return abstract_frozen(config, mesh) | abstract_state(config, optimizer, mesh).params
        params = {part: stored_params(config.model, part, config.text_dtype, self.quantized) for part in PARTS}
        return with_shardings(params, param_shardings(params, mesh))

    @functools.cached_property
    def stages(self) -> dict[str, tuple[Stage, Program, tuple[Any, ...]]]:
        """The stages of an edit by title, each with its program and abstract arguments. Raises UserError as above."""
        config, mesh, pyramid = self.config, self.mesh, editor_pyramid(self.config.model)
        found: dict[str, tuple[Stage, Program, tuple[Any, ...]]] = {}

        def run(stage: Stage, *arguments: Any) -> Any:
            found[stage.title] = stage, pipeline.program(stage), arguments
            return found[stage.title][1].results(*arguments)

        tokens = pipeline.text_bucket(config.data.text_tokens, config.model.transformer.unconditional_rows)
        request = (
            np.zeros((self.images, *image_size(config.model, pyramid), 3), np.uint8),
            np.zeros((self.images, tokens), np.int32),
            np.ones((self.images,), np.int32),
            range(self.images),
            [config.sampling] * self.images,
        )
        with jax.set_mesh(mesh):
            check_attention(config)
            # A sheet shows the image after every scale.
            pipeline.edit(
                run, self.editor_params, *request, config.model, config.editing, pyramid, self.what == "sampling"
            )
        return found

    def at(self, title: str) -> "Job":
        """The same job at another stage of an edit, without tracing all of them again."""
        job = dataclasses.replace(self, stage=title)
        vars(job).update({name: getattr(self, name) for name in ("mesh", "editor_params", "stages")})
        return job

    @property
    def largest_stages(self) -> list[str]:
        """Titles of the stages of which one needs the most memory.

        The last scale has the most tokens; a scale whose unconditional half is dropped copies the other half. Other
        scales write in the place of what they are given. The tokenizer's encoder needs less than its decoder, and the
        text encoder less than the transformer does.
        """
        stages = [stage for stage, _, _ in self.stages.values()]
        return [x.title for x in stages if x.name in ("prefill", "decode") or (x.name == "scale" and x.again)]

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
            "stage": self.stage,
            "quantized": self.quantized,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Job":
        """The job of `to_dict`."""
        config, target = from_dict(RunConfig, values["config"]), Target(**values["target"])
        return cls(values["what"], config, target, values["images"], values["stage"], values["quantized"])
