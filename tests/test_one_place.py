"""Mechanisms that have one place in the project: paths, atomic writes, lines, locks, full disks, reasons, images."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("varedit_jax", "data_pipelines", "experiments")

# Paths that no user gave: of the project's own files, of the system's, and of temporary directories.
OWN_PATHS = {
    "data_pipelines/browse.py": "__file__",
    "data_pipelines/sources/join.py": "pathlib.Path(name)",  # a temporary directory
    "experiments/benchmarks/harness.py": "/proc/",
    "varedit_jax/training/goodput.py": "/proc/",
    "varedit_jax/training/metrics.py": "self._local.name",
    "varedit_jax/training/profile.py": "self._local.name",
    "varedit_jax/training/watchdog.py": "tempfile.gettempdir()",
    "varedit_jax/weights/reader.py": "",  # a temporary copy of what lies in a bucket
}


def lines(pattern: str) -> list[tuple[str, str]]:
    """(file, line) of every line of code in the packages that `pattern` is found in."""
    return [
        (path.relative_to(ROOT).as_posix(), line)
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for line in path.read_text().splitlines()
        if re.search(pattern, line)
    ]


def test_paths_of_users_are_made_in_storage_alone() -> None:
    found = lines(r"(pathlib|epath)\.Path\(")
    assert any(file == "varedit_jax/storage/paths.py" for file, _ in found)
    outside = [(file, line) for file, line in found if not file.startswith("varedit_jax/storage/")]
    assert [entry for entry in outside if OWN_PATHS.get(entry[0], "?") not in entry[1]] == []


@pytest.mark.parametrize(
    ("pattern", "place"),
    [
        (
            r"os\.(replace|rename)\(|\.fsync\(|(draft|staging|partial)\.(replace|rename)\(",
            "varedit_jax/storage/files.py",
        ),
        (r"\bflock\b|import filelock|fcntl", "varedit_jax/storage/lock.py"),
        (r"errno\.(ENOSPC|EDQUOT|EFBIG)", "varedit_jax/storage/disk.py"),
        (r"open\(\"ab\", buffering=0", "varedit_jax/storage/jsonl.py"),
        (r"enum\.StrEnum\)", "data_pipelines/reasons.py"),
        (r"\bImage\.open\(", "varedit_jax/images.py"),
        (r"\btqdm\b\.", "varedit_jax/progress.py"),
        (r"import tensorflow_datasets", "data_pipelines/quiet_tfds.py"),
    ],
    ids=["atomic replacement", "locks", "full disks", "lines", "reasons", "opening of images", "progress", "TFDS"],
)
def test_each_mechanism_has_one_place(pattern: str, place: str) -> None:
    """A peer that a benchmark compares with stands on its own."""
    assert {file for file, _ in lines(pattern)} - {"experiments/benchmarks/data_peer.py"} == {place}
