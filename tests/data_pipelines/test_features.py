"""Features computed once: complete or absent, reused for the same weights and data, refused for others."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipelines import features
from varedit_jax.errors import UserError


class Pictures:
    """Random pictures in memory."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.pictures = np.random.default_rng(seed).integers(0, 256, (count, 2, 8, 8, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, NDArray[np.uint8]]:
        return dict(zip(("source", "target"), self.pictures[index], strict=True))


def encode(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Pictures [B, 8, 8, 3] to features [B, 2, 2, 3]."""
    return pictures.reshape(len(pictures), 2, 4, 2, 4, 3).mean((2, 4), dtype=np.float32)


def refuse(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    raise AssertionError("the stored features were not used")


def test_features_are_those_of_each_picture_in_order(tmp_path: pathlib.Path) -> None:
    data = Pictures(11)
    batches: list[tuple[int, ...]] = []

    def watched(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        batches.append(pictures.shape)
        return encode(pictures)

    made = features.precompute(tmp_path / "deep" / "features", data, "w1", watched, batch_size=4)
    assert set(batches) == {(4, 8, 8, 3)}  # one shape, also for the 3 examples of the last batch
    for found in (made, features.load(tmp_path / "deep" / "features", "w1")):
        assert isinstance(found.source, np.memmap) and found.source.dtype == np.float32
        np.testing.assert_array_equal(found.source, encode(data.pictures[:, 0]))
        np.testing.assert_array_equal(found.target, encode(data.pictures[:, 1]))
    manifest = json.loads((tmp_path / "deep" / "features" / "features.json").read_text())
    assert (manifest["weights_hash"], manifest["count"], manifest["shape"]) == ("w1", 11, [2, 2, 3])


def test_stored_features_are_reused_for_the_same_weights_and_data_only(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "features"
    features.precompute(folder, Pictures(5), "w1", encode, batch_size=4)
    features.precompute(folder, Pictures(5), "w1", refuse, batch_size=4)
    with pytest.raises(UserError, match="weights w1, not w2"):
        features.precompute(folder, Pictures(5), "w2", refuse, batch_size=4)
    with pytest.raises(UserError, match="weights w1, not w2"):
        features.load(folder, "w2")
    with pytest.raises(UserError, match="another data set of 5 examples, not of this one of 6"):
        features.precompute(folder, Pictures(6), "w1", refuse, batch_size=4)
    with pytest.raises(UserError, match="another data set"):
        features.precompute(folder, Pictures(5, seed=1), "w1", refuse, batch_size=4)


def test_an_interrupted_run_leaves_nothing(tmp_path: pathlib.Path) -> None:
    calls: list[int] = []

    def failing(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(pictures)

    with pytest.raises(KeyboardInterrupt):
        features.precompute(tmp_path / "features", Pictures(9), "w1", failing, batch_size=2)
    assert list(tmp_path.iterdir()) == []
    made = features.precompute(tmp_path / "features", Pictures(9), "w1", encode, batch_size=2)
    assert len(made.source) == 9 and [path.name for path in tmp_path.iterdir()] == ["features"]


def test_the_faster_of_two_runs_wins(tmp_path: pathlib.Path) -> None:
    data, folder = Pictures(3), tmp_path / "features"
    raced: list[features.Features] = []

    def overtaken(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        if not raced:
            raced.append(features.precompute(folder, data, "w1", encode, batch_size=4))
        return encode(pictures)

    made = features.precompute(folder, data, "w1", overtaken, batch_size=4)
    np.testing.assert_array_equal(made.source, raced[0].source)
    assert [path.name for path in tmp_path.iterdir()] == ["features"]


@pytest.mark.parametrize(
    ("result", "error", "said"),
    [
        (lambda x: encode(x).astype(np.float64), ValueError, "float64"),
        (lambda x: encode(x)[..., 0], ValueError, r"float32 \[4, 2, 2\]"),
        (lambda x: encode(x) * np.float32(np.nan), UserError, "source features of examples 0 to 3 are not finite"),
    ],
)
def test_bad_features_are_not_stored(
    tmp_path: pathlib.Path, result: Callable[[Any], Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        features.precompute(tmp_path / "features", Pictures(5), "w1", result, batch_size=4)
    assert list(tmp_path.iterdir()) == []


def test_damaged_folders_are_named(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "features"
    with pytest.raises(UserError, match="holds no features"):
        features.load(folder, "w1")
    with pytest.raises(UserError, match="no examples"):
        features.precompute(folder, Pictures(0), "w1", encode, batch_size=4)
    features.precompute(folder, Pictures(5), "w1", encode, batch_size=4)
    np.save(folder / "target.npy", np.zeros((4, 2, 2, 3), np.float32))
    with pytest.raises(UserError, match=r"target.npy is float32 \[4, 2, 2, 3\]"):
        features.load(folder, "w1")
    (folder / "source.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match="cannot read .*source.npy"):
        features.load(folder, "w1")
    (folder / "features.json").write_text("{}")
    with pytest.raises(UserError, match="cannot read .*features.json"):
        features.load(folder, "w1")
