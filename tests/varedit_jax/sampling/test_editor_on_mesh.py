"""Editing on meshes of several devices equals editing on one, for any number of images."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.varedit_jax.training.test_compile_step import MODEL, lively
from varedit_jax.config import MeshConfig, SamplingConfig
from varedit_jax.parallel.mesh import make_mesh
from varedit_jax.parallel.rules import param_shardings
from varedit_jax.parameters import abstract_params
from varedit_jax.sampling.editor import Editor

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]

MESHES = {"one": {}, "fsdp": {"fsdp": 4}, "tensor": {"fsdp": 2, "tensor": 2}}
FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
IMAGES = 3
SAMPLING = SamplingConfig(
    guidance=(3.0, 3.0, 1.0), temperature=0.7
)  # the unconditional half ends before the last scale


def edited(sizes: dict[str, int]) -> np.ndarray:
    """Returns the images after each scale, uint8 [K, n, y, x, 3]; the program is prepared with abstract parameters."""
    devices = jax.devices()[: int(np.prod([*sizes.values()]))]
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), devices)
    abstract = {part: abstract_params(MODEL, part) for part in ("transformer", "text", "tokenizer")}
    places = param_shardings(abstract, mesh)
    side = MODEL.grids[-1][0] * MODEL.token_stride
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, side, side, 3), np.uint8)
    request = images, ["add", "remove a", "red red"], [5, 6, 7]
    with jax.set_mesh(mesh):
        described = jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), abstract, places)
        ahead, editor = (
            Editor(MODEL, described, SAMPLING),
            Editor(MODEL, jax.device_put(lively(abstract), places), SAMPLING),
        )
        ahead.vocabulary = editor.vocabulary = Words()
        ahead.prepare(*request, every_scale=True)
        return editor.edit_fitted(*request, every_scale=True)


class Words:
    """A vocabulary as small as the model's."""

    def encode(self, instructions: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids that do not depend on the texts."""
        ids = np.random.default_rng(1).integers(1, 24, (len(instructions), length)).astype(np.int32)
        return ids, np.array([3, 5, 9], np.int32)

    def check_instruction(self, instruction: str, length: int) -> None:
        """Accepts everything."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Images of every mesh, from a process that has four devices."""
    path = tmp_path_factory.mktemp("edited") / "images.npz"
    environment = {**os.environ, "XLA_FLAGS": FLAGS, "PYTHONPATH": str(pathlib.Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, __file__, str(path)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return dict(np.load(path))


@pytest.mark.parametrize("name", [name for name in MESHES if name != "one"])
def test_sharded_equals_unsharded(results, name):
    """Images that do not divide over the devices are filled up, and come back without the filling."""
    assert results["one"].shape[:2] == (len(MODEL.grids), IMAGES)
    np.testing.assert_allclose(results[name].astype(int), results["one"].astype(int), atol=1)  # of 255, by rounding
    assert len({image.tobytes() for image in results["one"][-1]}) == IMAGES


if __name__ == "__main__":
    np.savez(sys.argv[1], **{_name: edited(_sizes) for _name, _sizes in MESHES.items()})
