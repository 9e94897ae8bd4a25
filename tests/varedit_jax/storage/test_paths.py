"""A user's text becomes a path, or one sentence."""

import importlib.util
import os
import pathlib

import pytest
import tensorstore

from varedit_jax.errors import UserError
from varedit_jax.storage import paths

ODD_NAMES = ["a b", "run#1", "50%20off", "what?", "100%", "a|b", "[x]*", "a:b", "a@b", 'q"uote', "é画", "-x", "{y}"]


def test_local_paths_are_absolute_and_plain(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert paths.resolve("../x/./y/") == tmp_path / "x" / "y"
    assert paths.resolve("~/runs") == tmp_path / "home" / "runs"
    assert paths.resolve(paths.resolve("a")) == tmp_path / "in" / "a"
    assert type(paths.resolve("a")) is type(pathlib.Path())


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_object_stores_keep_their_bucket(scheme: str) -> None:
    path = paths.resolve(f"{scheme}://bucket/a/../b//c#d/")
    assert str(path) == f"{scheme}://bucket/b/c#d"
    assert paths.is_remote(path) and str(paths.resolve(path)) == str(path)
    assert str(path / "x") == f"{scheme}://bucket/b/c#d/x" and str(path.parent) == f"{scheme}://bucket/b"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gs:/b/run", r"'gs:/b/run' has the scheme gs:/; paths are local, gs://BUCKET/... or s3://BUCKET/..."),
        ("hdfs://b/run", "has the scheme hdfs://"),
        ("https://host/x", "has the scheme https://"),
        ("s3://", "names no bucket"),
        ("a/" + "n" * 256, "a name of 256 bytes, nnnnnnnnnnnnnnnnnnnn..., and 255 are possible"),
        ("画" * 86, "a name of 258 bytes"),
        (os.fsdecode(b"a\xffb"), "is not valid UTF-8"),
        ("a\0b", "has a null character"),
        ("", "the path is empty"),
        ("~nobody-of-that-name/x", "give the path without ~"),
    ],
)
def test_what_no_path_can_be_is_one_sentence(text: str, says: str) -> None:
    with pytest.raises(UserError) as refused:
        paths.resolve(text)
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("scheme", "extra", "module"), [("gs", "gcs", "gcsfs"), ("s3", "s3", "s3fs")])
def test_a_store_without_its_extra_is_one_sentence(
    scheme: str, extra: str, module: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(
        UserError, match=rf"needs the package {module}; install it with pip install 'varedit-jax\[{extra}\]'"
    ):
        paths.resolve(f"{scheme}://b/run")
    assert list(tmp_path.iterdir()) == []


def test_what_must_be_local_says_so() -> None:
    with pytest.raises(UserError, match="--directory is gs://b/x, but it has to be on a local disk"):
        paths.local("gs://b/x", "--directory")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_no_name_is_a_pattern_or_a_url(directory: pathlib.Path, name: str) -> None:
    """Listing and TensorStore find the contents of a directory of that name, and nothing else."""
    odd = directory / name
    for path in (odd / "part-1.txt", odd / "other", directory / "x" / "part-2.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    assert paths.child_names(odd) == ["other", "part-1.txt"]
    assert [path.read_text() for path in paths.children(odd, "part-*")] == ["part-1.txt"]
    assert [str(path) for path in paths.files_below(odd)] == [str(odd / "other"), str(odd / "part-1.txt")]
    store = tensorstore.KvStore.open(paths.kvstore(odd)).result()
    assert store.read("other").result().value == b"other"
    assert paths.size(odd / "other") == 5


def test_nothing_is_in_a_directory_that_is_not_there(directory: pathlib.Path) -> None:
    assert paths.children(directory) == [] and list(paths.files_below(directory)) == []


def test_what_comes_with_the_packages_is_found_from_anywhere(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the working directory has something of that name; other names in the packages are not looked for."""
    monkeypatch.chdir(tmp_path)
    root = pathlib.Path(__file__).parents[3]
    for name in ("varedit_jax/data/shapes", "./varedit_jax/data/shapes/config.json", "experiments/configs/shapes.py"):
        assert paths.resolve(name) == root / name and paths.resolve(name).exists()
    for name in ("varedit_jax/data/new", "varedit_jax/config", "experiments", "."):
        assert paths.resolve(name) == tmp_path / name
    own = tmp_path / "varedit_jax" / "data" / "shapes"
    own.mkdir(parents=True)
    assert paths.resolve("varedit_jax/data/shapes") == own
