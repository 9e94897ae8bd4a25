"""Reads `.pth` files without running code from them, without PyTorch, and one tensor at a time.

Such a file is a zip of a pickle and one raw file a tensor. The unpickler knows nothing but the rebuilding of tensors:
of everything else that a pickle names, it makes a placeholder that does nothing. Tensors are views of a memory map.
"""

import collections
import json
import mmap
import pathlib
import pickle
import re
import shlex
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from varedit_jax.errors import UserError
from varedit_jax.storage import disk

STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
ZIP = b"PK\x03\x04"  # first bytes of a zip
_BEFORE_ZIP = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # first bytes of what PyTorch wrote before 1.6


class LazyTensor(NamedTuple):
    """A tensor of a file, not yet read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]  # a read-only view of the file
    start: int | None = None  # its first byte in the file, where it lies there whole and in C order


class Placeholder:
    """Stands for a class or function of a pickle that is not known, and for what it would make; it does nothing."""

    origin = ""  # module and name
    is_model = False  # has the state of a torch.nn.Module
    items: dict[Any, Any]  # if it stands for a dict of another class

    def __new__(cls, *values: Any, **options: Any) -> "Placeholder":
        """Returns an instance, whatever the arguments."""
        made = object.__new__(cls)
        made.items = {}
        return made

    def __call__(self, *values: Any) -> "Placeholder":
        """Returns itself: what a pickle would call is not called."""
        return self

    def __setstate__(self, state: Any) -> None:
        """Passes over the attributes."""
        self.is_model = isinstance(state, dict) and "_modules" in state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Keeps an item of a dict."""
        self.items[key] = value

    def append(self, value: Any) -> None:
        """Passes over a value."""

    def extend(self, values: Any) -> None:
        """Passes over values."""

    def add(self, value: Any) -> None:
        """Passes over a value."""


Unknown = Placeholder | type[Placeholder]


class Contents(NamedTuple):
    """The contents of a file, by names joined by dots. Numbers and other plain values are passed over."""

    tensors: dict[str, LazyTensor]
    texts: dict[str, str]  # strings, as a trainer's settings have them
    unknown: dict[str, Unknown]  # values of classes that only running code could make


def map_file(path: pathlib.Path) -> mmap.mmap:
    """Returns a read-only memory map of a local file."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def view(mapped: mmap.mmap, dtype: np.dtype, shape: tuple[int, ...], start: int) -> Callable[[], np.ndarray]:
    """Returns a function that returns the array at byte `start` of a map, as a view of it."""
    count = int(np.prod(shape, dtype=np.int64))
    return lambda: np.frombuffer(mapped, dtype, count, start).reshape(shape) if count else np.empty(shape, dtype)


def _save_alone(path: pathlib.Path, place: str = "") -> str:
    """Returns the command that saves what torch.load gives, or what is at `place` of it, to a file of weights alone.

    `place` is Python, such as `["model"].state_dict()`.
    """
    loaded = f'torch.load({json.dumps(str(path))}, map_location="cpu", weights_only=False)'
    code = f'import torch; torch.save({loaded}{place}, "weights.pth")'
    return f"python -c {shlex.quote(code)}"


class _Storage(NamedTuple):
    """The raw file of a tensor."""

    dtype: np.dtype
    size: int
    load: Callable[[], np.ndarray]  # flat


class _Unpickler(pickle.Unpickler):
    """Describes the tensors of the zip; every other class is a placeholder."""

    def __init__(self, archive: zipfile.ZipFile, root: str, path: pathlib.Path, mapped: mmap.mmap) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self._archive, self._root, self._path, self._mapped = archive, root, path, mapped

    def find_class(self, module: str, name: str) -> Any:
        """The few names that a state dict needs; a placeholder for any other."""
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        return type("Placeholder", (Placeholder,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> _Storage | Placeholder:
        """One storage, not yet read; a placeholder if it is of an unknown type."""
        kind, storage_type, key, _, count = pid
        if kind != "storage":
            raise UserError(f"{self._path} refers to a {kind!r}; plain weights refer to storages only")
        if _is_placeholder(storage_type):
            return storage_type()
        dtype, info = np.dtype(storage_type), self._archive.getinfo(f"{self._root}/data/{key}")
        if info.file_size != count * dtype.itemsize:
            raise UserError(
                f"{self._path} is damaged: a tensor has {info.file_size // dtype.itemsize} of {count} values"
            )
        if info.compress_type != zipfile.ZIP_STORED:  # PyTorch stores; who repacks the file may compress
            return _Storage(dtype, count, lambda: np.frombuffer(self._inflated(info), dtype))
        start = self._data_start(info)
        return _Storage(dtype, count, view(self._mapped, dtype, (count,), start))

    def _inflated(self, info: zipfile.ZipInfo) -> bytes:
        try:
            return self._archive.read(info)
        except Exception as error:  # as for the file as a whole
            if disk.is_machine_error(error):
                raise
            raise UserError(f"{self._path} is damaged: {info.filename} cannot be read ({error})") from error

    def _data_start(self, info: zipfile.ZipInfo) -> int:
        """Offset of an entry's bytes, behind its local header, whose length the central directory does not give."""
        header = self._mapped[info.header_offset : info.header_offset + 30]
        name_length, extra_length = struct.unpack_from("<HH", header, 26)
        start = info.header_offset + 30 + name_length + extra_length
        if header[:4] != ZIP or start + info.file_size > len(self._mapped):
            raise UserError(f"{self._path} is damaged: {info.filename} lies outside of the file")
        return start


def _is_placeholder(value: Any) -> bool:
    return isinstance(value, Placeholder) or (isinstance(value, type) and issubclass(value, Placeholder))


def _rebuild_tensor(
    storage: _Storage | Placeholder, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *unused: Any
) -> LazyTensor | Placeholder:
    """A view of a storage, bounds checked."""
    if isinstance(storage, Placeholder):
        return storage
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else offset - 1
    if offset < 0 or min(size, default=0) < 0 or min(stride, default=0) < 0 or last >= storage.size:
        raise UserError(f"a tensor of shape {size} does not fit its storage of {storage.size} values")
    strides = tuple(step * storage.dtype.itemsize for step in stride)
    return LazyTensor(
        tuple(size),
        storage.dtype,
        lambda: np.lib.stride_tricks.as_strided(storage.load()[offset:], size, strides, writeable=False),
    )


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *unused: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *unused: data,
    # With a class of one's own, or attributes; `rebuild` is one of these functions, or a placeholder.
    ("torch._tensor", "_rebuild_from_type_v2"): lambda rebuild, kind, values, state: rebuild(*values),
}


def open_pth(path: pathlib.Path, local: pathlib.Path) -> tuple[Contents, mmap.mmap]:
    """Returns what the file at `path`, of which `local` is a local copy or itself, holds, and its memory map.

    Raises UserError for a file that is damaged, of another kind, or without tensors, and with the command that saves
    its weights alone where it is a pickle of more than them.
    """
    try:
        archive = zipfile.ZipFile(local)
        mapped = map_file(local)
        root = _root(archive, path)
        found = Contents({}, {}, {})
        _flatten(_Unpickler(archive, root, path, mapped).load(), "", found)
    except UserError:
        raise
    except Exception as error:  # a damaged zip or pickle can end in nearly any of them
        if disk.is_machine_error(error):
            raise
        raise UserError(
            f"{path} is damaged, cut short, or not in the zip form that PyTorch has written since 1.6 "
            f"({_fault(local, error)}); if torch.load opens it, and you trust it, write it again: {_save_alone(path)}"
        ) from error
    if not found.tensors:
        raise UserError(_without_tensors(path, found.unknown))
    return found, mapped


def _root(archive: zipfile.ZipFile, path: pathlib.Path) -> str:
    """The directory in the zip that holds the pickle. Raises UserError if it is no zip of weights."""
    entries = archive.namelist()
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        some = ", ".join(entries[:3]) + (", ..." if len(entries) > 3 else "")
        raise UserError(
            f"{path} is a zip file, but not one of weights: it holds {len(pickles) or 'no'} data.pkl, but "
            f"{some or 'nothing'}; if weights are packed in it, unpack it"
        )
    root = pickles[0].removesuffix("/data.pkl")
    if f"{root}/byteorder" in entries and archive.read(f"{root}/byteorder") != b"little":
        raise UserError(f"{path} was written by a big-endian machine; save it again on a little-endian one")
    return root


def _fault(local: pathlib.Path, error: Exception) -> str:
    """Returns, in a few words, what is wrong with a file that cannot be read."""
    with local.open("rb") as file:
        head = file.read(len(_BEFORE_ZIP))
    if head == _BEFORE_ZIP:
        return "it is in the form before that"
    if head.startswith(ZIP) and isinstance(error, zipfile.BadZipFile):
        return f"it begins as a zip, but the end is missing behind {local.stat().st_size} bytes: {error}"
    return str(error)


def _without_tensors(path: pathlib.Path, unknown: Mapping[str, Unknown]) -> str:
    if not unknown:
        return f"{path} holds no tensors"
    place = next(iter(_may_be_weights(unknown) or unknown))
    return (
        f"{path} asks to run {unknown[place].origin} when it is opened, which plain weights never do, and holds no "
        f"tensors besides; nothing was run. If you trust it, save its weights alone where that is installed: "
        f"{_save_model(path, place)}"
    )


def unread_weights(path: pathlib.Path, unknown: Mapping[str, Unknown]) -> str:
    """Returns a clause about values of a file that may be weights, and are not read; "" if there are none."""
    found = _may_be_weights(unknown)
    if not found:
        return ""
    place, value = next(iter(found.items()))
    how = _save_model(path, place) if value.is_model else "save the weights as plain tensors"
    return (
        f"; {len(found)} values of it may be weights, but only running code could read them, such as {place}, which "
        f"asks for {value.origin}: {how}"
    )


def _may_be_weights(unknown: Mapping[str, Unknown]) -> dict[str, Unknown]:
    """Whole models first, then tensors of other kinds and arrays."""
    models = {place: value for place, value in unknown.items() if value.is_model}
    return models | {
        place: value for place, value in unknown.items() if re.search("_re(build|construct)", value.origin)
    }


def _save_model(path: pathlib.Path, place: str) -> str:
    return _save_alone(path, "".join(f"[{json.dumps(name)}]" for name in place.split(".") if name) + ".state_dict()")


def _flatten(value: Any, place: str, found: Contents) -> None:
    """Adds what `value` holds to `found`, under names that begin with `place`."""
    if isinstance(value, LazyTensor):
        if place in found.tensors:
            raise UserError(f"two tensors of the file have the name {place}; save it with names that differ")
        found.tensors[place] = value
    elif isinstance(value, dict | list | tuple):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            _flatten(item, f"{place}.{name}" if place else str(name), found)
    elif isinstance(value, str):
        found.texts[place] = value
    elif _is_placeholder(value):
        found.unknown[place] = value
        if isinstance(value, Placeholder):
            _flatten(value.items, place, found)
