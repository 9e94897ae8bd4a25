"""Reads published state dicts without running code from a file, without PyTorch, and one tensor at a time.

A `.pth` file is a zip of a pickle and one raw file a tensor. The pickle is read by an unpickler that knows nothing but
the rebuilding of tensors, so a file that asks for anything else is refused. Tensors are views of a memory map.
"""

import collections
import contextlib
import json
import mmap
import pathlib
import pickle
import re
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from varedit_jax.errors import UserError
from varedit_jax.storage import disk, files
from varedit_jax.storage.paths import PathLike, children, is_remote, resolve, size

StateDict = dict[str, np.ndarray]

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
SAFETENSORS_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# Plain values in a trainer's checkpoint, pickled as references to names.
_TORCH_CONSTANTS = re.compile(r"b?float\d+|u?int\d+|bool|complex\d+|strided")

PTH = (".pth", ".pt", ".bin")
SAFETENSORS = ".safetensors"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


class LazyTensor(NamedTuple):
    """A tensor of a file, not yet read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]  # a read-only view of the file


class WeightsFile(Mapping[str, LazyTensor]):
    """The tensors of a file, or of several, by name; nothing is read before it is asked for."""

    def __init__(self, tensors: dict[str, LazyTensor], maps: list[mmap.mmap], paths: list[pathlib.Path]) -> None:
        """Use `open_weights`."""
        self._tensors, self._maps = tensors, maps
        self.paths = paths

    def __getitem__(self, name: str) -> LazyTensor:
        """The tensor `name`."""
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Names, in the file's order."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._tensors)

    def release(self) -> None:
        """Gives the memory of what has been read back to the system; views stay valid, and are read again."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)

    def under(self, *prefixes: str) -> "WeightsFile":
        """The tensors below the first of the `prefixes` that has any, without it; all of them if none has."""
        for prefix in prefixes:
            found = {name.removeprefix(prefix): x for name, x in self._tensors.items() if name.startswith(prefix)}
            if found:
                return WeightsFile(found, self._maps, self.paths)
        return self

    def renamed(self, rename: Callable[[str], str]) -> "WeightsFile":
        """The same tensors by other names."""
        return WeightsFile({rename(name): x for name, x in self._tensors.items()}, self._maps, self.paths)


def open_weights(path: PathLike) -> WeightsFile:
    """Opens a `.pth` or `.safetensors` file, an index of shards, or a directory with one (Hugging Face's layout).

    Names of nested dicts are joined by dots. Files in an object store are copied to the directory for temporary
    files, for as long as it is in use. Raises UserError for a missing or damaged file, an unknown suffix, a shard that
    is not there, a pickle that asks for code to run, and errors of the machine.
    """
    path = resolve(path)
    with disk.read_explained(str(path)):
        return _open(path)


def _open(path: pathlib.Path) -> WeightsFile:
    if path.is_dir():
        path = _in_directory(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.name.endswith(".index.json"):
        return _open_index(path)
    tensors: dict[str, LazyTensor] = {}
    if path.suffix not in (*PTH, SAFETENSORS):
        raise UserError(f"{path} ends in {path.suffix!r}; known are {', '.join(PTH)} and {SAFETENSORS}")
    with _on_disk(path) as local:
        mapped = (_open_safetensors if path.suffix == SAFETENSORS else _open_pth)(path, local, tensors)
    return WeightsFile(tensors, [mapped], [path])


@contextlib.contextmanager
def _on_disk(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a local file with the content of `path`: itself, or a copy whose name goes with the block.

    What is open or mapped by then lasts.
    """
    if not is_remote(path):
        yield path
        return
    directory = pathlib.Path(tempfile.gettempdir())
    disk.check_room(directory, size(path), f"a copy of {path}")
    with tempfile.NamedTemporaryFile(suffix=path.suffix) as copy:
        with disk.explained(f"copy of {path}", directory), path.open("rb") as source:
            shutil.copyfileobj(source, copy, 2**24)
            copy.flush()
        yield pathlib.Path(copy.name)


def read_state_dict(path: PathLike) -> StateDict:
    """All tensors of what `open_weights` opens, in memory. Raises UserError as it does."""
    return {name: np.array(tensor.load()) for name, tensor in open_weights(path).items()}


def _in_directory(directory: pathlib.Path) -> pathlib.Path:
    files.check_complete(directory)
    for name in (*INDEXES, *SINGLE_FILES):
        if (directory / name).is_file():
            return directory / name
    found = [path for path in children(directory) if path.suffix in (*PTH, SAFETENSORS)]
    if len(found) != 1:
        raise UserError(
            f"{directory} holds {len(found)} files of weights and none of {', '.join((*INDEXES, *SINGLE_FILES))}; "
            f"name the file that is meant"
        )
    return found[0]


def _open_index(path: pathlib.Path) -> WeightsFile:
    text = path.read_bytes()
    try:
        shard_of: dict[str, str] = json.loads(text)["weight_map"]
        names = sorted({pathlib.PurePath(name).name for name in shard_of.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not an index of shards: {error!r}") from error
    shards = {name: open_weights(path.parent / name) for name in names}
    shard_of = {name: pathlib.PurePath(shard).name for name, shard in shard_of.items()}
    lost = [f"{name} (in {shard})" for name, shard in shard_of.items() if name not in shards[shard]]
    if lost:
        raise UserError(f"{path} lists tensors that its shards do not hold: {', '.join(lost)}")
    tensors = {name: shards[shard][name] for name, shard in shard_of.items()}
    maps = [mapped for shard in shards.values() for mapped in shard._maps]
    return WeightsFile(tensors, maps, [path, *(p for shard in shards.values() for p in shard.paths)])


def _map(path: pathlib.Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _open_safetensors(path: pathlib.Path, local: pathlib.Path, tensors: dict[str, LazyTensor]) -> mmap.mmap:
    try:
        mapped = _map(local)
        with safetensors.safe_open(local, framework="numpy"):
            pass  # it checks the header against the file's size
        (length,) = struct.unpack_from("<Q", mapped)
        header: dict[str, Any] = json.loads(mapped[8 : 8 + length])
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        if disk.is_machine_error(error):
            raise
        if isinstance(error, FileNotFoundError):  # the library's word for whatever keeps it from opening a file
            raise UserError(f"{path} cannot be opened: {error}") from error
        raise UserError(f"{path} is damaged or not a safetensors file: {error}") from error
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        if entry["dtype"] not in SAFETENSORS_TYPES:
            raise UserError(f"{path}: {name} is of type {entry['dtype']}; known are {', '.join(SAFETENSORS_TYPES)}")
        dtype, shape = np.dtype(SAFETENSORS_TYPES[entry["dtype"]]), tuple(entry["shape"])
        start = 8 + length + entry["data_offsets"][0]
        tensors[name] = LazyTensor(shape, dtype, _view(mapped, dtype, shape, start))
    return mapped


def _view(mapped: mmap.mmap, dtype: np.dtype, shape: tuple[int, ...], start: int) -> Callable[[], np.ndarray]:
    count = int(np.prod(shape, dtype=np.int64))
    return lambda: np.frombuffer(mapped, dtype, count, start).reshape(shape) if count else np.empty(shape, dtype)


class _Storage(NamedTuple):
    """The raw file of a tensor."""

    dtype: np.dtype
    size: int
    load: Callable[[], np.ndarray]  # flat


class _Unpickler(pickle.Unpickler):
    """Describes the tensors of the zip; refuses every global but those of tensors."""

    def __init__(self, archive: zipfile.ZipFile, root: str, path: pathlib.Path, mapped: mmap.mmap) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self._archive, self._root, self._path, self._mapped = archive, root, path, mapped

    def find_class(self, module: str, name: str) -> Any:
        """The few names that a state dict needs."""
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, requires_grad, hooks: data
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("torch", "device"):  # in a trainer's settings
            return lambda *device: ":".join(map(str, device))
        if module == "torch" and _TORCH_CONSTANTS.fullmatch(name):
            return name
        raise UserError(
            f"{self._path} asks to run {module}.{name} when it is opened, which plain weights never do; it was not read"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """One storage, not yet read."""
        kind, storage_type, key, _, count = pid
        if kind != "storage":
            raise UserError(f"{self._path} refers to a {kind!r}; plain weights refer to storages only")
        dtype, info = np.dtype(storage_type), self._archive.getinfo(f"{self._root}/data/{key}")
        if info.file_size != count * dtype.itemsize:
            raise UserError(
                f"{self._path} is damaged: a tensor has {info.file_size // dtype.itemsize} of {count} values"
            )
        if info.compress_type != zipfile.ZIP_STORED:  # PyTorch stores; who repacks the file may compress
            return _Storage(dtype, count, lambda: np.frombuffer(self._inflated(info), dtype))
        start = self._data_start(info)
        return _Storage(dtype, count, _view(self._mapped, dtype, (count,), start))

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
        if header[:4] != b"PK\x03\x04" or start + info.file_size > len(self._mapped):
            raise UserError(f"{self._path} is damaged: {info.filename} lies outside of the file")
        return start


def _rebuild_tensor(
    storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *unused: Any
) -> LazyTensor:
    """A view of a storage, bounds checked."""
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else offset - 1
    if offset < 0 or min(size, default=0) < 0 or min(stride, default=0) < 0 or last >= storage.size:
        raise UserError(f"a tensor of shape {size} does not fit its storage of {storage.size} values")
    strides = tuple(step * storage.dtype.itemsize for step in stride)
    return LazyTensor(
        tuple(size),
        storage.dtype,
        lambda: np.lib.stride_tricks.as_strided(storage.load()[offset:], size, strides, writeable=False),
    )


def _open_pth(path: pathlib.Path, local: pathlib.Path, tensors: dict[str, LazyTensor]) -> mmap.mmap:
    try:
        archive = zipfile.ZipFile(local)
        mapped = _map(local)
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{path} is a zip file, but not one of weights: it holds no data.pkl")
        root = pickles[0].removesuffix("/data.pkl")
        order = [name for name in archive.namelist() if name == f"{root}/byteorder"]
        if order and archive.read(order[0]) != b"little":
            raise UserError(f"{path} was written by a big-endian machine; save it again on a little-endian one")
        loaded = _Unpickler(archive, root, path, mapped).load()
        _flatten(loaded, "", tensors)
    except UserError:
        raise
    except Exception as error:  # a damaged zip or pickle can end in nearly any of them
        if disk.is_machine_error(error):
            raise
        raise UserError(
            f"{path} is damaged, cut short, or not in the zip form that PyTorch has written since 1.6 ({error}); "
            f"if torch.load opens it, write it again with torch.save"
        ) from error
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    return mapped


def _flatten(value: Any, prefix: str, tensors: dict[str, LazyTensor]) -> None:
    if isinstance(value, LazyTensor):
        tensors[prefix] = value
    elif isinstance(value, dict):
        for name, item in value.items():
            _flatten(item, f"{prefix}.{name}" if prefix else str(name), tensors)
