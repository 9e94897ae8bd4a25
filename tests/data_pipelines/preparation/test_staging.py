"""The staging directory of a data set in preparation, where the output is a link."""

import pathlib

import pytest

from data_pipelines.preparation.staging import Staging
from varedit_jax.errors import UserError
from varedit_jax.storage.paths import child_names


def test_an_output_on_a_link_is_written_where_it_points(tmp_path: pathlib.Path) -> None:
    """Staging lies there, too: on the disk that was chosen for its room. An interrupted job is found again."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/set")
    for finished in (False, True):
        with Staging(tmp_path / "out", {"job": 1}) as staging:
            assert staging.directory == tmp_path / "disk" / ".set.partial"
            if finished:
                assert (staging.directory / "out" / "x").exists()
                staging.finish()
            else:
                (staging.directory / "out").mkdir()
                (staging.directory / "out" / "x").touch()
    assert (tmp_path / "out").is_symlink() and child_names(tmp_path) == ["disk", "out"]
    assert child_names(tmp_path / "disk") == ["set"] and child_names(tmp_path / "out") == ["x"]
    with pytest.raises(UserError, match="disk/set exists; give a new directory, or remove it first"):
        Staging(tmp_path / "out", {"job": 1})
