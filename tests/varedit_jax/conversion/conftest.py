"""Fixtures of the tests of conversion: small published state dicts, and files of them."""

import pathlib
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy

from varedit_jax.conversion import convert
from varedit_jax.conversion.writer import Planned, PthFile
from varedit_jax.weights.reader import StateDict, read_state_dict

DATA = pathlib.Path(__file__).parents[2] / "data"
GOLDEN = DATA / "golden" / "mini_a"


@pytest.fixture(scope="session")
def states() -> dict[str, StateDict]:
    """A transformer, a tokenizer, and a text encoder of another width, by part, in float32."""
    text = safetensors.numpy.load_file(DATA / "t5_encoder_heads.safetensors")
    found = {
        "transformer": read_state_dict(GOLDEN / "transformer.pth"),
        "tokenizer": {name.removeprefix("vae."): x for name, x in read_state_dict(GOLDEN / "vae.pth").items()},
        "text": {name: x for name, x in text.items() if name not in ("ids", "lengths", "features")},
    }
    return {
        part: {name: x if x.dtype.kind == "i" else np.asarray(x, np.float32) for name, x in state.items()}
        for part, state in found.items()
    }


@pytest.fixture(scope="session")
def write_pth() -> Callable[..., pathlib.Path]:
    """Writes a state dict as torch.save does: `(path, state, under="") -> path`."""

    def write(path: pathlib.Path, state: StateDict, under: str = "") -> pathlib.Path:
        file = PthFile(path, [Planned(name, x.shape, x.dtype) for name, x in state.items()], under)
        file.create()
        file.finish({name: file.write(name, x) for name, x in state.items()})
        return path

    return write


@pytest.fixture(scope="session")
def published() -> Callable[..., convert.Published]:
    """Returns a function that asks for the conversion of one file: `(part, path, **options)`."""

    def ask(part: str, path: pathlib.Path, **options: str) -> convert.Published:
        return convert.Published(files={part: str(path)}, family="varedit", pixel_budget="0.06M", **options)

    return ask
