"""Fixtures of the tests of the model code: parameters without a compiled `init`, and a quick compiler."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def quick_jit() -> Callable[..., Any]:
    """`jax.jit` with LLVM's optimizations off: a third of the compile time, for functions that run a few times."""
    return functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="session")
def lively() -> Callable[..., Any]:
    """Makes parameters of an abstract tree in which nothing is zero or one: `(abstract, seed) -> float32 arrays`.

    What `init` sets to zero (biases, modulation) could otherwise hide a path through the network.
    """

    def make(abstract: Any, seed: int = 0) -> Any:
        draw = np.random.default_rng(seed)

        def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
            name = path[-1].key
            around = 1.0 if name in ("scale", "scale_mul") else 0.0
            deviation = leaf.shape[-2] ** -0.5 if name == "kernel" and len(leaf.shape) > 1 else 0.2
            return (around + deviation * draw.normal(size=leaf.shape)).astype(np.float32)

        return jax.tree_util.tree_map_with_path(fill, abstract)

    return make
