"""A run of an editor on a mesh: the arguments of the loop (loop.py), made from a card."""

import bisect
import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from varedit_jax.config import RunConfig
from varedit_jax.errors import UserError
from varedit_jax.parallel.mesh import check_batch, put_batch, replicated
from varedit_jax.scales import Pyramid, editor_pyramid, image_size, nearest_aspect
from varedit_jax.training import editor_run, sharded
from varedit_jax.training.flops import run_flops
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.replay import EXAMPLE_IDS
from varedit_jax.training.report import Work
from varedit_jax.training.stages import Stages
from varedit_jax.training.state import TrainState
from varedit_jax.training.step import Batch, Metrics, Params
from varedit_jax.training.stop import poll


class MeshRun:
    """A card on a mesh. Nothing is computed before a method says so; call them under `jax.set_mesh(mesh)`."""

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        """Raises UserError for stages the pyramid does not have, for what does not divide over the mesh, and for a
        kernel of attention that cannot work on it."""
        self.config, self.mesh = config, mesh
        self.pyramid = editor_pyramid(config.model)
        if any(scales > self.pyramid.scales for _, scales in config.stages):
            raise UserError(
                f"stages={config.stages!r}, but the pyramid has {self.pyramid.scales} scales; lower the scales"
            )
        sharded.check_attention(config)
        check_batch(mesh, config.data.batch_size, config.optimizer.accumulation)
        self._optimizer = make_optimizer(config.optimizer, config.steps)
        self.abstract_state = sharded.abstract_state(config, self._optimizer, mesh)
        # Of each stage, the last of which is the whole pyramid: the step it ends before, and the scales it trains.
        self._ends = [*itertools.accumulate(steps for steps, _ in config.stages), config.steps]
        self._scales = [*(scales for _, scales in config.stages), self.pyramid.scales]
        self._work = functools.cache(
            lambda scales, pyramid: Work.of(run_flops(config, pyramid.first(scales), whole=pyramid), mesh.devices.flat)
        )
        self._evaluate = functools.cache(
            lambda pyramid: jax.jit(editor_run.make_evaluate(config, pyramid), out_shardings=replicated(mesh))
        )

    def load_frozen(self) -> Params:
        """The frozen weights on the mesh. Raises UserError as editor_run.load_frozen."""
        return editor_run.load_frozen(self.config, sharded.abstract_frozen(self.config, self.mesh))

    def init_state(self) -> TrainState:
        """The state of step 0, on the mesh. Raises UserError as editor_run.start."""
        return editor_run.start(self.config, self.abstract_state, editor_run.make_init(self.config, self._optimizer))

    def stages(self, frozen: Params) -> Stages:
        """The steps of every stage."""

        def step_of(scales: int, batch: Batch) -> Any:
            pyramid = self._pyramid_of(batch).first(scales)
            return sharded.sharded_step(self.config, pyramid, self._optimizer, self.mesh)

        return Stages(
            [(end, functools.partial(step_of, scales)) for end, scales in zip(self._ends, self._scales, strict=True)],
            frozen,
        )

    def _pyramid_of(self, batch: Batch) -> Pyramid:
        """The pyramid of a batch's pictures, or of features of such, which are all of one aspect."""
        pictures = "source" in batch
        height, width = batch["source" if pictures else "source_features"].shape[1:3]
        pyramid = editor_pyramid(self.config.model, nearest_aspect(height, width))
        if pictures and image_size(self.config.model, pyramid) != (height, width):
            raise ValueError(f"pictures of {height} x {width} pixels are of no pyramid of this model")
        return pyramid

    def work(self, step: int, batch: Batch) -> Work:
        """What an example of step `step` costs, in a batch of one aspect."""
        scales = self._scales[min(bisect.bisect_right(self._ends, step), len(self._scales) - 1)]
        return self._work(scales, self._pyramid_of(batch))

    def put(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """This process's part of a batch as arrays of the whole batch, without `example_ids`."""
        return put_batch(self.mesh, {name: value for name, value in batch.items() if name != EXAMPLE_IDS})

    def evaluate(
        self, state: TrainState, frozen: Params, batches: Iterable[Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Mean metrics of `batches`, this process's part of each. Stops between two of them if the run is to stop.

        Raises UserError if there is no batch.
        """
        metrics: list[Metrics] = []
        for batch in batches:
            poll()
            placed = self.put(batch)
            metrics.append(jax.device_get(self._evaluate(self._pyramid_of(placed))(state.params, frozen, placed)))
        if not metrics:
            why = f"no aspect has data.batch_size = {self.config.data.batch_size} held-out examples"
            why = why if self.config.eval_batches > 0 else f"eval_batches is {self.config.eval_batches}"
            raise UserError(f"there is nothing to evaluate on: {why}; set eval_every to 0 to do without")
        return jax.tree.map(lambda *values: np.mean(values, axis=0), *metrics)
