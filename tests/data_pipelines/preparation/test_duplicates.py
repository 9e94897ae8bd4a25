import io
import itertools

import numpy as np
import pytest
from PIL import Image

from data_pipelines.preparation import duplicates
from data_pipelines.preparation.fingerprints import FACTS, digest, plain_words
from data_pipelines.preparation.perceptual_hash import Look, alike, change
from data_pipelines.reasons import Reason
from tests.data_pipelines.preparation.corpus import edited, jpeg, photo


def _look(data: bytes) -> Look:
    return Look.of(np.asarray(Image.open(io.BytesIO(data))))


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Blots with grain, as cameras have it."""
    made = []
    for seed in range(4):
        grain = np.random.default_rng(seed).normal(0, 12, (512, 512, 1))
        made.append(Image.fromarray((np.asarray(photo(seed, (512, 512))) + grain).clip(0, 255).astype(np.uint8)))
    return made


def test_compression_and_size_change_less_than_the_smallest_edit(photos: list[Image.Image]) -> None:
    for each in photos:
        source = _look(jpeg(each, 95))
        assert change(source, _look(jpeg(each, 60))) < 3
        assert change(source, Look.of(np.asarray(each.resize((300, 300))))) < 3
        spot = each.copy()  # a 32nd of the side, 40 levels lighter
        spot.paste(each.crop((40, 30, 56, 46)).point(lambda level: level + 40), (40, 30))
        assert change(source, _look(jpeg(spot, 90))) > 6


def test_shapes_survive_compression_and_size_and_tell_images_apart(photos: list[Image.Image]) -> None:
    looks = [_look(jpeg(each, 95)) for each in photos]
    for each, look in zip(photos, looks, strict=True):
        for other in (_look(jpeg(each, 30)), Look.of(np.asarray(each.resize((256, 256))))):
            assert _alike(look, other)
    assert not any(_alike(*pair) for pair in itertools.combinations(looks, 2))
    green = np.asarray(photos[0])[:, :, ::-1]  # the same shapes in other colors
    assert not _alike(looks[0], Look.of(green))


def _alike(a: Look, b: Look) -> bool:
    return bool(alike(np.uint64(a.shape), np.uint64(b.shape), a.colors, b.colors, 3))


def test_words_are_compared_without_case_and_punctuation() -> None:
    assert plain_words("Make it  RED, please!") == "make it red please"
    assert plain_words("Macht es größer") == plain_words("macht es GRÖSSER.")
    assert plain_words("!?") == ""


class Rows:
    """Facts of made rows, in pieces."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def pieces(self):  # type: ignore[no-untyped-def]
        for first in range(0, len(self.rows), 100):
            yield first, self.rows[first : first + 100]


def _search(rows: np.ndarray, bits: int, buckets: int, tmp_path) -> dict[int, int]:  # type: ignore[no-untyped-def]
    np.save(tmp_path / "verdicts.npy", np.zeros(len(rows), np.uint8))
    found: dict[int, int] = {}
    for bucket in range(buckets):
        task = duplicates.SearchTask(
            reason=Reason.NEAR,
            parts=(),
            verdicts=tmp_path / "verdicts.npy",
            near_bits=bits,
            bucket=bucket,
            buckets=buckets,
            found=tmp_path / "found.npy",
        )
        found |= dict(duplicates._near(Rows(rows), task).tolist())
    return found


@pytest.mark.parametrize("bits", [0, 1, 3, 7])
def test_bands_find_what_comparing_all_with_all_finds(bits: int, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(duplicates, "_BLOCK", 16)
    draw = np.random.default_rng(0)
    rows = np.zeros(400, FACTS)
    rows["key"] = draw.permutation(400)
    rows["words"] = np.array([digest(b"a"), digest(b"b")], np.uint64)[draw.integers(0, 2, 400)]
    shapes = draw.integers(0, 2**63, 20, np.uint64)[draw.integers(0, 20, 400)]
    for _ in range(3):  # up to three bits of each are other ones
        shapes ^= draw.integers(0, 2, 400, np.uint64) << draw.integers(0, 64, 400, np.uint64)
    rows["source_shape"] = shapes
    rows["target_shape"] = np.where(draw.random(400) < 0.9, 0, 2**20 - 1)
    rows["source_colors"][:, 0] = np.where(draw.random(400) < 0.9, 0, 13)
    near = np.bitwise_count(shapes[:, None] ^ shapes) <= bits
    for name in ("words", "target_shape"):
        near &= rows[name][:, None] == rows[name]
    near &= rows["source_colors"][:, None, 0] == rows["source_colors"][:, 0]
    near &= rows["key"][None] < rows["key"][:, None]
    assert near.any()
    found = _search(rows, bits, 3, tmp_path)
    assert sorted(found) == np.flatnonzero(near.any(axis=1)).tolist()
    assert all(near[number, twin] for number, twin in found.items())


def test_many_that_are_all_alike_leave_one(tmp_path) -> None:  # type: ignore[no-untyped-def]
    rows = np.zeros(5000, FACTS)
    rows["key"] = np.random.default_rng(0).permutation(5000)
    found = _search(rows, 3, 1, tmp_path)
    [stays] = np.flatnonzero(rows["key"] == 0)
    assert len(found) == 4999 and set(found.values()) == {stays}


def test_an_edit_of_the_same_image_is_no_duplicate() -> None:
    image = photo(1)
    looks = [Look.of(np.asarray(each)) for each in (edited(image, 250), edited(image, 0))]
    assert not _alike(*looks)
