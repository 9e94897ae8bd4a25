"""A profile of a few steps."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from varedit_jax.errors import UserError
from varedit_jax.training.profile import PROFILE, Profiler, parse_steps


@jax.jit
def function(x: jax.Array) -> jax.Array:
    with jax.named_scope("encode"):
        x = jnp.sin(x @ x)
    with jax.named_scope("optimizer"):
        return x + 1


def traces(workdir: pathlib.Path) -> list[bytes]:
    return [path.read_bytes() for path in (workdir / PROFILE).rglob("*.xplane.pb")]


def test_a_trace_has_the_named_regions(tmp_path):
    """One trace of the requested steps; a run that resumes inside the range traces the rest of it."""
    x = function(jnp.ones((64, 64)))
    for start, directory in ((0, "new"), (3, "resumed")):
        profiler = Profiler(tmp_path / directory, 2, 4)
        for step in range(start, 7):
            profiler.step(step, x)
            assert bool(traces(tmp_path / directory)) == (step >= 4), "the trace is written when step 4 begins"
            x = function(x)
        profiler.close(x)
        (trace,) = traces(tmp_path / directory)
        for region in (b"encode", b"optimizer"):
            assert b"jit(function)/" + region in trace


def test_a_run_that_ends_early_leaves_its_trace(tmp_path):
    x = jnp.ones((64, 64))
    profiler = Profiler(tmp_path, 0, 100)
    profiler.step(0)
    x = function(x)
    profiler.close(x)
    profiler.close(x)
    assert len(traces(tmp_path)) == 1
    profiler.step(1)  # once is enough
    profiler.close()
    assert len(traces(tmp_path)) == 1


def test_nothing_is_traced_unasked(tmp_path):
    profiler = Profiler(tmp_path, *parse_steps(""))
    for step in range(3):
        profiler.step(step)
    profiler.close()
    assert not list(tmp_path.iterdir())


def test_steps_as_users_write_them():
    assert parse_steps("10:13") == (10, 13)
    assert parse_steps(" 0 : 1 ") == (0, 1)
    for text in ("10", "10-13", "13:10", "5:5", "a:b", "-1:4", "1:2:3", "1,2"):
        with pytest.raises(UserError, match=re.escape(f"--profile_steps is {text!r}; give the first step and the one")):
            parse_steps(text)


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / PROFILE).touch()
    with pytest.raises(UserError, match=r"/profile is a file, where a directory should be"):
        Profiler(tmp_path, 0, 1).step(0)
