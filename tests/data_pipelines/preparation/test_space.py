"""Space that staging takes, and what a kill at any moment leaves behind."""

import errno
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines.preparation import pipeline, staged
from data_pipelines.preparation.pipeline import prepare
from data_pipelines.preparation.settings import Settings
from data_pipelines.preparation.staged import BUCKETS, shard_buckets, shards_of
from data_pipelines.shards import read_index
from tests.data_pipelines.preparation.corpus import edited, photo, write_corpus
from varedit_jax.errors import UserError
from varedit_jax.storage import files

ROOT = pathlib.Path(__file__).parents[3]
OPTIONS = {"dataset": "made"}


def _large(directory: pathlib.Path, lists: int, each: int) -> list[str]:
    """Lists of images that take much more space than what is noted of them."""
    directory.mkdir()
    for index in range(lists):
        lines = []
        for number in range(each):
            name = f"{index}-{number}"
            image = photo(index * each + number, (96, 96))
            image.save(directory / f"{name}-source.png", compress_level=0)
            edited(image).save(directory / f"{name}-target.png", compress_level=0)
            lines.append(
                f'{{"id": "{name}", "instruction": "Edit it", "source": "{name}-source.png", '
                f'"target": "{name}-target.png"}}\n'
            )
        (directory / f"list-{index}.jsonl").write_text("".join(lines))
    return [str(directory / f"list-{index}.jsonl") for index in range(lists)]


def _bytes(directory: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_staging_and_shards_together_take_hardly_more_than_the_data_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, sizes = _large(tmp_path / "in", lists=3, each=60), []
    work = pipeline.write

    def watched(task: object) -> None:
        work(task)
        sizes.append(_bytes(tmp_path / ".out.partial"))

    monkeypatch.setattr(pipeline, "write", watched)
    prepare("manifest", inputs, tmp_path / "out", Settings(shard_bytes=300_000, validation=0.1), source_options=OPTIONS)
    data = sum(split["bytes"] for split in read_index(tmp_path / "out")["splits"].values())
    assert len(sizes) > BUCKETS
    # Each record once, a sixteenth of them twice, a shard, and the facts: 2.1 if nothing were given back.
    assert 1.05 < max(sizes) / data < 1.2


@pytest.mark.parametrize("count", [1, 2, 3, 15, 16, 17, 1000, 99_999])
def test_the_buckets_of_a_shard_hold_its_keys_and_no_others(count: int) -> None:
    edges = np.array([-(-index * 2**32 // count) << 32 for index in range(count)], np.uint64)
    keys = np.concatenate([edges, edges[1:] - np.uint64(1), [np.uint64(2**64 - 1)]])
    shards = shards_of(keys, np.full(len(keys), count))
    assert shards.min() == 0 and shards.max() == count - 1
    for key, shard in zip(keys.tolist()[:2000], shards.tolist(), strict=False):
        assert key * BUCKETS // 2**64 in shard_buckets(shard, count)
    needed = [shard_buckets(index, count) for index in range(count)]
    assert sum(map(len, needed)) <= count + BUCKETS and set().union(*needed) == set(range(BUCKETS))


def test_bytes_that_changed_while_staged_are_told(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _, _ = write_corpus(tmp_path / "in", lists=1)
    compare = pipeline._Steps.compare

    def damage(steps: pipeline._Steps, reason: object) -> None:
        for path in (tmp_path / ".out.partial" / "scan" / "00000").glob("records-*"):
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        compare(steps, reason)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline._Steps, "compare", damage)
    with pytest.raises(UserError, match=r"records-\d\d is damaged; remove .*/\.out\.partial and run the same"):
        prepare("manifest", [str(inputs[0])], tmp_path / "out", Settings(), source_options=OPTIONS)


def _free(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=nbytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_a_disk_that_is_too_small_is_told_before_the_start(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = _large(tmp_path / "in", lists=1, each=20)
    size = _bytes(tmp_path / "in")
    _free(monkeypatch, 2 * size)  # 1.1 times the data, and as they fit into one shard, once more
    with pytest.raises(
        UserError, match=r"^preparing 1\.1 MB of inputs takes up to 2\.3 MB, but only 2\.2 MB are free in .*, give a "
        "larger disk with --staging_directory, or --nocheck_disk"
    ):  # fmt: skip
        prepare("manifest", [str(tmp_path / "in")], tmp_path / "out", Settings(), source_options=OPTIONS)
    assert not list((tmp_path / ".out.partial").glob("scan/*"))
    other = Settings(validation=0)
    with pytest.raises(UserError, match="^preparing 1.1 MB of inputs takes up to 2.3 MB"):
        prepare("manifest", lists, tmp_path / "out", other, source_options={"root": str(tmp_path / "in")})
    prepare("manifest", lists, tmp_path / "list", Settings(), source_options=OPTIONS)  # what it names is not known
    prepare(
        "manifest", [str(tmp_path / "in")], tmp_path / "unchecked", Settings(), source_options=OPTIONS, check_disk=False
    )
    prepare(
        "manifest", [str(tmp_path / "in")], tmp_path / "out", Settings(shard_bytes=size // 10), source_options=OPTIONS
    )


def test_what_is_staged_already_needs_no_room_again(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _large(tmp_path / "in", lists=2, each=20)
    size = _bytes(tmp_path / "in")
    settings = Settings(shard_bytes=size // 10)

    def fail(task: object) -> None:
        raise KeyError("the power went out")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write", fail)
        with pytest.raises(KeyError):
            prepare("manifest", [str(tmp_path / "in")], tmp_path / "out", settings, source_options=OPTIONS)
    _free(monkeypatch, size // 2)
    prepare("manifest", [str(tmp_path / "in")], tmp_path / "out", settings, source_options=OPTIONS)


def test_the_staging_directory_may_be_on_another_disk(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _, _ = write_corpus(tmp_path / "in", lists=1)

    def other_disk(draft: pathlib.Path, path: pathlib.Path) -> None:
        if draft.is_dir():
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        draft.replace(path)

    prepare("manifest", [str(inputs[0])], tmp_path / "here", Settings(), source_options=OPTIONS)
    monkeypatch.setattr(files, "take_place", other_disk)
    prepare(
        "manifest", [str(inputs[0])], tmp_path / "out", Settings(), source_options=OPTIONS,
        staging_directory=str(tmp_path / "staging"),
    )  # fmt: skip
    assert _files(tmp_path / "out") == _files(tmp_path / "here")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "in", "out"]


def _files(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# Kills a copy of itself at each change of the file system, and resumes.
KILLER = """
import os, pathlib, shutil, signal, sys
from data_pipelines.preparation.pipeline import prepare
from data_pipelines.preparation.settings import Settings
from tests.data_pipelines.preparation.corpus import write_corpus

top = pathlib.Path(sys.argv[1])
lists, _, _ = write_corpus(top / "in", lists=2)
changes, fatal = 0, -1

def count(event, arguments):
    global changes
    if event in ("os.rename", "os.remove", "os.rmdir") and ".out.partial" in str(arguments[0]):
        if changes == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        changes += 1

sys.addaudithook(count)

def run(name):
    settings = Settings(validation=0.3, shard_bytes=20_000, exact=False)
    prepare("manifest", list(map(str, lists)), top / name, settings, source_options={"dataset": "made"}, say=str)

def files(name):
    return {path.relative_to(top / name): path.read_bytes() for path in (top / name).rglob("*") if path.is_file()}

run("out")
expected, total = files("out"), changes
shutil.rmtree(top / "out")
step, tried = int(sys.argv[2]), 0
for fatal in range(0, total, step):
    child = os.fork()
    if not child:
        changes = 0
        run("out")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, fatal
    at, fatal, tried = fatal, -1, tried + 1
    if not (top / "out").exists():  # else it was killed while it cleaned up
        run("out")
    assert files("out") == expected, at
    for left in ("out", ".out.partial"):
        shutil.rmtree(top / left, ignore_errors=True)
print(tried, "kills")
"""


@pytest.mark.subprocess
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_a_kill_at_any_change_of_the_file_system_is_resumed_with_the_same_bytes(
    tmp_path: pathlib.Path, step: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", KILLER, str(tmp_path), str(step)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[0]) > 40 / step


def test_nothing_is_given_back_before_every_shard_that_needs_it_is_there(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, _, _ = write_corpus(tmp_path / "in", lists=2)
    given: set[int] = set()
    tasks: list[pipeline.ShardTask] = []
    make, give = pipeline.shard_tasks, staged.give_back

    def remember(*arguments: object) -> list[pipeline.ShardTask]:
        tasks.extend(make(*arguments))  # type: ignore[arg-type]
        return list(tasks)

    def watch(parts: object, buckets: set[int]) -> None:
        for task in tasks:
            assert task.is_done() or not buckets & set(task.buckets)
        given.update(buckets)
        give(parts, buckets)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "shard_tasks", remember)
    monkeypatch.setattr(pipeline, "give_back", watch)
    prepare(
        "manifest", list(map(str, inputs)), tmp_path / "out", Settings(validation=0.3, shard_bytes=20_000),
        source_options=OPTIONS,
    )  # fmt: skip
    assert given == set(range(BUCKETS)) and len(tasks) > 3
