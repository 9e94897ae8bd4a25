"""A function's compiled programs, which may be compiled before they are needed, in another thread."""

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable
from typing import Any

import jax

from varedit_jax.parallel.compiler_options import options_explained
from varedit_jax.parallel.processes import wait_for_all


class Programs:
    """A function with a program for each set of shapes, compiled by `prepare` or on first use.

    All processes of a run call it for the same shapes in the same order.
    """

    def __init__(
        self, name: str, lower: Callable[..., jax.stages.Lowered], mesh: jax.sharding.Mesh | None = None
    ) -> None:
        """Compiles nothing yet.

        Args:
          name: of the function, for messages.
          lower: lowers the function for its arguments, which may be abstract: `lower` of what jax.jit returns, or a
            function that makes it for their shapes.
          mesh: that its programs are compiled on; each thread has its own, so that of the caller would be missing.
        """
        self._name, self._lower, self._mesh = name, lower, mesh
        self._programs: dict[Any, concurrent.futures.Future[Any]] = {}
        self._lock = threading.Lock()
        self._called: set[Any] = set()

    def prepare(self, *arguments: Any, pool: concurrent.futures.Executor | None = None) -> None:
        """Compiles the program of arguments of these shapes, which may be abstract; a failure comes up when called.

        With `pool` it returns at once, and the program is compiled there.
        """
        self._prepare(shapes_of(arguments), arguments, pool)

    def _prepare(
        self, shapes: Any, arguments: tuple[Any, ...], pool: concurrent.futures.Executor | None = None
    ) -> None:
        with self._lock:
            if shapes in self._programs:
                return
            if pool is not None:
                self._programs[shapes] = pool.submit(self._compile, arguments)
                return
            program = self._programs[shapes] = concurrent.futures.Future()
        try:
            program.set_result(self._compile(arguments))
        except BaseException as error:
            program.set_exception(error)

    def has(self, *arguments: Any) -> bool:
        """Returns True if the program of arguments of these shapes is compiled, or being so."""
        return shapes_of(arguments) in self._programs

    def compiled(self, *arguments: Any) -> jax.stages.Compiled:
        """Returns the program of such arguments. Waits for one that is being compiled, and raises its failure."""
        return self._compiled(shapes_of(arguments), arguments)

    def _compiled(self, shapes: Any, arguments: tuple[Any, ...]) -> jax.stages.Compiled:
        self._prepare(shapes, arguments)
        program: jax.stages.Compiled = self._programs[shapes].result()
        return program

    def _compile(self, arguments: tuple[Any, ...]) -> jax.stages.Compiled:
        mesh = self._mesh or jax.sharding.get_mesh()
        with contextlib.nullcontext() if mesh.empty else jax.set_mesh(mesh), options_explained():
            return self._lower(*arguments).compile()

    def __call__(self, *arguments: Any) -> Any:
        """Returns what the function returns. Waits for a program that is being compiled.

        Raises UserError for an option that the compiler does not take.
        """
        shapes = shapes_of(arguments)  # once: it walks all parameters
        program = self._compiled(shapes, arguments)
        if shapes not in self._called:
            wait_for_all(self._name)  # others may still compile, and a collective does not wait for long
            self._called.add(shapes)
        return program(*arguments)


def shapes_of(arguments: Any) -> Any:
    """A key of the structure, the shapes and the types of arguments, which may be abstract."""
    leaves, structure = jax.tree.flatten(arguments)
    return structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
