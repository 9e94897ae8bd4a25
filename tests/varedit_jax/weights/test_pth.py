"""What people save beside their weights is passed over without running it, and what is missing for it is named."""

import pathlib
import re
import shlex
import zipfile

import numpy as np
import pytest

from tests.varedit_jax.weights.test_reader import GOOD, VALUES, archive, pickled
from varedit_jax.errors import UserError
from varedit_jax.weights.pth import Placeholder, unread_weights
from varedit_jax.weights.reader import open_weights

VALUES_FILE = pathlib.Path(__file__).parents[2] / "data" / "trainer_values.pth"  # by make_torch_values.py


def test_a_checkpoint_of_pytorch_with_everything_beside_its_tensors() -> None:
    """Settings, numbers of NumPy, times, paths, sets: passed over; tensors in dicts of any kind and lists: read."""
    file = open_weights(VALUES_FILE)
    tensors = {name.removeprefix("trainer.gpt_wo_ddp."): np.array(x.load()) for name, x in file.items()}
    assert list(tensors) == ["plain", "transposed", "parameter", "marked", "random.0"]
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    for name, wanted in {
        "plain": weight,
        "transposed": weight.T,
        "parameter": weight + 10,
        "marked": weight + 20,
    }.items():
        np.testing.assert_array_equal(tensors[name], wanted)
    assert file.texts == {"args.pn": "0.06M", "args.model": "2bc8"}
    origins = {place: value.origin for place, value in file.unknown.items()}
    assert origins["namespace"] == "argparse.Namespace" and origins["omegaconf"] == "omegaconf.dictconfig.DictConfig"
    assert all(isinstance(value, Placeholder) or issubclass(value, Placeholder) for value in file.unknown.values())


def test_code_beside_tensors_does_not_run(tmp_path: pathlib.Path) -> None:
    """Neither where it is called, nor where its result is filled, called and used as a key."""
    witness = tmp_path / "ran"
    call = f"cos\nsystem\n(S'touch {witness}'\ntR"
    beside = f"S'call'\n{call}sS'filled'\n{call}S'a'\nI1\nssS'built'\n{call}(dbsS'again'\n{call}(tRs{call}I1\ns"
    (tmp_path / "w.pth").write_bytes(archive(pickled()[:-1] + beside.encode() + b".", VALUES.tobytes()))
    file = open_weights(tmp_path / "w.pth")
    assert list(file) == ["outer.w"] and not witness.exists()
    assert {file.unknown[place].origin for place in ("call", "filled", "built", "again")} == {"os.system"}


MODEL = b"ctorch.nn\nLinear\n)\x81}(X\x08\x00\x00\x00_modules}ub"


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"\x80\x02" + MODEL + b".", ""),
        (b"\x80\x02}(X\x01\x00\x00\x00acos\ngetcwd\n)RX\x03\x00\x00\x00net" + MODEL + b"u.", '["net"]'),
    ],
    ids=["alone", "in a dict"],
)
def test_a_whole_model_gives_the_command_that_saves_its_weights(
    tmp_path: pathlib.Path, content: bytes, place: str
) -> None:
    """A command that a shell and Python take as it is, whatever the name of the file."""
    path = tmp_path / 'it\'s a "model" $x.pth'
    path.write_bytes(archive(content, b""))
    with pytest.raises(
        UserError, match=r"asks to run torch\.nn\.Linear when it is opened, .* nothing was run"
    ) as error:
        open_weights(path)
    python, flag, code = shlex.split(str(error.value).partition("where that is installed: ")[2])
    assert (python, flag) == ("python", "-c")
    loaded: list[object] = []

    class Torch:
        @staticmethod
        def load(name: str, **options: object) -> object:
            loaded.append((name, options))
            return Model({"net": Model({})})

        @staticmethod
        def save(state: object, name: str) -> None:
            loaded.append((state, name))

    class Model(dict):  # type: ignore[type-arg]
        def state_dict(self) -> str:
            return f"state of {len(self)}"

    exec(compile(code.removeprefix("import torch; "), "command", "exec"), {"torch": Torch})
    assert loaded[0] == (str(path), {"map_location": "cpu", "weights_only": False})
    assert loaded[1] == (f"state of {0 if place else 1}", "weights.pth")


def test_what_may_be_weights_and_is_not_read_is_named(tmp_path: pathlib.Path) -> None:
    """A tensor of a type of its own, an array of NumPy, a model beside tensors; settings are none of them."""
    array = b"S'array'\ncnumpy._core.multiarray\n_reconstruct\n(tRs"
    settings = b"S'settings'\ncargparse\nNamespace\n(tRs"
    model = pickled()[:-1] + settings + array + b"S'model'\ncmine\nModel\n(tR(dS'_modules'\n(dsbs."
    for content, sentence in (
        (pickled()[:-1] + settings + b".", "^$"),
        (
            pickled()[:-1] + settings + array + b".",
            "^; 1 values of it .* array, which asks for numpy.*: save the weights",
        ),
        (model, r"^; 2 values of it .* such as model, .* mine\.Model: python -c .*\[\"model\"\]\.state_dict"),
    ):
        (tmp_path / "w.pth").write_bytes(archive(content, VALUES.tobytes()))
        file = open_weights(tmp_path / "w.pth")
        assert re.search(sentence, unread_weights(file.paths[0], file.unknown))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.",
            r"\(it is in the form before that\); .* python -c",
        ),
        (GOOD[:-30], rf"\(it begins as a zip, but the end is missing behind {len(GOOD) - 30} bytes"),
        (
            GOOD.replace(b"weights/data.pkl", b"weights/datx.pkl"),
            "holds no data.pkl, but weights/datx.pkl, weights/data/0;",
        ),
    ],
    ids=["before 1.6", "cut short", "another zip"],
)
def test_what_is_wrong_is_said(tmp_path: pathlib.Path, content: bytes, sentence: str) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        open_weights(tmp_path / "w.pth")


def test_dicts_of_any_class_hold_tensors(tmp_path: pathlib.Path) -> None:
    """Such as those that configuration libraries make of a state dict."""
    content = pickled().replace(b"(dS'outer'", b"caddict\nDict\n(tRS'outer'")
    (tmp_path / "w.pth").write_bytes(archive(content, VALUES.tobytes()))
    file = open_weights(tmp_path / "w.pth")
    np.testing.assert_array_equal(file["outer.w"].load(), VALUES.reshape(2, 3))
    assert file.unknown[""].origin == "addict.Dict"


def test_two_data_pkl_are_not_weights(tmp_path: pathlib.Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as file:
        for name in ("a/data.pkl", "b/data.pkl"):
            file.writestr(name, b"}.")
    with pytest.raises(UserError, match=r"it holds 2 data\.pkl, but a/data\.pkl, b/data\.pkl; if weights are packed"):
        open_weights(tmp_path / "w.pth")


def test_two_tensors_of_one_name_are_refused(tmp_path: pathlib.Path) -> None:
    """Names of nested dicts are joined by dots: {"outer": {"w": x}, "outer.w": y} would lose one."""
    tensor = pickled().partition(b"S'w'\n")[2][:-3]
    (tmp_path / "w.pth").write_bytes(archive(pickled()[:-1] + b"S'outer.w'\n" + tensor + b"s.", VALUES.tobytes()))
    with pytest.raises(UserError, match=r"two tensors of the file have the name outer\.w"):
        open_weights(tmp_path / "w.pth")
