"""Ahead-of-time compilation: the JSON line of a small editor's step for a TPU, with the real compiler, and mistakes."""

import json

import jax
import jax.numpy as jnp
import pytest

from varedit_jax.analysis import ahead, compiled, jobs
from varedit_jax.analysis.ahead import find_batch
from varedit_jax.analysis.jobs import Target
from varedit_jax.analysis.operations import count_step
from varedit_jax.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, preset
from varedit_jax.errors import UserError
from varedit_jax.scales import editor_pyramid
from varedit_jax.training.flops import run_flops

pytestmark = [pytest.mark.slow, pytest.mark.subprocess, pytest.mark.tpu]

H100 = "NVIDIA H100 80GB HBM3"
CONFIG = """
import dataclasses
from varedit_jax.config import DataConfig, RunConfig, preset

def get_config(variant: str = "") -> RunConfig:
    model = preset("tiny")
    transformer = dataclasses.replace(
        model.transformer, depth=2, width=128, heads=1, remat="full", attention="plain", dtype="bfloat16"
    )
    return RunConfig(
        name="small",
        model=dataclasses.replace(model, transformer=transformer),
        data=DataConfig(batch_size=8, text_tokens=16, features=variant or "online"),
    )
"""


@pytest.fixture(scope="module")
def answers(run_program, tmp_path_factory):
    """The program: split parameters and images, its text read again, copied parameters and features, and mistakes."""
    config = tmp_path_factory.mktemp("config") / "config.py"
    config.write_text(CONFIG)
    text = config.with_name("program.hlo")
    good = [f"--config={config}", "--topology=v5e:2x2"]
    features = [f"--config={config}:precomputed", "--topology=v5e:2x2"]
    lines = {
        "fsdp": [*good, "--mesh=fsdp=4", "--accumulation=2", "--text_tokens=8", "--what=all", "--images=3"]
        + [f"--program={text}", "--max_moves=0.001"],
        "read": [*good, "--mesh=fsdp=4", "--accumulation=2", "--text_tokens=8", f"--read_program={text}"],
        "gathers": [*good, "--mesh=fsdp=4", "--accumulation=2", "--text_tokens=8", f"--read_program={text}"]
        + ["--max_exposed_gathers=0"],
        "memory": [*good, "--mesh=fsdp=4", "--accumulation=2", "--text_tokens=8", "--memory_only"],
        "gpu_memory": [*good, "--mesh=fsdp=4", "--accumulation=2", "--text_tokens=8", "--memory_only"]
        + [f"--stand_in_for={H100}"],
        "gpu": [*good, "--mesh=fsdp=4", "--accumulation=2", "--text_tokens=8", f"--read_program={text}"]
        + [f"--stand_in_for={H100}"],
        "data": [*features, "--mesh=data=4", "--hbm_gib=0.001"],
        "two": [*good, f"--program={text}", "--find_batch"],
        "stand_in": [*good, "--stand_in_for=H100"],
        "no_program": [*good, "--read_program=nowhere.hlo"],
        "no_hlo": [*good, f"--read_program={config}"],
        "topology": [f"--config={config}", "--topology=v7q:2x2"],
        "mesh": [*good, "--mesh=fsdp=3"],
        "axis": [*good, "--mesh=depth=3"],
        "batch": [*good, "--mesh=fsdp=4", "--global_batch=6"],
        "accumulation": [*good, "--global_batch=9", "--accumulation=2"],
        "tensor": [*good, "--mesh=tensor=4"],
        "attention": [*good, "--config.model.transformer.attention=cudnn"],
        "slices": [*good, "--slices=2", "--mesh=fsdp=8"],
        "what": [*good, "--find_batch", "--what=sampling"],
        "alone": [*good, f"--program={text}", "--memory_only"],
        "bound": [*good, "--max_moves=0.1", "--memory_only"],
    }
    return run_program("compile_ahead", lines)


def rows(answer, code=0):
    """The lines on standard output, by what was compiled."""
    found, out, err = answer
    assert found == code, err
    lines = list(map(json.loads, out.splitlines()))
    return {line["what"]: line for line in lines}


def row(answer, code=0):
    """The one line on standard output."""
    (line,) = rows(answer, code).values()
    return line


def test_split_parameters(answers):
    """Parameters are gathered, gradients scattered, no activation is gathered; the figures agree with each other."""
    figures = rows(answers["fsdp"], code=1)["step"]  # beyond a bound
    assert figures["fits"] is True and figures["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert (figures["chip"], figures["chips"]) == ("TPU v5e", 4)
    memory = figures["memory"]
    assert memory["hbm_gib"] == 15.75 and 0 < memory["arguments_gib"] < memory["needed_gib"] < 1
    assert memory["donated_gib"] > 0.9 * memory["outputs_gib"]  # the state is given away to the next
    purposes = figures["collectives"]["by_purpose"]
    # Each microbatch gathers both blocks' five matrices at least, forward and backward, and scatters gradients, for so
    # small ones in few operations.
    assert purposes[compiled.PARAMETERS]["count"] >= 2 * 2 * 2 * 5
    assert purposes[compiled.GRADIENTS]["count"] >= 2 * 2
    assert figures["collectives"]["activation_sized_all_gathers"] == 0
    # All blocks are computed again, the scores of plain attention twice.
    assert 0.8 < figures["again_of_forward"] < 1.2
    assert figures["program_tflop"] > figures["model_tflop_with_encoders"] > figures["model_tflop"] > 0
    assert figures["compiled_tflop_per_device"] == pytest.approx(figures["program_tflop_per_device"], rel=0.05)
    assert figures["link_seconds_at_least"] > 0 and figures["compile_seconds"] > 0
    assert figures["loops_counted_once"] == []


def test_prediction(answers):
    """It is in the line and in words, the same from the text that was kept; it adds up; the bounds end the program."""
    predicted = rows(answers["fsdp"], code=1)["step"]["predicted"]
    assert row(answers["read"])["predicted"] == predicted
    low, high = predicted["seconds_range"]
    assert 0 < low <= predicted["seconds"] <= high < 1
    assert sum(predicted["seconds_by_kind"].values()) == pytest.approx(predicted["seconds"], rel=1e-3)
    assert predicted["seconds_by_kind"]["matmul"] > 0 and 0 < predicted["mfu"] < predicted["mfu_with_encoders"] < 1
    gathers = predicted["collectives"]["all-gather"]
    assert gathers["count"] >= 2 * 2 * 2 * 5 and 0 < gathers["seconds"] < predicted["seconds"]
    assert len(predicted["worst_moves"]) == 10 and predicted["kernels"] == []  # plain attention
    said = answers["fsdp"][2]
    assert "predicted step: " in said and "clock_ghz 1.5" in said
    assert f"error: moves take {predicted['moves_share']:.3f} of the predicted step, more than" in said
    share = predicted["exposed_gathers_share"]
    code, _, said = answers["gathers"]
    assert 0 < share < 1 and code == 1 and f"error: {share:.3f} of the gathered bytes do not move under compute" in said


def test_memory_alone(answers):
    """What is there before the code is as in the whole compilation; what is not is left out, and said.

    libtpu counts more temporaries for the executable than it assigned memory for.
    """
    alone, whole = row(answers["memory"]), rows(answers["fsdp"], code=1)["step"]
    time = {"predicted", "lower_seconds", "compile_seconds"}
    assert set(whole) - set(alone) == time and set(alone) - set(whole) == {"memory_seconds"}
    assert (alone["compiled"], whole["compiled"]) == ("memory", "all")
    other = {*time, "compiled", "memory"}
    assert {name: alone[name] for name in set(whole) - other} == {name: whole[name] for name in set(whole) - other}
    assert set(whole["memory"]) - set(alone["memory"]) == {"code_gib", "peak_gib"}
    for name in ("arguments_gib", "outputs_gib", "donated_gib", "hbm_gib"):
        assert alone["memory"][name] == whole["memory"][name]
    assert 0 < alone["memory"]["temporaries_gib"] <= whole["memory"]["temporaries_gib"]
    assert alone["memory"]["needed_gib"] == pytest.approx(
        alone["memory"]["arguments_gib"] + alone["memory"]["temporaries_gib"], abs=0.002
    )
    said = answers["memory"][2]
    assert "step: memory alone in " in said and "needs the whole compilation" in said and "predicted" not in said


def test_memory_alone_of_batches(run_program, tmp_path):
    """Every attempt ends there; a refusal of the compiler has a line as of a whole compilation."""
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    setup = r"""
import jax
from varedit_jax.analysis import ahead, passes

def run(job):
    batch = job["config"]["data"]["batch_size"]
    if batch > 12:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20.5G of 15.75G hbm")
    text = "HloModule a\n\nENTRY %a (p: f32[8]) -> f32[8] {\n  ROOT %p = f32[8]{0} parameter(0)\n}\n"
    return passes.Assigned(text, 2**30, 2**29, 2**29, 2**30 * (1 + batch))

passes.run = run
"""
    line = [f"--config={config}", "--topology=v5e:2x2", "--mesh=fsdp=4", "--find_batch", "--memory_only"]
    (answer,) = run_program("compile_ahead", {"batches": line}, setup=setup).values()
    figures = row(answer)
    assert (figures["batch_per_device"], figures["compiled"], figures["fits"]) == (3, "memory", True)
    assert figures["memory"] == {
        "arguments_gib": 1.0, "outputs_gib": 0.5, "donated_gib": 0.5, "temporaries_gib": 12.0, "needed_gib": 13.0,
        "hbm_gib": 15.75,
    }  # fmt: skip
    said = answer[2].splitlines()
    assert said[0].startswith("1 per device: fits, 5.00 of 15.75 GiB, memory alone in ")
    assert any(text.startswith("4 per device: does not fit, 20.50 of 15.75 GiB, memory alone in ") for text in said)


def test_prediction_for_a_gpu(answers):
    figures = row(answers["gpu"])
    assert figures["predicted"]["method"].startswith("by formula, for 4 H100, from the program")
    assert figures["chip"] == "TPU v5e" and "by formula, for 4 H100" in answers["gpu"][2]
    assert 0 < figures["predicted"]["seconds"] < row(answers["read"])["predicted"]["seconds"]


def test_prediction_for_a_gpu_without_code(answers):
    """It needs none: the same as from the whole compilation; in words, with what else --memory_only says."""
    figures = row(answers["gpu_memory"])
    assert figures["compiled"] == "memory" and figures["predicted"] == row(answers["gpu"])["predicted"]
    said = answers["gpu_memory"][2]
    assert "predicted step: " in said and "step: memory alone in " in said and "needs the whole" not in said


def test_evaluation_and_sampling(answers):
    """Each needs memory of its own beside the moments, which stay; evaluation less than the step; images are split."""
    figures = rows(answers["fsdp"], code=1)
    assert list(figures) == ["step", "evaluation", "sampling"]
    memory = {what: line["memory"] for what, line in figures.items()}
    for what in ("evaluation", "sampling"):
        assert figures[what]["fits"] is True and figures[what]["compile_seconds"] > 0
        # Two moments of float32, where the arguments of the step have the parameters and the frozen weights, too.
        assert 0 < memory[what]["beside_gib"] < memory["step"]["arguments_gib"]
        assert memory[what]["outputs_gib"] < 0.01 and memory[what]["donated_gib"] == 0
    assert memory["evaluation"]["temporaries_gib"] < memory["step"]["temporaries_gib"]
    assert figures["sampling"]["images"] == 4  # of 3, one for each of four devices


def test_copied_parameters(answers):
    """Nothing is gathered or scattered, gradients are summed; too little memory is reported, not raised."""
    (figures,) = rows(answers["data"]).values()
    assert set(figures["collectives"]["by_kind"]) == {"all-reduce"}
    assert figures["fits"] is False and figures["memory"]["hbm_gib"] == 0.001 < figures["memory"]["needed_gib"]


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("topology", "topology 'v7q:2x2' is unknown; give VERSION:SIDES"),
        ("mesh", "does not fit 4 devices"),
        ("axis", "'depth=3' is not AXIS=SIZE"),
        ("batch", "data.batch_size 6 with optimizer.accumulation 1 does not divide over data 1 x fsdp 4"),
        ("accumulation", "data.batch_size 9 does not divide into optimizer.accumulation=2"),
        ("tensor", "dimension H = 1 does not divide over tensor = 4"),
        ("attention", "attention is 'cudnn', which needs a GPU, not tpu"),
        ("slices", "mesh.data is 1, which does not divide over 2 slices"),
        ("two", "--find_batch, --program and --read_program each exclude the others"),
        ("stand_in", "--stand_in_for=H100: varedit_jax/hardware.py knows no such GPU"),
        ("no_program", "nowhere.hlo"),
        ("no_hlo", "config.py is no text of a compiled program"),
        ("alone", "--program is about the step's time, which --memory_only leaves out"),
        ("bound", "--max_moves is about the step's time, which --memory_only leaves out"),
        ("what", "--find_batch is for the step, and --what is sampling"),
    ],
)
def test_mistakes(answers, case, sentence):
    """One sentence, exit code 1, nothing on standard output."""
    code, out, err = answers[case]
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: ") and sentence in err and "Traceback" not in err


MESSAGE = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 41.17G of 31.25G hbm. Exceeded hbm capacity by 9.92G.

Total hbm usage >= 41.92G:
    reserved        768.00M
    program          41.17G

  Largest program allocations in hbm:

  1. Size: 3.50G
     Operator: op_name="jit(step)/jvp(encode)/conv" source_file="autoencoder.py"
     Shape: f32[24,512,512,128]{3,2,1,0:T(8,128)}
     Unpadded size: 3.00G
     XLA label: fusion
     Allocation type: HLO temp
     ==========================

  2. Size: 512.00M
     Shape: bf16[40,4,3545,3584]{3,2,1,0:T(8,128)(2,1)}
     Allocation type: HLO temp
     ==========================
"""


def test_what_does_not_fit():
    """The compiler's refusal, in any of its forms, becomes the needed memory; other errors are raised."""
    target = Target(topology="v6e:2x2")
    refusal = ahead._too_large(MESSAGE, target)
    assert refusal["needed_gib"] == 41.17 and refusal["hbm_gib"] == 31.25
    assert refusal["says"].endswith(
        "memory in memory space hbm. Used 41.17G of 31.25G hbm. Exceeded hbm capacity by 9.92G."
    )
    assert refusal["largest"] == [
        "3.50 GiB f32[24,512,512,128]{3,2,1,0:T(8,128)} jit(step)/jvp(encode)/conv",
        "0.50 GiB bf16[40,4,3545,3584]{3,2,1,0:T(8,128)(2,1)} ",
    ]
    assert ahead._too_large("RESOURCE_EXHAUSTED: so much", target)["needed_gib"] is None
    assert ahead._too_large("INTERNAL: something else", target) is None


def test_refusal_of_the_real_compiler():
    """A product of arrays of 14 GB each on a chip of 16 GB."""
    target = Target(topology="v5e:1x1")
    place = jax.sharding.SingleDeviceSharding(target.devices[0])
    wide = jax.ShapeDtypeStruct((60000, 60000), jnp.float32, sharding=place)
    with pytest.raises(jax.errors.JaxRuntimeError) as refusal:
        jax.jit(lambda x: jnp.sum(jnp.sin(x @ x) @ (x @ x))).lower(wide).compile()
    found = ahead._too_large(str(refusal.value), target)
    assert found["needed_gib"] > found["hbm_gib"] == 15.75


def config(batch: int = 8) -> RunConfig:
    return RunConfig(
        name="test",
        model=preset("tiny"),
        data=DataConfig(batch_size=batch, text_tokens=16),
        optimizer=OptimizerConfig(accumulation=2),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=2),
    )


@pytest.mark.parametrize(
    ("fixed", "each", "bend", "largest", "tries"),
    [(3.0, 1.0, 0, 12, 6), (15.0, 1.0, 0, 0, 6), (2.0, 0.11, 0, 125, 6), (0.5, 9.0, 0, 1, 6), (3.0, 0.1, 0.08, 12, 9)],
)
def test_largest_batch(fixed, each, bend, largest, tries):
    """The batch that just fits is found in a few compilations; each is reported; none may fit.

    A few where memory grows evenly, and not one after the other where it does not.
    """
    said: list[str] = []
    tried: list[int] = []

    def compile(run, target):
        count = run.data.batch_size // (2 * 2)  # fsdp 2, accumulation 2
        tried.append(count)
        needed = fixed + each * count + bend * count**2
        memory = {"needed_gib": needed, "hbm_gib": 15.75}
        return {"compiled": "all", "fits": needed <= 15.75, "memory": memory, "compile_seconds": 1.0}

    found = find_batch(config(), Target(topology="v5e:2x2"), said.append, compile)
    assert found["batch_per_device"] == largest and found["fits"] is bool(largest)
    assert len(tried) == len(set(tried)) == len(said) <= tries
    assert said[0].startswith("1 per device: ")


def test_operations_are_counted_as_the_formula_has_them():
    """Without recomputation, what the traced step multiplies is what the formula says, to the parts it leaves out."""
    run = config()
    flops = run_flops(run, editor_pyramid(run.model))
    assert count_step(run, "none") == pytest.approx(flops.training_with_encoders, rel=0.1)


def test_chip_without_a_table(monkeypatch):
    monkeypatch.setattr(jobs.hardware, "chip_of", lambda device: None)
    with pytest.raises(UserError, match="does not know its chip"):
        Target(topology="v5e:2x2").chip  # noqa: B018
