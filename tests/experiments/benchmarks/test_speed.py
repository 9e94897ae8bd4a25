"""The speed benchmark at the smallest preset: what it prints and writes, and a user's mistakes."""

import dataclasses
import json
import re
import types

import jax
import pytest

from experiments.benchmarks import speed
from varedit_jax import hardware
from varedit_jax.analysis import benchmark as benchmark_lib
from varedit_jax.config import DataConfig, MeshConfig, RunConfig, preset
from varedit_jax.parallel.mesh import make_mesh
from varedit_jax.scales import editor_pyramid
from varedit_jax.training.flops import CONVENTION, example_flops
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.step import make_step

pytestmark = pytest.mark.subprocess


@pytest.fixture(scope="module")
def answers(run_program, tmp_path_factory):
    """The program, run with one block instead of three, and with mistakes."""
    figures = tmp_path_factory.mktemp("benchmark") / "figures.json"
    lines = {
        "good": ["--depth=1", "--repeats=2", f"--json={figures}"],
        "what": ["--what=train,fly"],
        "pixels": ["--preset=2b", "--pixels=300"],
        "tiny pixels": ["--pixels=256"],
        "mesh": ["--mesh=fsdp=3"],
        "text": ["--preset=2b", "--text=huge"],
        "accumulation": ["--accumulation=2"],
        "attention": ["--attention=cudnn", "--what=train"],
        "text features": ["--text_features"],
    }
    # A third of the time to compile; the programs run but a few times.
    quick = "import os; os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=0'"
    answers = run_program("benchmarks.speed", lines, setup=quick)
    assert answers["good"][0] == 0, answers["good"][2]
    return answers, json.loads(figures.read_text())


def test_figures(answers):
    """Times, speed and memory where available; no MFU on a CPU."""
    figures = answers[1]
    train, edit = figures["rows"]
    assert (train["what"], train["attention"], train["remat"], edit["what"]) == ("train", "auto", "named", "edit")
    for row in (train, edit):
        assert 0 < row["min_s"] <= row["quartiles_s"][0] <= row["median_s"] <= row["quartiles_s"][1]
        assert row["repeats"] == 2 and row["planned_gib"] > 0 and row["peak_gib"] is None and "mfu" not in row
        assert row["batch"] == 1 and row["examples_per_s"] == pytest.approx(1 / row["median_s"])
    assert train["processor_s"] > 0
    assert edit["weights_gib"] > 0 and edit["compile_s"] == pytest.approx(sum(x["compile_s"] for x in edit["stages"]))
    flops = example_flops(preset("tiny"), editor_pyramid(preset("tiny")), 16)
    about = figures["about"]
    assert about["tokens"] == flops.tokens == 37
    assert 0 < about["tflop_per_example"] < flops.training / 1e12  # two blocks less
    assert train["tflops_per_chip"] == pytest.approx(about["tflop_per_example"] / train["median_s"])
    assert figures["device"]["device"] == "cpu" and figures["device"]["peak_tflops_per_chip"] is None


def test_stages_of_an_edit(answers):
    """Each has its first call, which compiles, the later ones, memory, and the floor: as figures and in a table."""
    stages = answers[1]["rows"][1]["stages"]
    names = ["source", "text", "prefill", "begin", "scale 0", "scale 1", "scale 2", "decode"]
    assert [row["stage"] for row in stages] == names
    for row in stages:
        assert 0 < row["min_s"] <= row["median_s"] < row["first_s"] and 0 < row["compile_s"] < row["first_s"]
        assert row["repeats"] == 2 and row["planned_gib"] > 0 and "floor_s" not in row  # the CPU's speed is not known
        assert row["floor_tflop"] > 0 and row["floor_gb"] > 0 or row["stage"] == "begin"
    table = answers[0]["good"][1].partition("stages of an edit of 1, waiting for each")[2]
    lines = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    assert lines[2:] == [f"| {name}" for name in names]


def test_stages_beside_the_floor_of_a_known_chip():
    stage = {"stage": "decode", "first_s": 2.0, "quartiles_s": [0.1, 0.3], "median_s": 0.2, "min_s": 0.1}
    stage |= {"floor_tflop": 2.5, "floor_gb": 0.2, "floor_s": 0.05, "planned_gib": 1.5}
    shown = speed._stages({"batch": 4, "weights_gib": 17.0, "stages": [stage]})
    assert "| decode | 2 | 200 (100, 100 to 300) | 2.5 | 0.2 | 50 | 4.00 | 1.5 |" in shown


@pytest.fixture
def bench(monkeypatch):
    """A benchmark that records its programs, and takes a second for each."""
    monkeypatch.setattr(benchmark_lib.Benchmark, "_train", lambda self, run: ran.append(run) or {"median_s": 1.0})
    ran = []
    run = RunConfig(name="test", model=preset("tiny"), data=DataConfig(batch_size=1, text_tokens=5))
    return benchmark_lib.Benchmark(run=run, mesh=make_mesh(MeshConfig())), ran


def test_attention_is_compared_where_there_is_a_kernel(bench):
    """On a CPU there is none, which a row says; a program of two rows runs once."""
    bench, ran = bench
    train, (plain, auto) = bench.train(), list(bench.attention())
    assert (plain["attention"], plain["median_s"]) == ("plain", 1.0) and train["attention"] == "auto"
    assert auto["note"] == "no fast kernel for the platform cpu and heads of 16 channels in float32"
    assert [run.model.transformer.attention for run in ran] == ["plain"]


def test_remat_policies(bench):
    """Each with the share that it recomputes, which is zero without rematerialization."""
    bench, ran = bench
    rows = list(bench.remat())
    assert [row["remat"] for row in rows] == [run.model.transformer.remat for run in ran] == ["full", "named", "none"]
    full, named, none = (row["again_of_forward"] for row in rows)
    assert full >= named > none == 0
    assert 0.9 < full < 1.1  # the blocks' forward pass, with RoPE's product


def test_features_of_texts_take_the_place_of_frozen_encoders(bench):
    """The step takes them, and no frozen weights."""
    run = bench[0].run
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, features="precomputed"))
    bench = dataclasses.replace(bench[0], run=run, text_features=True)
    optimizer, pyramid = make_optimizer(run.optimizer, run.steps), editor_pyramid(run.model)
    arguments = bench._abstract(run, pyramid, optimizer)
    assert arguments[1] == {} and arguments[2]["text_features"].shape == (1, 5, run.model.text.width)
    with jax.set_mesh(bench.mesh):
        state, metrics = jax.eval_shape(make_step(run, pyramid, optimizer), *arguments)
    assert metrics["loss"].shape == () and jax.tree.structure(state) == jax.tree.structure(arguments[0])


def test_what_is_printed(answers):
    """The size, a reduced depth, the convention, and one line per row."""
    out = answers[0]["good"][1]
    assert "tiny: depth 1 of 3 (REDUCED DEPTH), 16 x 16 px, 37 tokens" in out
    assert re.search(r"of processors \d.*\n\nmost memory of this process on its host: \d.* GiB\n$", out, re.DOTALL)
    assert CONVENTION in out and "unknown, so no MFU" in out
    lines = [line.split(" | ")[0] for line in out.partition("stages of an edit")[0].splitlines()]
    assert [line for line in lines if line.startswith("| ")][1:] == ["| train", "| edit"]


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("what", "--what=fly is unknown; give some of train, edit, attention, remat"),
        ("pixels", "--pixels is 300; give one of 256, 512, 768, 1024, and none with --preset=tiny"),
        ("tiny pixels", "--pixels is 256; give one of 256, 512, 768, 1024, and none with --preset=tiny"),
        ("mesh", "mesh data 1 x fsdp 3 x tensor 1 does not fit 1 devices"),
        ("text", "unknown text encoder 'huge'; known are small, base, large, xl, xxl"),
        ("accumulation", "data.batch_size 1 does not divide into optimizer.accumulation=2 microbatches"),
        ("text features", "--text_features needs --features=precomputed, not online"),
        ("attention", "attention is 'cudnn', which needs a compute type of 16 bits, as bfloat16, not float32"),
    ],
)
def test_mistakes(answers, case, sentence):
    code, _, err = answers[0][case]
    assert code == 1 and err.count("\n") == 1 and err.startswith(f"error: {sentence}")


def test_too_little_memory_is_a_row():
    def fail(message):
        raise jax.errors.JaxRuntimeError(message)

    row = benchmark_lib._guarded(lambda: fail("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes."))
    assert row == {"note": "out of memory"}
    shown = speed._line({"what": "remat", "batch": 8, "attention": "auto", "remat": "none", **row})
    assert shown == "| remat | 8 | auto | none | out of memory | | | | |"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        benchmark_lib._guarded(lambda: fail("INTERNAL: a defect"))


def test_a_peak_is_a_rows_own_only_where_it_rose(bench, monkeypatch):
    """The device's peak is that of all rows so far."""
    monkeypatch.setattr("varedit_jax.hardware.memory", lambda devices: {"peak": 3 * hardware.GIB})
    program = types.SimpleNamespace(memory_analysis=lambda: None)
    assert bench[0]._memory(program, 2 * hardware.GIB) == {"peak_gib": 3.0, "peak_at_most_gib": 3.0}
    row = bench[0]._memory(program, 3 * hardware.GIB)
    assert row == {"peak_gib": None, "peak_at_most_gib": 3.0}
    shown = {"what": "edit", "batch": 1, "quartiles_s": [1, 1], "min_s": 1, "median_s": 1, "examples_per_s": 1, **row}
    assert speed._line(shown).endswith("| peak at most 3 |")


def test_a_known_chip_has_an_mfu():
    row = {"what": "train", "batch": 8, "attention": "cudnn", "remat": "none", "quartiles_s": [1.0, 1.2], "min_s": 0.9}
    row |= {"median_s": 1.1, "examples_per_s": 7.27, "tflops_per_chip": 350.0, "mfu": 0.354, "mfu_with_encoders": 0.38}
    row |= {"planned_gib": 100.0, "peak_gib": 98.5}
    assert speed._line(row).endswith("| 350 | 35.4%, with encoders 38.0% | 100 planned, 98.5 peak |")
