"""The benchmarks' harness: time and memory of programs, directories, and the report."""

import json
import pathlib
import re
import sys
import time

import psutil
import pytest
from absl import flags

from experiments.benchmarks import harness
from varedit_jax import command
from varedit_jax.errors import UserError

pytestmark = pytest.mark.subprocess

MIB = 2**20
HOLD = "import time\nheld = b'x' * (150 * 2**20)\ntime.sleep(0.7)\n"
PROGRAMS = {
    "holds": HOLD,
    "starts": "import subprocess, sys\nsubprocess.run([sys.executable, '-m', 'holds'], check=True)\n",
    "sleeps": "import time; time.sleep(0.5)",
    "fails": "raise SystemExit(3)",
}


@pytest.fixture
def programs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in PROGRAMS.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("programs")
def test_memory_is_of_the_process_with_its_descendants(capfd: pytest.CaptureFixture[str]) -> None:
    alone = harness.run_program("holds", title="A title")
    assert 150 * MIB < alone.peak_bytes < 400 * MIB and 0.7 < alone.seconds < 60
    assert "=== A title\n$ python -m holds" in capfd.readouterr().out
    assert harness.run_program("starts").peak_bytes > alone.peak_bytes
    assert harness.run_program("sleeps").peak_bytes < 100 * MIB  # whatever this process holds


@pytest.mark.usefixtures("programs")
def test_a_program_that_fails_is_a_sentence() -> None:
    with pytest.raises(UserError, match="^fails ended with exit code 3; its output is above$"):
        harness.run_program("fails")


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.usefixtures("programs")
def test_a_program_is_killed_with_its_descendants(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[psutil.Process] = []
    descendants = harness.family

    def family(pid: int) -> list[psutil.Process]:
        found.extend(descendants(pid))
        return found

    monkeypatch.setattr(harness, "family", family)
    before = set(psutil.Process().children(recursive=True))  # of other tests in this process
    harness.kill_program(
        lambda: len({*psutil.Process().children(recursive=True)} - before) > 1, "a longer one", "starts"
    )
    assert len(found) == 2
    deadline = time.monotonic() + 10  # the system takes a moment, and nobody may collect an orphan
    while any(map(_lives, found)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(_lives, found))
    with pytest.raises(UserError, match="^sleeps ended before it could be killed; give a longer one$"):
        harness.kill_program(lambda: False, "a longer one", "sleeps")


def test_a_scratch_directory_is_new_and_goes(tmp_path: pathlib.Path) -> None:
    with harness.scratch_directory(f"{tmp_path}/a/b") as directory:
        (directory / "file").touch()
        with pytest.raises(UserError, match="a/b exists; give a new directory"):
            harness.new_directory(str(directory))
    assert not directory.exists() and directory.parent.exists()
    with pytest.raises(UserError, match="--directory is gs://bucket/x, but it has to be on a local disk"):
        harness.new_directory("gs://bucket/x")


def test_a_report_shows_flags_for_paths() -> None:
    flag = command.DEFINE_path("path_of_a_test", "", "")
    flags.FLAGS["path_of_a_test"].parse("a/b")
    flags.FLAGS["path_of_a_test"].present = 1
    try:
        assert harness.command_line("some", flag) == "python -m some --path_of_a_test=a/b"
    finally:
        delattr(flags.FLAGS, "path_of_a_test")


def test_a_report_has_command_date_and_machine_but_no_path_of_it(tmp_path: pathlib.Path) -> None:
    values = flags.FlagValues()
    given = [
        flags.DEFINE_string("directory", None, "", flag_values=values),
        flags.DEFINE_list("sizes", ["1"], "", flag_values=values),
        flags.DEFINE_bool("zeros", False, "", flag_values=values),
        flags.DEFINE_integer("rounds", 3, "", flag_values=values),
        flags.DEFINE_string("output", "", "", flag_values=values),
    ]
    values(["program", "--directory=/home/somebody/x", "--sizes=2,3", "--zeros", f"--output={tmp_path}/a.md"])
    line = harness.command_line("experiments.benchmarks.some", *given)
    assert line == "python -m experiments.benchmarks.some --directory=... --sizes=2,3 --zeros --output=..."
    text = harness.report("Title", line, "About it.", harness.table(("a", "b"), [(1, "x")]), "", "The end.")
    expected = rf"# Title\n\n    {re.escape(line)}\n\n\d{{4}}-\d\d-\d\d, \d+ cores, .+; Python "
    expected += rf"{sys.version_info.major}\.[\d.]+, jax [\d.]+\. About it\.\n\n"
    expected += r"\| a \| b \|\n\| --- \| --- \|\n\| 1 \| x \|\n\nThe end\.\n"
    assert re.fullmatch(expected, text)
    harness.publish(text, values.output)
    assert pathlib.Path(values.output).read_text() == text


def test_ratios_are_within_a_round_and_show_their_range() -> None:
    limit = [(100.0, 50.0), (200.0, 100.0), (400.0, 200.0)]  # the machine gets faster
    half = [(50.0, 25.0), (120.0, 50.0), (160.0, 100.0)]
    assert harness.compared(half, limit) == ["120", "50", "0.50 (0.40 to 0.60)", "0.50 (0.50 to 0.50)"]
    assert harness.compared(limit, limit)[2:] == ["1.00 (1.00 to 1.00)"] * 2


def test_figures_are_on_disk_as_soon_as_they_are_measured(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with harness.kept_figures(str(tmp_path / "data.md")) as keep:
        for number in range(2):
            keep({"round": number})
            lines = (tmp_path / "data.jsonl").read_text().splitlines()
            assert [json.loads(line) for line in lines] == [{"round": done} for done in range(number + 1)]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [{"round": 0}, {"round": 1}]


def test_a_peer_with_another_decoder_is_refused(tmp_path: pathlib.Path) -> None:
    harness.check_pillow(sys.executable)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 1.2.3\n")
    python.chmod(0o755)
    with pytest.raises(UserError, match=r"has Pillow 1\.2\.3, .* install pillow=="):
        harness.check_pillow(str(python))
