"""Processes of stages: they stay, and end with the program, whatever ends it."""

import dataclasses
import errno
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil
import pytest

from data_pipelines.preparation import messages
from data_pipelines.preparation.stages import StageRunner
from tests.data_pipelines.preparation.corpus import write_corpus
from varedit_jax.errors import UserError
from varedit_jax.storage import files

ROOT = pathlib.Path(__file__).parents[3]


@dataclasses.dataclass(frozen=True)
class FileTask:
    """A task that writes the number of its process to a file."""

    path: pathlib.Path
    fault: str = ""

    def is_done(self) -> bool:
        return self.path.exists()


def work(task: FileTask) -> None:
    if task.fault == "mistake":
        raise UserError("the user is mistaken; be right")
    if task.fault == "defect":
        raise TwoArguments("a", "b")
    if task.fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if task.fault == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if task.fault == "faster":
        task.path.write_text("another worker")
        raise FileNotFoundError(errno.ENOENT, "what was read is deleted")
    time.sleep(0.2)
    task.path.write_text(str(os.getpid()))


class TwoArguments(Exception):
    """An exception that cannot be pickled and opened again."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def _stages(directory: pathlib.Path, workers: int = 2, runner: str = "DirectRunner", *options: str) -> StageRunner:
    return StageRunner(runner, workers, options, 60, directory)


def _tasks(directory: pathlib.Path, *faults: str) -> list[FileTask]:
    return [FileTask(directory / f"{index}", fault) for index, fault in enumerate(faults)]


def _alive() -> list[psutil.Process]:
    """Processes below this one, without the one of multiprocessing that stays to the end."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "multiprocessing.resource_tracker" not in " ".join(_words(child))]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # it has just ended
        return []


def test_processes_stay_for_all_stages(tmp_path: pathlib.Path) -> None:
    numbers: list[set[str]] = []
    with _stages(tmp_path) as stages:
        for name in ("one", "two", "three"):
            (tmp_path / name).mkdir()
            tasks = _tasks(tmp_path / name, *[""] * 4)
            stages.run(name, work, tasks)
            numbers.append({task.path.read_text() for task in tasks})
        alive = [psutil.Process(int(number)) for number in numbers[0]]
    assert len(numbers[0]) == 2 and str(os.getpid()) not in numbers[0]
    assert numbers[0] == numbers[1] == numbers[2]
    assert not any(process.is_running() for process in alive)
    assert not list(tmp_path.glob("messages-*"))


def test_what_is_left_is_told_as_it_shrinks(tmp_path: pathlib.Path) -> None:
    seen: list[int] = []

    def after(left: Sequence[FileTask]) -> None:
        assert not any(task.is_done() for task in left)
        seen.append(len(left))

    tasks = _tasks(tmp_path, "", "", "")
    tasks[1].path.write_text("done before")
    with _stages(tmp_path, workers=1) as stages:
        stages.run("stage", work, tasks, after=after)
        stages.run("stage", work, tasks, after=after)
    assert seen == [2, 1, 0, 0] and tasks[1].path.read_text() == "done before"


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        ("mistake", UserError, "^the user is mistaken; be right$"),
        ("full", UserError, "writing the data set failed in .*: No space left on device; .*; make room"),
        ("defect", RuntimeError, "TwoArguments: a b"),
        ("killed", UserError, "a worker process was killed, maybe because memory is short; run the same command again"),
    ],
)
def test_errors_of_processes_are_as_in_this_one(
    tmp_path: pathlib.Path, fault: str, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said), _stages(tmp_path) as stages:
        stages.run("stage", work, _tasks(tmp_path, "", fault))
    assert not _alive()


@pytest.mark.parametrize("workers", [1, 2])
def test_what_another_worker_has_done_is_no_failure(tmp_path: pathlib.Path, workers: int) -> None:
    with _stages(tmp_path, workers) as stages:
        stages.run("stage", work, tasks := _tasks(tmp_path, "faster", "faster"))
    assert tasks[0].path.read_text() == "another worker"


def test_two_that_do_the_same_task_leave_one_whole_directory(tmp_path: pathlib.Path) -> None:
    with files.task_directory(tmp_path / "part") as slow:
        (slow / "one").write_text("slow")
        with files.task_directory(tmp_path / "part") as fast:
            for name in ("one", "two"):
                (fast / name).write_text("fast")
        (slow / "two").write_text("slow")
    assert [path.name for path in tmp_path.iterdir()] == ["part"]
    assert [(tmp_path / "part" / name).read_text() for name in ("one", "two")] == ["fast", "fast"]


def test_signs_of_life_are_changes_and_not_times(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    (tmp_path / "of-a-dead-one.pulse").touch()
    life = messages.SignsOfLife(tmp_path)
    assert life.seconds_ago() == 0
    now += 50
    assert life.seconds_ago() == 50
    with messages.pulse(tmp_path):
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        assert life.seconds_ago() == 0
    now += 7
    assert life.seconds_ago() == 0  # the end of a task is one, too
    now += 7
    assert life.seconds_ago() == 7


def test_failures_come_as_they_were(tmp_path: pathlib.Path) -> None:
    messages.raise_failure(tmp_path)
    messages.tell_failure(tmp_path, TwoArguments("a", "b"))
    assert messages.has_failed(tmp_path)
    with pytest.raises(RuntimeError, match="TwoArguments: a b"):
        messages.raise_failure(tmp_path)
    messages.clear(tmp_path)
    messages.tell_failure(tmp_path, UserError("be right"))
    with pytest.raises(UserError, match="^be right$"):
        messages.raise_failure(tmp_path)
    messages.tell_failure(tmp_path / "gone", UserError("an orphan"))


@pytest.mark.subprocess
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_no_process_outlives_the_program(tmp_path: pathlib.Path, number: signal.Signals, code: int) -> None:
    lists, _, _ = write_corpus(tmp_path / "in", lists=4)
    for path in lists:  # long enough to be interrupted
        path.write_text(path.read_text() * 3000)
    command = [
        sys.executable, "-m", "data_pipelines.prepare", "--source=manifest", f"--input={','.join(map(str, lists))}",
        f"--output={tmp_path / 'out'}", "--source_options=dataset=made", "--workers=2"
    ]  # fmt: skip
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    program = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, **options)
    while len(list((tmp_path / ".out.partial").glob("scan/.*.partial/facts.bin"))) < 2:
        assert program.poll() is None
        time.sleep(0.05)
    family = psutil.Process(program.pid).children(recursive=True)
    os.killpg(program.pid, number)  # as a terminal does
    _, said = program.communicate(timeout=30)
    assert program.returncode == code and "Traceback" not in said
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive


@pytest.mark.slow
@pytest.mark.subprocess
def test_processes_of_beam_end_and_one_that_is_killed_is_told(tmp_path: pathlib.Path) -> None:
    options = ("--direct_running_mode=multi_processing", "--direct_num_workers=50")  # of which two are started
    for _ in range(3):  # on a busy machine processes may start too late
        runner = StageRunner("DirectRunner", 2, options, 20, tmp_path)
        with (
            pytest.raises(UserError, match=r"no worker of --runner=DirectRunner .* for 20 seconds, and") as told,
            runner,
        ):
            runner.run("stage", work, _tasks(tmp_path, "", "killed"))
        if "and 1 tasks" in str(told.value):
            break
    assert "and 1 tasks" in str(told.value)
    end = time.monotonic() + 5
    while _alive():
        assert time.monotonic() < end
        time.sleep(0.05)
    with StageRunner("DirectRunner", 2, options, 60, tmp_path) as runner:
        runner.run("stage", work, tasks := _tasks(tmp_path, "", ""))
        with pytest.raises(UserError, match="^the user is mistaken; be right$"):
            runner.run("other", work, [FileTask(tmp_path / "other", "mistake")])
    assert all(task.is_done() for task in tasks)
