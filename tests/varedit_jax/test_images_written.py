"""Images out: every kind that is written, and what is left behind when that fails: the old file, or nothing."""

import errno
import os

import numpy as np
import pytest

from tests.emulators import gs_bucket, gs_server
from varedit_jax import images
from varedit_jax.errors import UserError

__all__ = ["gs_bucket", "gs_server"]


def image(height: int = 20, width: int = 30) -> np.ndarray:
    """A smooth image with a different value in every corner and channel."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 200 // height + 20, x * 200 // width + 30, (x + y) * 200 // (width + height)], -1).astype(
        np.uint8
    )


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff", ".PNG"])
def test_write_and_read_back(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    images.write_image(path, image())
    np.testing.assert_array_equal(images.read_image(path), image())
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp"])
def test_write_lossy(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    images.write_image(str(path), image(64, 64))
    assert np.abs(images.read_image(path).astype(int) - image(64, 64)).mean() < 3


def test_write_replaces_and_keeps_the_usual_permissions(tmp_path):
    path = tmp_path / "out.png"
    path.write_text("old")
    images.write_image(path, image())
    np.testing.assert_array_equal(images.read_image(path), image())
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("name", ["out", "out.xyz", "out.gif", ".png"])
def test_unknown_suffix(tmp_path, name):
    with pytest.raises(UserError, match=r"end it in \.png, \.jpg"):
        images.write_image(tmp_path / name, image())
    assert not os.listdir(tmp_path)


def test_missing_directory(tmp_path):
    with pytest.raises(UserError, match="the directory .*/none of .*/none/out.png does not exist; create it first"):
        images.write_image(tmp_path / "none" / "out.png", image())
    (tmp_path / "dir.png").mkdir()
    with pytest.raises(UserError, match="is a directory"):
        images.write_image(tmp_path / "dir.png", image())


def test_directory_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # the superuser may always write
    with pytest.raises(UserError, match="may not be written to"):
        images.write_image(tmp_path / "out.png", image())


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = tmp_path / "out.png"
    path.write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match="writing the image out.png failed in .*: No space left on device; .*make room"):
        images.write_image(path, image())
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.png"]


@pytest.mark.parametrize("suffix, width", [(".jpg", 65536), (".webp", 16384)])
def test_image_too_large_for_its_kind(tmp_path, suffix, width):
    with pytest.raises(UserError, match=f"cannot hold an image of {width} x 1 pixels.*write a .png"):
        images.write_image(tmp_path / f"out{suffix}", np.zeros((1, width, 3), np.uint8))
    assert not os.listdir(tmp_path)


def test_write_takes_pixels_only(tmp_path):
    with pytest.raises(ValueError, match="expected uint8"):
        images.write_image(tmp_path / "out.png", np.zeros((4, 4, 3), np.float32))


def test_images_in_a_bucket(gs_bucket):
    with pytest.raises(UserError, match="there is no image"):
        images.read_image(f"{gs_bucket}/new/out.png")
    images.write_image(f"{gs_bucket}/new/out.png", image())
    np.testing.assert_array_equal(images.read_image(f"{gs_bucket}/new/out.png"), image())
