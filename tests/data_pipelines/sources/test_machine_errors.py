"""A failure of the machine ends the program; it is never taken for damage of the data."""

import errno
import os
import pathlib
import resource
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from data_pipelines.record import Record
from data_pipelines.sources import Refused, find_parts, read, read_part
from data_pipelines.sources import files as input_files
from data_pipelines.sources.files import find, read_below
from tests.data_pipelines.sources import archive_layouts, layouts
from tests.data_pipelines.sources.layouts import Download
from varedit_jax.errors import UserError

DOWNLOADS: list[tuple[str, Callable[[pathlib.Path], Download]]] = [
    ("seed", archive_layouts.seed_openimages),
    ("imgedit", archive_layouts.imgedit),
    ("gpt_image_edit", archive_layouts.gpt_image_edit_metadata),
    ("nhr_edit", archive_layouts.nhr_edit),
    ("pico_banana", archive_layouts.pico_banana_packed),
    ("manifest", archive_layouts.manifest),
    ("ultraedit", layouts.ultraedit),
    ("instruct_pix2pix", layouts.instruct_pix2pix_zips),
    ("instruct_pix2pix", layouts.instruct_pix2pix_directories),
    ("x2edit", layouts.x2edit),
]


class Disk:
    """Opens files; the call number `fails_at`, to open or to read, fails."""

    def __init__(self, fails_at: int = -1, code: int = errno.EIO) -> None:
        self.calls, self.fails_at, self.code = 0, fails_at, code

    def open(self, path: str, *arguments: Any, **options: Any) -> Any:
        self.call()
        file = open(path, *arguments, **options)  # noqa: SIM115 - closed by whoever asked for it
        disk = self

        class File:
            """The open file; every call to read it counts."""

            def __getattr__(self, name: str) -> Any:
                if name in ("read", "readinto"):
                    disk.call()
                return getattr(file, name)

            def __enter__(self) -> "File":
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

        return File()

    def call(self) -> None:
        self.calls += 1
        if self.calls == self.fails_at:
            raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize(("source", "write"), DOWNLOADS, ids=[write.__name__ for _, write in DOWNLOADS])
def test_whichever_read_fails_the_program_ends(
    source: str, write: Callable[[pathlib.Path], Download], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = write(tmp_path).inputs
    monkeypatch.setattr(input_files, "open", (disk := Disk()).open, raising=False)
    assert any(isinstance(entry, Record) for entry in read(source, inputs))
    assert disk.calls >= 3
    for call in sorted({*range(1, min(disk.calls, 12)), *range(1, disk.calls + 1, 7), disk.calls}):
        monkeypatch.setattr(input_files, "open", Disk(fails_at=call).open, raising=False)
        with pytest.raises(UserError, match=r"^cannot read /.*: Input/output error; put it right and run the same"):
            list(read(source, inputs))


@pytest.fixture
def few_files() -> Iterator[Callable[[int], None]]:
    """Lets the process open a few more files than it has open."""
    held = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers = []

    def limit(more: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, held[1]), held[1]))
        try:
            while True:
                fillers.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            for _ in range(more):
                os.close(fillers.pop())

    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, held)
    for filler in fillers:
        os.close(filler)


@pytest.mark.parametrize(("source", "write"), DOWNLOADS, ids=[write.__name__ for _, write in DOWNLOADS])
def test_too_many_open_files_are_no_damage(
    source: str,
    write: Callable[[pathlib.Path], Download],
    few_files: Callable[[int], None],
    tmp_path: pathlib.Path,
) -> None:
    part, *_ = find_parts(source, write(tmp_path).inputs)
    few_files(0)
    with pytest.raises(UserError, match="Too many open files"):
        list(read_part(part))


def test_an_image_that_may_not_be_read_is_not_missing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    monkeypatch.setattr(input_files, "open", Disk(fails_at=1, code=errno.EACCES).open, raising=False)
    with pytest.raises(input_files.ReadError, match=r"cannot read .*a\.jpg: Permission denied"):
        read_below([str(tmp_path)], "a.jpg")


def test_a_directory_that_may_not_be_listed_is_not_empty(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(input_files.ReadError, match="Permission denied"):
        find([str(tmp_path)], "*.jsonl")


def test_memory_that_is_not_there_is_no_damage_of_a_table(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = layouts.ultraedit(tmp_path).inputs

    def exhausted(*_: object, **__: object) -> None:
        raise pa.ArrowMemoryError("malloc of size 4000000000 failed")

    monkeypatch.setattr(pa.parquet.ParquetFile, "iter_batches", exhausted)
    with pytest.raises(MemoryError):
        list(read("ultraedit", inputs))


def test_an_archive_that_is_cut_short_is_still_damage(tmp_path: pathlib.Path) -> None:
    inputs = layouts.x2edit(tmp_path).inputs
    for file in find([str(path) for path in inputs], "*.tar"):
        os.truncate(file, os.path.getsize(file) // 2)
    assert any(isinstance(entry, Refused) and entry.reason == "damaged archive" for entry in read("x2edit", inputs))


def test_many_archives_of_one_table_are_read_with_few_open_files(
    few_files: Callable[[int], None], tmp_path: pathlib.Path
) -> None:
    rng = np.random.default_rng(0)
    rows = []
    (tmp_path / "Parquet").mkdir()
    (tmp_path / "Singleturn").mkdir()
    for number in range(60):
        directory = f"results_add_laion_part{number}"
        members = [(f"{directory}/s/{side}.png", rng.bytes(600)) for side in ("original", "result")]
        (tmp_path / "Singleturn" / f"{directory}.tar.split.000").write_bytes(layouts.tar(members))
        names = {"input_images": [members[0][0]], "output_images": [members[1][0]]}
        rows.append({**names, "prompt": "make it foggy"})
    layouts.table(tmp_path / "Parquet" / "add_part0.parquet", rows)
    few_files(48)
    entries = list(read("imgedit", [tmp_path]))
    assert [type(entry) for entry in entries] == [Record] * 60
