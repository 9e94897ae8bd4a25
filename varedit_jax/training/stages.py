"""The steps of a run that trains in stages (`RunConfig.stages`)."""

import bisect
import concurrent.futures
import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import jax

from varedit_jax.training.loop import Metrics, StepFn
from varedit_jax.training.state import TrainState


class Stages:
    """A compiled step for every stage; those of later stages are compiled while the first one to run trains.

    A context manager: leaving it gives up compilations that have not begun.
    """

    def __init__(self, steps: Sequence[tuple[int, Any]], frozen: Any) -> None:
        """Nothing is compiled before the first step is called.

        Args:
          steps: for each stage the number of the step it ends before, increasing, and the function
            (state, frozen, batch, key) -> (state, metrics), from jax.jit. States and batches of all have the same
            shapes.
          frozen: what every step gets beside the state, as parameters that are not trained.
        """
        self._ends = [end for end, _ in steps]
        self._steps = [step for _, step in steps]
        self._frozen = frozen
        self._functions = [self._function(stage) for stage in range(len(steps))]
        self._compiled: dict[int, concurrent.futures.Future[Any]] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="compile")

    def __enter__(self) -> "Stages":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def step(self, number: int) -> StepFn:
        """The function of step `number`, counted from 0: the same object for all steps of a stage."""
        return self._functions[bisect.bisect_right(self._ends, number)]

    def _function(self, stage: int) -> StepFn:
        def run(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, Metrics]:
            ready = self._compiled.get(stage)
            if ready:
                return ready.result()(state, self._frozen, batch, key)
            arguments = (state, self._frozen, batch, key)
            result = self._steps[stage](*arguments)
            if not self._compiled and stage + 1 < len(self._steps):
                shapes = jax.tree.map(_abstract, (result[0], *arguments[1:]))
                mesh = jax.sharding.get_mesh()  # which each thread has its own of
                for later in range(stage + 1, len(self._steps)):
                    self._compiled[later] = self._pool.submit(self._compile, later, shapes, mesh)
            return result

        return run

    def _compile(self, stage: int, shapes: tuple[Any, ...], mesh: jax.sharding.Mesh) -> Any:
        with contextlib.nullcontext() if mesh.empty else jax.set_mesh(mesh):
            return self._steps[stage].lower(*shapes).compile()


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
