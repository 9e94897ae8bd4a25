"""Compiled programs are kept in the user's cache directory, unless something else is asked for."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]
PROGRAM = """
import jax, jax.numpy as jnp
from varedit_jax.parallel import compilation_cache

jax.block_until_ready(jax.jit(jnp.tanh)(jnp.ones(3)))  # opens the cache, if there is one
compilation_cache._LEAST_SECONDS = 0
compilation_cache.keep_programs()
jax.block_until_ready(jax.jit(jnp.sin)(jnp.ones(3)))
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.subprocess
@pytest.mark.parametrize("settings, wanted", [
    ({"XDG_CACHE_HOME": "{tmp}/caches"}, "{tmp}/caches/varedit_jax/compiled"),
    ({"HOME": "{tmp}"}, "{tmp}/.cache/varedit_jax/compiled"),
    ({"XDG_CACHE_HOME": "{tmp}/caches", "VAREDIT_CACHE": "{tmp}/own"}, "{tmp}/own/compiled"),
    ({"VAREDIT_CACHE": ""}, ""),
    ({"VAREDIT_CACHE": "{tmp}/own", "JAX_COMPILATION_CACHE_DIR": "{tmp}/jax"}, "{tmp}/jax"),
])  # fmt: skip
def test_the_directory(settings: dict[str, str], wanted: str, tmp_path: pathlib.Path) -> None:
    """And a program is there that was compiled after it was set."""
    left = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    left |= {name: value.format(tmp=tmp_path) for name, value in settings.items()} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=left, capture_output=True, text=True, check=True)
    wanted = wanted.format(tmp=tmp_path)
    assert done.stdout.strip() == (wanted or "None")
    kept = [path.name for path in tmp_path.rglob("*-cache")]
    assert any("sin" in name for name in kept) == (wanted.endswith("compiled"))
