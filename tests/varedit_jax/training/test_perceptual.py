"""The perceptual distance against plain numpy convolutions, on a narrow network with VGG-16's names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from varedit_jax.errors import UserError
from varedit_jax.training.perceptual import load_perceptual

LAYERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))  # torchvision's vgg16().features
WIDTHS = (3, 4, 5, 4, 6)
SIDE = 32


def narrow_vgg(bias: float = 0.1) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    state, channels = {}, 3
    for stage, width in zip(LAYERS, WIDTHS, strict=True):
        for index in stage:
            kernel = draw.normal(size=(width, channels, 3, 3)) * (2 / (9 * channels)) ** 0.5
            state[f"features.{index}.weight"] = kernel.astype(np.float32)
            state[f"features.{index}.bias"] = np.full(width, bias, np.float32)
            channels = width
    return state


def slow_stages(state: dict[str, np.ndarray], image: np.ndarray) -> list[np.ndarray]:
    """Unit-length features of one image [y, x, 3] after each stage, float64 [y', x', channels]."""
    x = ((image.astype(np.float64) + 1) / 2 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    x, stages = x.transpose(2, 0, 1), []
    for number, stage in enumerate(LAYERS):
        if number:
            x = np.maximum.reduce([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)])
        for index in stage:
            windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1))), (3, 3), (1, 2))
            x = np.einsum("cyxij,dcij->dyx", windows, state[f"features.{index}.weight"].astype(np.float64))
            x = np.maximum(x + state[f"features.{index}.bias"][:, None, None], 0)
        stages.append(x / np.sqrt((x**2).sum(0) + 1e-10))
    return stages


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Two batches of two images in [-1, 1]."""
    return np.random.default_rng(1).uniform(-1, 1, (2, 2, SIDE, SIDE, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def load(tmp_path_factory, quick_jit):
    """Makes the compiled distance, with its gradient by the first argument, of a network."""

    def make(state: dict[str, np.ndarray]):
        path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
        safetensors.numpy.save_file(state, path)
        return quick_jit(jax.value_and_grad(load_perceptual(path)))

    return make


@pytest.fixture(scope="module")
def distance(load):
    return load(narrow_vgg())


def test_equals_plain_numpy(distance, images):
    state = narrow_vgg()
    expected = np.mean(
        [
            [((a - b) ** 2).sum(0).mean() for a, b in zip(slow_stages(state, x), slow_stages(state, y), strict=True)]
            for x, y in zip(*images, strict=True)
        ]
    )
    found, _ = distance(*images)
    assert found.shape == () and expected > 0.01
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_is_a_distance(distance, images):
    forth, gradient = distance(*images)
    back, _ = distance(*images[::-1])
    assert float(forth) == pytest.approx(float(back), rel=1e-6)
    assert float(jnp.abs(gradient).max()) > 0
    same, gradient = distance(images[0], images[0])
    assert float(same) == 0
    assert not np.asarray(gradient).any()


def test_dead_features_give_no_nan(load, images):
    """If all units are zero the feature has no direction; the distance is 0 and its gradient finite."""
    found, gradient = load(narrow_vgg(bias=-1e3))(*images)
    assert float(found) == 0
    assert bool(jnp.isfinite(gradient).all())


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="perceptual_weights names no file; give VGG-16 weights or weight 0"):
        load_perceptual("")
    with pytest.raises(UserError, match="nowhere.pth does not exist"):
        load_perceptual(tmp_path / "nowhere.pth")
    other = narrow_vgg()
    del other["features.17.bias"]
    path = tmp_path / "other.safetensors"
    safetensors.numpy.save_file(other, path)
    with pytest.raises(UserError, match=r"other.safetensors has no tensor features.17.bias; .* VGG-16"):
        load_perceptual(path)
