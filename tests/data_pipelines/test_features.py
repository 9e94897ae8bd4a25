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


class Images:
    """Random images in memory."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.images = np.random.default_rng(seed).integers(0, 256, (count, 2, 8, 8, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, NDArray[np.uint8]]:
        return dict(zip(("source", "target"), self.images[index], strict=True))


def encode(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Images [B, 8, 8, 3] to features [B, 2, 2, 3]."""
    return images.reshape(len(images), 2, 4, 2, 4, 3).mean((2, 4), dtype=np.float32)


def refuse(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    raise AssertionError("the stored features were not used")


def test_features_are_those_of_each_image_in_order(tmp_path: pathlib.Path) -> None:
    data = Images(11)
    batches: list[tuple[int, ...]] = []

    def watched(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        batches.append(images.shape)
        return encode(images)

    made = features.precompute(tmp_path / "deep" / "features", data, "w1", watched, batch_size=4)
    assert set(batches) == {(4, 8, 8, 3)}  # one shape, also for the 3 examples of the last batch
    for found in (made, features.load(tmp_path / "deep" / "features", "w1")):
        assert isinstance(found.source, np.memmap) and found.source.dtype == np.float32
        np.testing.assert_array_equal(found.source, encode(data.images[:, 0]))
        np.testing.assert_array_equal(found.target, encode(data.images[:, 1]))
    manifest = json.loads((tmp_path / "deep" / "features" / "features.json").read_text())
    assert (manifest["weights_hash"], manifest["count"], manifest["shape"]) == ("w1", 11, [2, 2, 3])


def test_stored_features_are_reused_for_the_same_weights_and_data_only(tmp_path: pathlib.Path) -> None:
    directory = tmp_path / "features"
    features.precompute(directory, Images(5), "w1", encode, batch_size=4)
    features.precompute(directory, Images(5), "w1", refuse, batch_size=4)
    with pytest.raises(UserError, match="weights w1, not w2"):
        features.precompute(directory, Images(5), "w2", refuse, batch_size=4)
    with pytest.raises(UserError, match="weights w1, not w2"):
        features.load(directory, "w2")
    with pytest.raises(UserError, match="another data set of 5 examples, not of this one of 6"):
        features.precompute(directory, Images(6), "w1", refuse, batch_size=4)
    with pytest.raises(UserError, match="another data set"):
        features.precompute(directory, Images(5, seed=1), "w1", refuse, batch_size=4)


def test_an_interrupted_run_leaves_nothing(tmp_path: pathlib.Path) -> None:
    calls: list[int] = []

    def failing(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(images)

    with pytest.raises(KeyboardInterrupt):
        features.precompute(tmp_path / "features", Images(9), "w1", failing, batch_size=2)
    assert list(tmp_path.iterdir()) == []
    made = features.precompute(tmp_path / "features", Images(9), "w1", encode, batch_size=2)
    assert len(made.source) == 9 and [path.name for path in tmp_path.iterdir()] == ["features"]


def test_the_faster_of_two_runs_wins(tmp_path: pathlib.Path) -> None:
    data, directory = Images(3), tmp_path / "features"
    raced: list[features.Features] = []

    def overtaken(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        if not raced:
            raced.append(features.precompute(directory, data, "w1", encode, batch_size=4))
        return encode(images)

    made = features.precompute(directory, data, "w1", overtaken, batch_size=4)
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
        features.precompute(tmp_path / "features", Images(5), "w1", result, batch_size=4)
    assert list(tmp_path.iterdir()) == []


def test_damaged_directories_are_named(tmp_path: pathlib.Path) -> None:
    directory = tmp_path / "features"
    with pytest.raises(UserError, match="holds no features"):
        features.load(directory, "w1")
    with pytest.raises(UserError, match="no examples"):
        features.precompute(directory, Images(0), "w1", encode, batch_size=4)
    features.precompute(directory, Images(5), "w1", encode, batch_size=4)
    np.save(directory / "target.npy", np.zeros((4, 2, 2, 3), np.float32))
    with pytest.raises(UserError, match=r"target.npy is float32 \[4, 2, 2, 3\]"):
        features.load(directory, "w1")
    (directory / "source.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match="cannot read .*source.npy"):
        features.load(directory, "w1")
    (directory / "features.json").write_text("{}")
    with pytest.raises(UserError, match="cannot read .*features.json"):
        features.load(directory, "w1")
