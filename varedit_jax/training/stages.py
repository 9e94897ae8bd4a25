"""The steps of a run that trains in stages (`RunConfig.stages`)."""

import bisect
import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax

from varedit_jax.parallel.programs import Programs
from varedit_jax.training.state import StepFn, TrainState
from varedit_jax.types import Batch, Metrics


class Stages:
    """A compiled step for every stage and every shape of a batch.

    Steps of later stages are compiled for the first batch's shape while the first stage trains, as is what else the run
    will need; all others on first use. A context manager: leaving it cancels compilations that have not begun.
    """

    def __init__(
        self,
        steps: Sequence[tuple[int, Callable[[Batch], Any]]],
        frozen: Any,
        later: Sequence[Callable[[], object]] = (),
        alike: Callable[[Batch], Sequence[Batch]] = lambda batch: (),
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        """Compiles nothing before the first step is called.

        Args:
          steps: for each stage the number of the step it ends before, increasing, and a function that returns the step
            for the shapes of a batch: (state, frozen, batch, key) -> (state, metrics), from jax.jit. All stages have
            states of the same shapes.
          frozen: frozen parameters, an argument of every step.
          later: called one after the other in the thread that compiles, once the first step runs: compilations that
            the run will need before it needs those of later stages.
          alike: from a batch, abstract ones of the other shapes that batches of the run may have: a stage's steps for
            them are compiled ahead, too.
          mesh: that the steps are compiled on, if there is one.
        """
        self._ends = [end for end, _ in steps]
        self._programs = [
            Programs(f"step of stage {stage}", _lower(step_of), mesh) for stage, (_, step_of) in enumerate(steps)
        ]
        self._frozen, self._later, self._alike = frozen, later, alike
        self._functions = [self._function(stage) for stage in range(len(steps))]
        self._begun = False
        self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="compile")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def stage(self, number: int) -> int:
        """Returns the number of the stage that step `number`, counted from 0, belongs to."""
        return bisect.bisect_right(self._ends, number)

    def step(self, number: int) -> StepFn:
        """Returns the function of step `number`, counted from 0."""
        return self._functions[self.stage(number)]

    def _function(self, stage: int) -> StepFn:
        def run(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
            result = self._programs[stage](state, self._frozen, batch, key)
            if not self._begun:
                self._begun = True
                self._compile_ahead(stage, (result[0], self._frozen, batch, key))
            return result

        return run

    def _compile_ahead(self, stage: int, arguments: tuple[Any, ...]) -> None:
        """Has the thread compile what the run will need after its first step, in the order in which it may come."""
        state, frozen, batch, key = jax.tree.map(_abstract, arguments)
        others = self._alike(batch)

        def submit(programs: Programs, batches: Sequence[Batch]) -> None:
            for other in batches:
                programs.prepare(state, frozen, other, key, pool=self._pool)

        submit(self._programs[stage], others)
        for compile_it in self._later:
            self._pool.submit(compile_it)
        for programs in self._programs[stage + 1 :]:
            submit(programs, (batch, *others))


def _lower(step_of: Callable[[Batch], Any]) -> Callable[..., jax.stages.Lowered]:
    """Returns a function that lowers the step which `step_of` returns for the batch among its arguments."""
    return lambda state, frozen, batch, key: step_of(batch).lower(state, frozen, batch, key)


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


@dataclasses.dataclass(frozen=True)
class SingleStage:
    """The stages of a run that has one."""

    function: StepFn  # of every step

    def stage(self, number: int) -> int:
        """Returns 0, the only stage."""
        del number
        return 0

    def step(self, number: int) -> StepFn:
        """Returns the function of every step."""
        del number
        return self.function
