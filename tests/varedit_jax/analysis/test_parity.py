"""The golden data: what the published release computes, this implementation computes, number by number."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from varedit_jax.analysis import parity
from varedit_jax.errors import UserError

pytestmark = pytest.mark.slow

GOLDEN = pathlib.Path(__file__).parents[2] / "data" / "golden"


@dataclasses.dataclass(frozen=True)
class Computed:
    golden: parity.Golden
    tensors: list[tuple[str, np.ndarray]]  # ours


@pytest.fixture(scope="module", params=["mini_a", "mini_b"])
def computed(request: pytest.FixtureRequest) -> Computed:
    golden = parity.read_golden(GOLDEN / request.param)
    with jax.default_matmul_precision("highest"):  # as experiments.check_parity has it
        return Computed(golden, list(parity.compute(golden)))


def compare(computed: Computed, monkeypatch: pytest.MonkeyPatch, **changed: np.ndarray) -> list[parity.ParityRow]:
    """The table, with some golden tensors exchanged for others."""
    monkeypatch.setattr(parity, "compute", lambda golden: iter(computed.tensors))
    return parity.compare(dataclasses.replace(computed.golden, tensors=computed.golden.tensors | changed))


def test_every_tensor_is_inside_tolerance(computed: Computed, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = compare(computed, monkeypatch)
    assert not [(row.name, row.error) for row in rows if not row.passed]
    inputs = {"src_image_uint8", "tgt_image_uint8", "text_features", "text_lengths"}
    assert {row.name for row in rows} == set(computed.golden.tensors) - inputs  # nothing is left out


def test_golden_models_differ_in_kind(computed: Computed) -> None:
    """Stride 16 of square images, and stride 8 in 2x2 patches of oblong ones: both ways through the code."""
    config, (rows, columns) = computed.golden.config, computed.golden.pyramid.last
    assert config.token_stride == 16
    assert config.patchify == (rows != columns)


@pytest.mark.parametrize("name", ["src_features", "tgt_bits", "train_logits", "loss_plain", "infer_bits_02"])
@pytest.mark.parametrize("value", [1.01, np.nan], ids=["beyond", "nan"])
def test_one_wrong_value_fails_its_tensor_alone(
    computed: Computed, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    wrong = computed.golden.tensors[name].astype(np.float32)
    wrong.flat[-1] += value
    rows = compare(computed, monkeypatch, **{name: wrong})
    assert [row.name for row in rows if not row.passed] == [name]


def test_another_shape_is_refused(computed: Computed, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = computed.golden.tensors["train_logits"][:, 1:]
    with pytest.raises(UserError, match=r"train_logits has shape \[1, \d+, \d+\] in the golden data, but"):
        compare(computed, monkeypatch, train_logits=wrong)


@pytest.fixture
def copy(tmp_path: pathlib.Path) -> pathlib.Path:
    shutil.copytree(GOLDEN / "mini_a", tmp_path / "golden")
    return tmp_path / "golden"


@pytest.mark.parametrize("name", ["transformer.pth", "vae.pth", "golden.safetensors", "config.json"])
def test_missing_and_truncated_files_are_named(copy: pathlib.Path, name: str) -> None:
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=name):
        parity.read_golden(copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match=name):
        parity.read_golden(copy)


def test_missing_field_is_named(copy: pathlib.Path) -> None:
    values = json.loads((copy / "config.json").read_text())
    del values["heads"]
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"config\.json has no field 'heads'"):
        parity.read_golden(copy)


@pytest.mark.parametrize("change", [{"base_ch": 24}, {"heads": 5}, {"schedule": 3}], ids=str)
def test_a_model_that_cannot_be_is_refused(copy: pathlib.Path, change: dict) -> None:
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=r"config\.json does not describe a model: "):
        parity.read_golden(copy)


def test_weights_of_another_size_are_refused(copy: pathlib.Path) -> None:
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(values | {"base_ch": 64}))
    with pytest.raises(UserError, match=r"vae\.pth: .*coder\.\S+ has shape \[.*\], the model's is \[.*\]"):
        parity.read_golden(copy)
