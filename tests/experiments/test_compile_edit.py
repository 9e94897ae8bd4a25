"""The stages of a small edit compiled ahead for a TPU, with the real compiler: figures, bounds, and mistakes."""

import json

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.subprocess, pytest.mark.tpu]

CONFIG = """
import dataclasses
from varedit_jax.config import DataConfig, RunConfig, SamplingConfig, preset

def get_config() -> RunConfig:
    model = preset("tiny")
    transformer = dataclasses.replace(model.transformer, depth=3, width=256, heads=2)
    return RunConfig(
        name="small",
        model=dataclasses.replace(model, transformer=transformer),
        data=DataConfig(text_tokens=16),
        sampling=SamplingConfig(guidance=(4.0, 4.0, 1.0)),
    )
"""


@pytest.fixture(scope="module")
def answers(run_program, tmp_path_factory):
    """The program on two stages, as far as memory and as a whole, and with mistakes."""
    directory = tmp_path_factory.mktemp("edit")
    config = directory / "config.py"
    config.write_text(CONFIG)
    good = [f"--config={config}", "--topology=v5e:1x1", "--text_tokens=16"]
    memory = [*good, "--stages=prefill,scale_1", "--memory_only"]
    lines = {
        "memory": [*memory, f"--json={directory / 'memory.md'}", f"--programs={directory / 'programs'}"],
        "whole": [*good, "--stages=last,decode", f"--json={directory / 'whole.md'}", "--max_weight_reads=0.001"],
        "fits": [*good, "--stages=begin", "--hbm_gib=0.001"],
        "stages": [*good, "--stages=prefill,scale_9"],
        "pixels": [*good, "--pixels=512"],
        "topology": ["--preset=8b", "--depth=2", "--topology=v9:1x1"],
        "tiny": ["--preset=tiny", "--pixels=512", "--topology=v5e:1x1"],
    }
    return run_program("compile_edit", lines), directory


def rows(answers, name):
    lines = (answers[1] / f"{name}.jsonl").read_text().splitlines()
    *stages, total = map(json.loads, lines)
    return {row["stage"]: row for row in stages}, total


def test_memory_alone(answers):
    """Each stage has its memory, its work beside the floor, and kernels; nothing is in the way."""
    code, out, err = answers[0]["memory"]
    assert code == 0, err
    stages, total = rows(answers, "memory")
    assert list(stages) == ["prefill", "scale 1"] and total["of_stages"] == 8
    for row in stages.values():
        memory = row["memory"]
        assert row["compiled"] == "memory" and row["fits"] and row["guided"] and "estimated_s" not in row
        assert 0 < memory["arguments_gib"] < memory["needed_gib"] < 1 and memory["beside_gib"] > 0
        assert row["floor"]["tflop"] <= row["tflop"]  # whole tiles, at this size
        assert row["gb"] > 0.5 * row["floor"]["gb"]
        assert row["kernel_calls"] == 2 * 3  # to itself and to the text, in three blocks
        assert row["scores"] == [] and not any(x.startswith("convert") for x in row["whole_stacks"])
    assert stages["scale 1"]["memory"]["donated_gib"] > 0  # written in the place of what it was given
    assert total["transformer"]["tflop_to_floor"] == pytest.approx(total["tflop"] / total["floor"]["tflop"])
    assert (answers[1] / "programs" / "scale_1.hlo").read_text().startswith("HloModule")
    assert "| prefill | " in out and "2 of 8 stages" in out


def test_whole_compilation_and_a_bound(answers):
    """Seconds are estimated; a bound that is passed ends the program behind its figures."""
    code, out, err = answers[0]["whole"]
    stages, total = rows(answers, "whole")
    assert code == 1 and "--max_weight_reads=0.001" in err and "Traceback" not in err
    assert not stages["scale 2"]["guided"] and stages["scale 2"]["estimated_s"] > 0
    assert total["estimated_s"] == pytest.approx(sum(row["estimated_s"] for row in stages.values()))
    assert "estimated by the compiler" in out and "scores" not in stages["decode"]


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("fits", "begin does not fit: it needs "),
        ("stages", "--stages=scale_9 is unknown; give all, or some of source, text, prefill, begin, scale_0"),
        ("pixels", "--pixels=512 is for --preset; --config="),
        ("topology", "topology 'v9:1x1' is unknown"),
        ("tiny", "--pixels is 512; give one of 256, 512, 768, 1024, and none with --preset=tiny"),
    ],
)
def test_mistakes(answers, case, sentence):
    """One sentence, exit code 1."""
    code, _, err = answers[0][case]
    assert code == 1 and err.splitlines()[-1].startswith(f"error: {sentence}") and "Traceback" not in err
