"""Perceptual distance of the tokenizer's loss: unit-normalized VGG-16 features (LPIPS, arXiv 1801.03924, equation 1).

The user gives a file of weights with torchvision's names; without one the loss has no perceptual term.
"""

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from varedit_jax.errors import UserError
from varedit_jax.weights.reader import read_state_dict

# Convolutions of torchvision's `vgg16().features`, one list per resolution; features are compared after each list.
_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


def load_perceptual(path: str | os.PathLike[str]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns the distance of two image batches, float32 [B, y, x, 3] in [-1, 1]: a mean over positions and stages.

    Args:
      path: VGG-16 weights (.pth or .safetensors) with names `features.{i}.weight` and `.bias`.

    Raises:
      UserError: if the file is missing, damaged or of another network.
    """
    if not os.fspath(path):
        raise UserError(
            "perceptual_weight is set, but perceptual_weights names no file; give VGG-16 weights or weight 0"
        )
    state = read_state_dict(path)
    layers: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for index in (index for stage in _STAGES for index in stage):
        names = f"features.{index}.weight", f"features.{index}.bias"
        for name in names:
            if name not in state:
                raise UserError(f"{path} has no tensor {name}; it must hold the features of VGG-16")
        layers[index] = (
            np.asarray(state[names[0]], np.float32).transpose(2, 3, 1, 0),
            np.asarray(state[names[1]], np.float32),
        )

    def features(images: jax.Array) -> list[jax.Array]:
        x = ((images + 1) / 2 - _MEAN[None, None, None]) / _DEVIATION[None, None, None]
        stages = []
        for number, stage in enumerate(_STAGES):
            if number:
                x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            for index in stage:
                kernel, bias = map(jnp.asarray, layers[index])
                dimensions = ("NHWC", "HWIO", "NHWC")
                x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)
                x = jax.nn.relu(x + bias[None, None, None])
            stages.append(x)
        return stages

    def unit(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-10)

    def distance(output: jax.Array, target: jax.Array) -> jax.Array:
        pairs = zip(features(output), features(target), strict=True)
        stages = [jnp.mean(jnp.sum(jnp.square(unit(a) - unit(b)), axis=-1)) for a, b in pairs]
        return jnp.mean(jnp.stack(stages))

    return distance
