"""State dicts are read without running code; whatever a file holds, the answer is tensors or one clear sentence."""

import io
import json
import pathlib
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from varedit_jax.errors import UserError
from varedit_jax.weights.reader import check_whole, open_weights, read_state_dict


def pickled(
    kind: str = "FloatStorage",
    count: int = 6,
    offset: int = 0,
    size: tuple[int, ...] = (2, 3),
    stride: tuple[int, ...] = (3, 1),
) -> bytes:
    """The pickle of {"outer": {"w": tensor}} as torch.save writes it, in the text opcodes of protocol 0."""
    numbers = ["".join(f"I{n}\n" for n in values) for values in (size, stride)]
    storage = f"(S'storage'\nctorch\n{kind}\nS'0'\nS'cpu'\nI{count}\ntQ"
    tensor = f"({storage}I{offset}\n({numbers[0]}t({numbers[1]}tI00\nccollections\nOrderedDict\n(tRtR"
    return f"(dS'outer'\n(dS'w'\nctorch._utils\n_rebuild_tensor_v2\n{tensor}ss.".encode()


def archive(pickle_bytes: bytes, storage: bytes, names: tuple[str, str] = ("data.pkl", "data/0")) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr(f"weights/{names[0]}", pickle_bytes)
        zipped.writestr(f"weights/{names[1]}", storage)
    return file.getvalue()


def read(directory: pathlib.Path, content: bytes, name: str = "weights.pth") -> dict[str, np.ndarray]:
    (directory / name).write_bytes(content)
    return read_state_dict(directory / name)


VALUES = np.arange(6, dtype=np.float32)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("FloatStorage", np.float32),
        ("DoubleStorage", np.float64),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", ml_dtypes.bfloat16),
        ("LongStorage", np.int64),
        ("ByteStorage", np.uint8),
    ],
)
def test_types_and_nested_names(tmp_path: pathlib.Path, kind: str, dtype: type) -> None:
    tensors = read(tmp_path, archive(pickled(kind), VALUES.astype(dtype).tobytes()))
    assert list(tensors) == ["outer.w"]
    assert tensors["outer.w"].dtype == dtype
    np.testing.assert_array_equal(tensors["outer.w"].astype(np.float32), VALUES.reshape(2, 3))


def test_views_of_a_storage(tmp_path: pathlib.Path) -> None:
    """A transposed tensor, and one that begins inside its storage."""
    transposed = read(tmp_path, archive(pickled(size=(3, 2), stride=(1, 3)), VALUES.tobytes()))
    np.testing.assert_array_equal(transposed["outer.w"], VALUES.reshape(2, 3).T)
    inside = read(tmp_path, archive(pickled(offset=2, size=(2, 2), stride=(2, 1)), VALUES.tobytes()))
    np.testing.assert_array_equal(inside["outer.w"], [[2, 3], [4, 5]])


def test_tensors_are_views_of_the_file(tmp_path: pathlib.Path) -> None:
    """A tensor is not copied before it is used, and what was read can be given back to the system."""
    (tmp_path / "weights.pth").write_bytes(archive(pickled(), VALUES.tobytes()))
    file = open_weights(tmp_path / "weights.pth")
    tensor = file["outer.w"].load()
    assert not tensor.flags.owndata and not tensor.flags.writeable
    file.release()
    np.testing.assert_array_equal(tensor, VALUES.reshape(2, 3))


def test_what_a_trainer_records_beside_tensors_is_passed_over(tmp_path: pathlib.Path) -> None:
    """A device, a type and a size of tensors, among its settings: names that run nothing."""
    settings = b"S'settings'\n(ctorch\ndevice\n(S'cuda'\nI0\ntRctorch\nbfloat16\nctorch\nSize\n((I2\nI3\nttRls"
    tensors = read(tmp_path, archive(pickled()[:-1] + settings + b".", VALUES.tobytes()))
    assert list(tensors) == ["outer.w"]


@pytest.mark.parametrize("module", ["os", "posix", "builtins", "torch", "torch._utils", "numpy"])
def test_a_pickle_that_asks_for_code_is_refused(tmp_path: pathlib.Path, module: str) -> None:
    """And the code has not run."""
    witness = tmp_path / "ran"
    name = {"builtins": "exec"}.get(module, "system")
    command = f"open({str(witness)!r}, 'w')" if name == "exec" else f"touch {witness}"
    evil = f"c{module}\n{name}\n({pickle.dumps(command, 0).split(b'p0')[0].decode()}tR.".encode()
    with pytest.raises(UserError, match=rf"weights\.pth asks to run {module}\.{name} when it is opened"):
        read(tmp_path, archive(evil, b""))
    assert not witness.exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"count": 7}, "a tensor has 6 of 7 values"),
        ({"offset": 1}, r"shape \(2, 3\) does not fit its storage of 6 values"),
        ({"offset": -1}, "does not fit its storage"),
        ({"stride": (4, 1)}, "does not fit its storage"),
        ({"stride": (3, -1)}, "does not fit its storage"),
        ({"size": (3, 3)}, "does not fit its storage"),
        ({"kind": "QInt8Storage"}, r"asks to run torch\.QInt8Storage"),
    ],
)
def test_tensors_that_reach_out_of_their_storage_are_refused(
    tmp_path: pathlib.Path, changes: dict, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        read(tmp_path, archive(pickled(**changes), VALUES.tobytes()))


GOOD = archive(pickled(), VALUES.tobytes())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"weights\.pth is empty \(0 bytes\): download it again"),
        (pickle.dumps({"w": 1}), "damaged, cut short, or not in the zip form that PyTorch has written since 1.6"),
        (GOOD[:-30], "damaged, cut short, or not in the zip form"),
        (archive(b"x", b"", ("model.onnx", "x")), "a zip file, but not one of weights"),
        (archive(pickled(), VALUES.tobytes(), ("data.pkl", "data/1")), "damaged"),
        (archive(b"(d.", b""), "holds no tensors"),
        (archive(pickled()[:-3], b""), "damaged"),
    ],
    ids=["empty", "legacy pickle", "truncated", "foreign zip", "storage missing", "no tensors", "pickle cut"],
)
def test_damaged_files(tmp_path: pathlib.Path, content: bytes, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read(tmp_path, content)


def test_any_damaged_byte_gives_a_sentence_or_tensors(tmp_path: pathlib.Path) -> None:
    """Never another exception: every byte of the file, and every byte of a pickle with a valid checksum, in turn."""
    refused = 0
    for whole, wrap in ((GOOD, lambda x: x), (pickled(), lambda x: archive(x, VALUES.tobytes()))):
        for place, step in ((place, step) for place in range(len(whole)) for step in (1, 128)):
            damaged = bytearray(whole)
            damaged[place] = (damaged[place] + step) % 256
            try:
                read(tmp_path, wrap(bytes(damaged)))
            except UserError:
                refused += 1
    assert refused > 400


@pytest.mark.parametrize("length", [4, 40, -1])
def test_damaged_safetensors(tmp_path: pathlib.Path, length: int) -> None:
    whole = safetensors.numpy.save({"w": VALUES})
    np.testing.assert_array_equal(read(tmp_path, whole, "weights.safetensors")["w"], VALUES)
    with pytest.raises(UserError, match=r"weights\.safetensors is damaged or not a safetensors file"):
        read(tmp_path, whole[:length], "weights.safetensors")
    if length == -1:
        with pytest.raises(UserError, match=rf"it is cut short, {len(whole) - 1} of {len(whole)} bytes; download"):
            open_weights(tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="damaged"):
        read(tmp_path, struct.pack("<Q", 10**9) + whole[8:], "weights.safetensors")


def test_missing_file_and_foreign_suffix(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pth does not exist"):
        read_state_dict(tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match="^/dev/null is no regular file$"):
        read_state_dict("/dev/null")
    with pytest.raises(UserError, match=r"ends in '\.onnx'; known are \.pth, \.pt, \.bin, \.ckpt and \.saf"):
        read(tmp_path, GOOD, "weights.onnx")


# --- names and content at odds


@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w.ckpt", "w.safetensors"])
def test_the_content_says_which_kind_a_file_is(tmp_path: pathlib.Path, name: str) -> None:
    """Of all names that weights have; people rename."""
    np.testing.assert_array_equal(read(tmp_path, GOOD, name)["outer.w"], VALUES.reshape(2, 3))
    np.testing.assert_array_equal(read(tmp_path, safetensors.numpy.save({"w": VALUES}), name)["w"], VALUES)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4400000000\n"
PAGE = b"\n<!doctype html>\n<html lang=en><head><title>Sign in</title></head></html>"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("w.pth", POINTER, "is a Git LFS pointer, not the file: run git lfs pull"),
        ("model.safetensors", POINTER, "is a Git LFS pointer"),
        ("model.safetensors.index.json", POINTER, "is a Git LFS pointer"),
        ("w.bin", PAGE, "is an HTML page"),
        ("model-00001-of-00002.safetensors", PAGE, "is an HTML page"),
        ("w.safetensors", b"", r"is empty \(0 bytes\)"),
    ],
)
def test_what_is_there_instead_of_a_file(tmp_path: pathlib.Path, name: str, content: bytes, sentence: str) -> None:
    """Alone, as a file of a directory, and as a shard of an index."""
    (tmp_path / name).write_bytes(content)
    if name.startswith("model-"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match=rf"{name} {sentence}"):
            open_weights(path)


# --- directories


def test_shards_with_and_without_an_index(tmp_path: pathlib.Path) -> None:
    """And one file beside an index; the index may have been saved by Windows."""
    for number in (1, 2):
        (tmp_path / f"part-{number:05d}-of-00002.safetensors").write_bytes(
            safetensors.numpy.save({f"w{number}": VALUES})
        )
    assert sorted(read_state_dict(tmp_path)) == ["w1", "w2"]
    index = {"weight_map": {"w2": "part-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_bytes(json.dumps(index).encode("utf-16"))
    assert sorted(read_state_dict(tmp_path)) == ["w2"]
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "part-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 2 shards, number 1: get them"):
        open_weights(tmp_path)
    with pytest.raises(UserError, match=rf"is one of 2 shards; name its directory, {tmp_path}"):
        check_whole(tmp_path / "part-00002-of-00002.safetensors")


def test_directories_without_weights(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="holds 0 files of weights and none of"):
        open_weights(tmp_path)
    for name in (".metadata", "__0_0.distcp"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"format_utils dcp_to_torch {tmp_path} weights.pth"):
        open_weights(tmp_path)
