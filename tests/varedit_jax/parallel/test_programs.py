"""Programs that are compiled before they are called."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varedit_jax.parallel.programs import Programs


def test_a_prepared_program_is_not_compiled_again() -> None:
    """`prepare` takes abstract arguments, in another thread; a call of these shapes does not trace anew."""
    threads: list[str] = []

    def add(x: jax.Array, y: dict[str, jax.Array]) -> jax.Array:
        threads.append(threading.current_thread().name)
        return x + y["b"]

    programs = Programs("add", jax.jit(add).lower)
    abstract = jax.ShapeDtypeStruct((2,), jnp.float32)
    thread = threading.Thread(target=programs.prepare, args=(abstract, {"b": abstract}), name="ahead")
    thread.start()
    ones = np.ones(2, np.float32)
    np.testing.assert_array_equal(programs(ones, {"b": 2 * ones}), 3 * ones)
    thread.join()
    np.testing.assert_array_equal(programs(jnp.asarray(ones), {"b": ones}), 2 * ones)
    assert len(threads) == 1
    np.testing.assert_array_equal(programs(np.ones(3, np.float32), {"b": np.zeros(3, np.float32)}), np.ones(3))
    assert len(threads) == 2 and threads[1] == "MainThread"


def test_a_failure_comes_up_when_called() -> None:
    def broken(x: jax.Array) -> jax.Array:
        raise ZeroDivisionError

    programs = Programs("broken", jax.jit(broken).lower)
    programs.prepare(np.ones(2, np.float32))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            programs(np.ones(2, np.float32))
