"""The conversion program: what it prints, and exit code 1 with one sentence for what cannot be done."""

import json
import pathlib

import pytest

pytestmark = pytest.mark.subprocess

DATA = pathlib.Path(__file__).parents[1] / "data"
TRANSFORMER = f"--transformer={DATA / 'golden' / 'mini_a' / 'transformer.pth'}"
TOKENIZER = f"--tokenizer={DATA / 'golden' / 'mini_a' / 'vae.pth'}"
SHIPPED = DATA.parents[1] / "varedit_jax" / "data" / "shapes"

REFUSED = {
    "nothing to convert": (["--output=x"], "give at least one of --transformer, --tokenizer and --text"),
    "no output": ([TRANSFORMER, "--family=varedit"], "--output is missing; give a new directory"),
    "no input": (["--to=torch", "--output=x"], "--to=torch needs --input, a directory of weights or of a run"),
    "not weights": (
        ["--to=torch", "--output=x", f"--input={DATA}"],
        "is not the directory of a run: it has no config",
    ),
    "unknown family": ([TRANSFORMER, "--output=x"], "give --family=varedit or --family=infinity"),
    "no such file": (["--transformer=varedit.pth", "--output=x"], "varedit.pth does not exist"),
    "no published form": (
        ["--to=torch", f"--input={SHIPPED}", "--output=x"],
        "the transformer has parameters that published models do not have: position_embed/kernel",
    ),
    "a file to verify": ([f"--verify={DATA / 't5_prompts.json'}"], "is no directory; give one that a conversion wrote"),
    "a file as input": (
        ["--to=torch", f"--input={DATA / 't5_prompts.json'}", "--output=x"],
        "is a file, where a directory of weights or of a run should be",
    ),
    "settings alone": (
        [f"--transformer={DATA / 'trainer_values.pth'}", "--family=varedit", "--output=x"],
        "there is no tensor word_embed.weight, which every published transformer has, but trainer.gpt_wo_ddp.plain",
    ),
    "unknown preset": (["--dry_run", "--preset=9b"], "unknown preset '9b'; known are tiny, 125m"),
    "no manifest": ([f"--verify={SHIPPED}"], "has no manifest.json: there is nothing to verify it by"),
    "no published form, dry": (["--dry_run", "--to=torch", f"--input={SHIPPED}"], "published models do not have"),
}
WORKING = {
    "8b": ["--dry_run", "--preset=8b", "--to=torch"],
    "half": ["--dry_run", "--preset=125m", "--to=torch", "--dtype=bfloat16", "--parts=tokenizer", "--parts=text"],
    "of files": ["--dry_run", TRANSFORMER, TOKENIZER, "--family=infinity"],
}


@pytest.fixture(scope="module")
def answers(run_program, tmp_path_factory) -> dict[str, tuple[int, str, str]]:
    lines = {name: arguments for name, (arguments, _) in REFUSED.items()} | WORKING
    return run_program("convert", lines, directory=tmp_path_factory.mktemp("convert"))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(answers, name):
    code, _, err = answers[name]
    assert code == 1, err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert REFUSED[name][1] in err


def test_dry_run_of_a_size(answers):
    """One published tensor per line: name, shape, type and destination."""
    code, out, _ = answers["8b"]
    assert code == 0
    published = json.loads((DATA / "state_dict" / "varedit_8b.json").read_text())
    lines = out.splitlines()
    assert len(lines) == len(published)
    for line, (name, (shape, dtype)) in zip(sorted(lines), sorted(published.items()), strict=True):
        assert line.startswith(f"{name} {shape} {dtype} <-> ")
    assert "block_chunks.7.module.4.sa.mat_qkv.weight [10752, 3584] float32 <-> " in out
    assert "<-> transformer/blocks/self_attention/qkv_kernel[38] (matrix)" in out
    assert "sa.zero_k_bias [3584] float32 <-> made: zeros" in out


def test_dry_run_of_other_parts_and_of_files(answers):
    code, out, _ = answers["half"]
    assert code == 0
    assert "encoder.conv_in.conv.weight [128, 3, 3, 3] bfloat16 <-> tokenizer/encoder/conv_in/kernel (conv)" in out
    assert "quantizer.lfq.mask [32] int64 <-> made: powers" in out
    assert "encoder.block.23.layer.0.SelfAttention.o.weight [2048, 2048] bfloat16" in out
    code, out, err = answers["of files"]
    assert code == 0
    warned = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1 and "0.25M is a guess, --pixel_budget states it" in warned[0]
    assert "head.weight [32, 128] float16 <-> transformer/head/kernel (matrix)" in out
    assert len(out.splitlines()) > 200
