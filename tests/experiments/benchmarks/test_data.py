"""The loader's benchmark: ratios within a round, figures kept as they come, decoders of one release."""

import json
import pathlib

import pytest
from absl.testing import flagsaver

from experiments.benchmarks import data
from varedit_jax.errors import UserError


def test_ratios_are_within_a_round_and_show_their_range() -> None:
    limit = [(100.0, 50.0), (200.0, 100.0), (400.0, 200.0)]  # the machine gets faster
    half = [(50.0, 25.0), (120.0, 50.0), (160.0, 100.0)]
    assert data._figures(half, limit) == ["120", "50", "0.50 (0.40 to 0.60)", "0.50 (0.50 to 0.50)"]
    assert data._figures(limit, limit)[2:] == ["1.00 (1.00 to 1.00)"] * 2


def test_figures_are_on_disk_as_soon_as_they_are_measured(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with flagsaver.flagsaver(output=str(tmp_path / "data.md")), data._kept() as keep:
        for number in range(2):
            keep({"round": number})
            lines = (tmp_path / "data.jsonl").read_text().splitlines()
            assert [json.loads(line) for line in lines] == [{"round": done} for done in range(number + 1)]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [{"round": 0}, {"round": 1}]


def test_a_peer_with_another_decoder_is_refused(tmp_path: pathlib.Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 1.2.3\n")
    python.chmod(0o755)
    with (
        flagsaver.flagsaver(peer_python=str(python)),
        pytest.raises(UserError, match=r"has Pillow 1\.2\.3, .* install pillow=="),
    ):
        data._contestants(tmp_path, 256)
