"""Reads published state dicts without running code from a file, and without PyTorch.

A `.pth` file is a zip of a pickle and one raw file a tensor. The pickle is read by an unpickler that knows nothing but
the rebuilding of tensors, so a file that asks for anything else is refused.
"""

import collections
import os
import pathlib
import pickle
import zipfile
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from varedit_jax.errors import UserError

StateDict = dict[str, np.ndarray]

_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def read_state_dict(path: str | os.PathLike[str]) -> StateDict:
    """All tensors of a `.pth` or `.safetensors` file by name; nested dicts are joined by dots.

    Raises UserError for a missing or damaged file, an unknown suffix, and a pickle that asks for code to run.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        try:
            return safetensors.numpy.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or not a safetensors file: {error}") from error
    if path.suffix in (".pth", ".pt", ".bin"):
        return _read_pth(path)
    raise UserError(f"{path} ends in {path.suffix!r}; known are .pth, .pt, .bin and .safetensors")


class _Unpickler(pickle.Unpickler):
    """Rebuilds tensors from the raw files of the zip; refuses every other global."""

    def __init__(self, archive: zipfile.ZipFile, root: str, path: pathlib.Path) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self._archive, self._root, self._path = archive, root, path

    def find_class(self, module: str, name: str) -> Any:
        """The few names a state dict needs."""
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, requires_grad, hooks: data
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise UserError(
            f"{self._path} asks to run {module}.{name} when it is opened, which plain weights never do; it was not read"
        )

    def persistent_load(self, pid: Any) -> np.ndarray:
        """One storage, as a flat array."""
        kind, dtype, key, _, count = pid
        if kind != "storage":
            raise UserError(f"{self._path} refers to a {kind!r}; plain weights refer to storages only")
        data = np.frombuffer(self._archive.read(f"{self._root}/data/{key}"), dtype)
        if data.size != count:
            raise UserError(f"{self._path} is damaged: a tensor has {data.size} of {count} values")
        return data


def _rebuild_tensor(
    storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *unused: Any
) -> np.ndarray:
    """A view of a storage, bounds checked."""
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else offset - 1
    if offset < 0 or min(stride, default=0) < 0 or last >= storage.size:
        raise UserError(f"a tensor of shape {size} does not fit its storage of {storage.size} values")
    strides = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _read_pth(path: pathlib.Path) -> StateDict:
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise UserError(f"{path} is a zip file, but not one of weights: it holds no data.pkl")
            loaded = _Unpickler(archive, pickles[0].removesuffix("/data.pkl"), path).load()
    except UserError:
        raise
    except Exception as error:  # a damaged zip or pickle can end in nearly any of them
        raise UserError(
            f"{path} is damaged or not in the zip form that PyTorch has written since 1.6: {error}"
        ) from error
    tensors: StateDict = {}
    _flatten(loaded, "", tensors)
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    return tensors


def _flatten(value: Any, prefix: str, tensors: StateDict) -> None:
    if isinstance(value, np.ndarray):
        tensors[prefix] = value
    elif isinstance(value, dict):
        for name, item in value.items():
            _flatten(item, f"{prefix}.{name}" if prefix else str(name), tensors)
