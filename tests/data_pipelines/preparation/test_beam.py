"""Runners of Beam that do not run, each told in one sentence."""

import contextlib
import pathlib

import pytest

from tests.data_pipelines.preparation.test_stages import FileTask, work
from varedit_jax.errors import UserError

beam = pytest.importorskip("data_pipelines.preparation.beam")


def _run(directory: pathlib.Path, runner: str, *options: str) -> FileTask:
    task, log = FileTask(directory / "done"), directory / "runner.log"
    (directory / "messages").mkdir()
    with log.open("w", buffering=1) as file, contextlib.redirect_stderr(file):
        beam.run(runner, options, "stage", work, [task], directory / "messages", log)
    return task


@pytest.mark.parametrize(
    ("runner", "options", "said"),
    [
        ("Nope", [], r"^Apache Beam has no runner 'Nope' here \(.*\); DirectRunner works everywhere$"),
        ("no.such.Runner", [], r"^Apache Beam has no runner 'no\.such\.Runner' here \(No module named 'no'\); "),
        ("DirectRunner", ["workers=3"], r"^--runner_options has 'workers=3'; each is --NAME=VALUE"),
        ("DirectRunner", ["--no_such=3"], r"^--runner_options has --no_such, but DirectRunner has no such option"),
        ("DirectRunner", ["--direct_num_workers=x"], r"direct_num_workers: invalid int value: 'x'; check --runner_opt"),
        ("DirectRunner", ["--direct_running_mode=fast"], r"failed: .*direct_running_mode: invalid choice: 'fast'"),
        ("DaskRunner", ["--dask_client_adress=x"], r"--dask_client_adress, but DaskRunner has no such option; correct"),
        ("DaskRunner", ["--dask_client_address=ftp://x"], r"^--runner=DaskRunner failed: ValueError: .*'ftp'"),
        ("PortableRunner", [], r"^--runner=PortableRunner failed: .*specify a --job_endpoint"),
        ("PortableRunner", ["--job_endpoint=localhost:1", "--job_server_timeout=1"], r"^no job service .*within 1 s"),
        ("DataflowRunner", [], r"^--runner=DataflowRunner failed: .*region"),
    ],
)  # fmt: skip
def test_a_runner_that_cannot_run_is_one_sentence(
    tmp_path: pathlib.Path, runner: str, options: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        _run(tmp_path, runner, *options)
    assert "\n" not in str(caught.value)


def test_an_extra_that_is_missing_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> None:
        raise ModuleNotFoundError("No module named 'dask'", name="dask")

    monkeypatch.setattr(beam, "create_runner", without)
    with pytest.raises(UserError, match=r"--runner=DaskRunner needs the packages dask and .* 'varedit-jax\[dask\]'"):
        _run(tmp_path, "DaskRunner")


def test_tasks_are_done_on_beam(tmp_path: pathlib.Path) -> None:
    assert _run(tmp_path, "FnApiRunner").is_done()
    assert list((tmp_path / "messages").iterdir()) == []
