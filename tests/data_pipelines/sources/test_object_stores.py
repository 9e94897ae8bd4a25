"""Data sets in object stores are read as those on a disk."""

import pathlib
from collections.abc import Callable

import pytest

from data_pipelines.sources import find_parts, read, read_part
from tests.data_pipelines.sources import archive_layouts, layouts
from tests.data_pipelines.sources.layouts import Download
from tests.data_pipelines.sources.test_machine_errors import DOWNLOADS
from varedit_jax.errors import UserError
from varedit_jax.storage.files import upload
from varedit_jax.storage.paths import resolve


def _same_from(url: str, source: str, write: Callable[[pathlib.Path], Download], directory: pathlib.Path) -> None:
    download = write(directory / "data")
    for path in (directory / "data").rglob("*"):
        if path.is_symlink():  # stores have none
            path.unlink()
    expected = list(read(source, download.inputs, download.options))
    names = [part.name for part in find_parts(source, download.inputs, download.options)]
    for path in (directory / "data").rglob("*.jsonl"):
        path.write_text(path.read_text(errors="surrogateescape").replace(str(directory), url), errors="surrogateescape")
    upload(directory / "data", resolve(f"{url}/data"))
    inputs = [f"{url}/{path.relative_to(directory).as_posix()}" for path in download.inputs]
    options = {name: value.replace(str(directory), url) for name, value in download.options.items()}
    assert [part.name for part in find_parts(source, inputs, options)] == names
    assert expected and list(read(source, inputs, options)) == expected


@pytest.mark.parametrize(("source", "write"), DOWNLOADS, ids=[write.__name__ for _, write in DOWNLOADS])
def test_every_kind_of_file_is_read_from_googles_store(
    source: str, write: Callable[[pathlib.Path], Download], gs_bucket: str, tmp_path: pathlib.Path
) -> None:
    _same_from(gs_bucket, source, write, tmp_path)


@pytest.mark.parametrize(
    ("source", "write"), [("imgedit", archive_layouts.imgedit), ("manifest", archive_layouts.manifest)]
)
def test_tables_archives_and_lists_are_read_from_amazons_store(
    source: str, write: Callable[[pathlib.Path], Download], s3_bucket: str, tmp_path: pathlib.Path
) -> None:
    _same_from(s3_bucket, source, write, tmp_path)


def test_what_is_not_in_a_bucket_is_told(gs_bucket: str) -> None:
    with pytest.raises(UserError, match=f"there is no {gs_bucket}/nothing; give files or directories"):
        list(read("manifest", [f"{gs_bucket}/nothing"]))


def test_an_object_that_is_gone_while_it_is_read_is_no_damage(gs_bucket: str, tmp_path: pathlib.Path) -> None:
    layouts.x2edit(tmp_path / "data")
    upload(tmp_path / "data", resolve(f"{gs_bucket}/data"))
    part, *_ = find_parts("x2edit", [f"{gs_bucket}/data"])
    resolve(part.files[0]).unlink()
    with pytest.raises(UserError, match="cannot read gs://.*; put it right and run the same command again"):
        list(read_part(part))


def test_a_tfds_data_set_has_to_be_local(gs_bucket: str) -> None:
    (resolve(gs_bucket) / "made/1.0.0/dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="a prepared TFDS data set is gs://.*, but it has to be on a local disk"):
        find_parts("tfds", [gs_bucket])
