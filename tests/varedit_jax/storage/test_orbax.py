"""Checkpoints of Orbax on every kind of storage."""

import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from varedit_jax.errors import UserError
from varedit_jax.storage import orbax


@pytest.mark.parametrize("name", ["plain", "run#1", "50%20off", "what?", "a|b", "a b"])
def test_saved_is_restored(directory: pathlib.Path, name: str) -> None:
    path = directory / name / "state"
    with orbax.checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.StandardSave({"w": jnp.arange(6.0)}))
    with orbax.checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(path, args=ocp.args.StandardRestore({"w": jnp.zeros(6)}))
    np.testing.assert_array_equal(restored["w"], np.arange(6.0))


def test_a_directory_that_orbax_takes_for_a_pattern_is_refused(directory: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"has a \[ in its name, and checkpoints there could not be read"):
        orbax.check_directory(directory / "runs [v2]" / "8b")
    orbax.check_directory(directory / "runs (v2)")


@pytest.mark.subprocess
def test_orbax_says_nothing_on_the_screen() -> None:
    """Not even when a handler is made, ahead of its use; with logging as in a program."""
    code = """
import sys
from absl import app
def main(argv):
    import orbax.checkpoint as ocp
    from varedit_jax.storage.orbax import checkpointer
    checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)).close()
app.run(main)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "pytree_checkpoint_handler" not in done.stderr
