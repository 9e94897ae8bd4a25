"""Files that are something else than their names say."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from varedit_jax.storage.pointers import HEAD_BYTES, what_instead

_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 44\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty (0 bytes)"),
        (_LFS, "is a Git LFS pointer, not the file: run git lfs pull"),
        (_LFS.replace(b"\n", b"\r\n"), "Git LFS"),
        (b"../../.git/annex/objects/Xz/SHA256E-s4--0.tar\n", "git annex get"),
        (b"<!DOCTYPE html>\n<html><title>Sign in</title>", "is an HTML page"),
        (b"\xef\xbb\xbf\n  <html lang='en'>", "is an HTML page"),
        (b"<!-- cached -->\n<HEAD>", "is an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "error message of a server"),
        (b"Entry not found", "error message of a server"),
        (b"Access to dataset a/b is restricted. You must be authenticated", "error message of a server"),
    ],
)
def test_what_a_download_left_is_named(data: bytes, words: str) -> None:
    assert words in (what_instead(data) or "")


def _png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        info = tarfile.TarInfo("version https:/a.txt")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"<html"))
    return file.getvalue()


@pytest.mark.parametrize(
    "data", [_png(), _tar(), b'{"source": "<html>"}\n', b"PAR1\x15\x04", b"\n", b"version 2", b"<svg/>", b"<!-- a -->"]
)
def test_files_of_a_format_are_not_taken_for_another(data: bytes) -> None:
    assert what_instead(data[:HEAD_BYTES]) is None
