"""Scores: what counts as done, kept and exact over groups of edits."""

import numpy as np
import pytest

from data_pipelines.shapes.judge import Verdict
from experiments import shapes_scoring as scoring


def test_target_is_exact_and_source_is_only_kept(records: list[dict]) -> None:
    for side, expected in (("target", (1.0, 1.0, 1.0)), ("source", (0.0, 1.0, 0.0))):
        images = np.stack([record[side] for record in records])
        total = scoring.by_group(scoring.judge_records(images, records), records)["all"]
        assert (total.done, total.kept, total.exact) == expected
        assert total.edits == 50


def test_groups_partition_the_edits(records: list[dict]) -> None:
    verdicts = [Verdict(done=i % 2 == 0, kept=i % 3 == 0) for i in range(50)]
    groups = scoring.by_group(verdicts, records)
    assert groups["all"].exact == pytest.approx(9 / 50)  # multiples of 6 below 50
    kinds = [score for name, score in groups.items() if name in scoring.KINDS]
    assert sum(score.edits for score in kinds) == 50
    assert groups["unseen scene"].edits + groups["unseen combination"].edits == 50


def test_table_shows_baselines_beside_the_editor() -> None:
    def scores(exact: float) -> dict[str, scoring.Score]:
        return {"all": scoring.Score(200, exact, 1.0, exact)}

    text = scoring.table({"copy": scores(0.0), "oracle": scores(1.0), "editor": scores(0.875)})
    header, line = text.splitlines()
    assert header.split() == ["edits", "n", "copy", "oracle", "editor", "done", "kept"]
    assert line.split() == ["all", "200", "0.0%", "100.0%", "87.5%", "87.5%", "100.0%"]


def test_sheet_marks_right_and_wrong_edits(records: list[dict]) -> None:
    some = records[:3]
    images = np.stack([[record["source"] for record in some], [record["target"] for record in some]])
    right = scoring.sheet(some, images, "heading")
    wrong = scoring.sheet(some, images[::-1], "heading")
    assert right.size == wrong.size
    assert np.any(np.asarray(right) != np.asarray(wrong))
