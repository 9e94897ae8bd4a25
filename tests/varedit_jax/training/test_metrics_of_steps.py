"""Metrics that the loop reports of its steps."""

import contextlib
import types

import jax.numpy as jnp
import numpy as np
import pytest

from varedit_jax import hardware
from varedit_jax.config import preset
from varedit_jax.errors import UserError
from varedit_jax.scales import editor_pyramid
from varedit_jax.training.flops import example_flops
from varedit_jax.training.goodput import Goodput, Stopwatch, read_goodput
from varedit_jax.training.metrics import StepReport, Work

H100 = hardware.chip("NVIDIA H100 80GB HBM3")
WORK = Work(flops=2 * 10**12, flops_with_encoders=3 * 10**12, tokens=100, devices=4, chip=H100)


class MetricsWriter:
    """Keeps what it gets."""

    def __init__(self):
        self.lines, self.shown, self.steps = {}, [], 0

    def scalars(self, step, metrics):
        self.lines[step] = {name: float(value) for name, value in metrics.items()}

    def progress(self, step, metrics, **shown):
        self.shown.append((step, shown))

    def advance(self):
        self.steps += 1


class Loop:
    """A loop with a simulated clock."""

    def __init__(self, monkeypatch, work=None, **arguments):
        self.time, self.work = 0.0, work
        monkeypatch.setattr("time.perf_counter", lambda: self.time)
        self.ready = True
        monkeypatch.setattr("varedit_jax.training.metrics._ready", lambda metrics: self.ready)
        self.clock, self.writer = Stopwatch(), MetricsWriter()
        self.report = StepReport(self.writer, self.clock, 2, 100, None, **arguments)
        self.step = 0

    def run(self, data=0.0, compute=1.0, examples=8, loss=0.5, part=None, spent=0.0, **metrics):
        """One step: some other part of the loop, the data, the step; then the previous step is logged."""
        for name, seconds in ((part, spent), ("data", data), ("step", compute)):
            if name:
                with self.clock.time(name):
                    self.time += seconds
        ids = np.arange(self.step * 8, self.step * 8 + 8)
        self.report.later(self.step, {"loss": jnp.float32(loss), **metrics}, examples, ids, self.work)
        self.step += 1


def test_speed_of_a_window(monkeypatch):
    """Steps of 1 s after 0.25 s of data; compilation and evaluation do not count."""
    loop = Loop(monkeypatch, work=WORK)
    loop.run(part="compile", spent=60.0, data=0.25)
    for _ in range(4):
        loop.run(data=0.25)
    loop.run(part="evaluate", spent=30.0, data=0.25)
    loop.report.finish()
    # Step n ends when step n + 1 has been dispatched, so the first line holds two steps' time.
    assert loop.writer.lines[0]["time/step_seconds"] == pytest.approx(2 * 1.25)
    line = loop.writer.lines[4]
    assert line["time/step_seconds"] == pytest.approx(1.25)
    assert line["time/examples_per_second"] == pytest.approx(8 / 1.25)
    assert line["time/tokens_per_second"] == pytest.approx(800 / 1.25)
    assert line["time/data_share"] == pytest.approx(0.2)
    assert line["time/tflops_per_chip"] == pytest.approx(8 * 2 / 1.25 / 4)
    assert line["time/mfu"] == pytest.approx(8 * 2 / 1.25 / 4 / 989)
    assert line["time/mfu_with_encoders"] == pytest.approx(8 * 3 / 1.25 / 4 / 989)
    assert line["loss"] == 0.5 and "memory/peak_gib" not in line  # a CPU does not say
    assert loop.writer.lines.keys() == {0, 2, 4} and loop.writer.steps == 6


def test_data_during_a_running_step_cost_no_time(monkeypatch):
    loop = Loop(monkeypatch)
    loop.ready = False
    for _ in range(4):
        loop.run(data=0.25)
    assert loop.writer.lines[2]["time/data_share"] == 0
    assert loop.writer.lines[2]["time/step_seconds"] == pytest.approx(1.25)
    assert loop.clock.seconds["data"] == pytest.approx(0.25)  # of the first step, which nothing hid
    loop.ready = True
    for _ in range(3):
        loop.run(data=0.25)
    assert loop.writer.lines[4]["time/data_share"] > 0


def test_time_left_is_by_the_median(monkeypatch):
    """One slow step does not change the estimate."""
    loop = Loop(monkeypatch, work=WORK)
    for compute in (1.0, 1.0, 1.0, 1.0, 500.0, 1.0, 1.0):
        loop.run(compute=compute)
    step, shown = loop.writer.shown[-1]
    assert (step, shown["eta"]) == (5, pytest.approx(95.0))
    assert shown["mfu"] == pytest.approx(loop.writer.lines[4]["time/mfu"])
    assert loop.writer.lines[4]["time/step_seconds"] > 200


def test_no_peak_no_mfu(monkeypatch):
    """MFU is absent, not 0; the speed is there."""
    loop = Loop(monkeypatch, work=Work.of(example_flops(preset("tiny"), editor_pyramid(preset("tiny")), 5), [_cpu()]))
    for _ in range(2):
        loop.run()
    line = loop.writer.lines[0]
    assert line["time/tflops_per_chip"] > 0 and not [name for name in line if "mfu" in name]
    assert loop.writer.shown[0][1]["mfu"] is None


def _cpu():
    return types.SimpleNamespace(device_kind="cpu")


def test_work_of_devices():
    flops = example_flops(preset("tiny"), editor_pyramid(preset("tiny")), 5)
    work = Work.of(flops, iter([types.SimpleNamespace(device_kind="TPU7x", num_cores=1)] * 8))
    assert (work.flops, work.flops_with_encoders) == (flops.training, flops.training_with_encoders)
    assert (work.tokens, work.devices) == (37, 8)
    # Eight devices are four chips.
    assert work.speed(4, 2.0)["tflops_per_chip"] == pytest.approx(flops.training / 2 / 1e12)
    assert work.speed(4, 2.0)["mfu"] == pytest.approx(flops.training / 2 / 1e12 / 2307)


def test_stages_and_aspects_count_what_they_cost(monkeypatch):
    small = Work(flops=10**12, flops_with_encoders=10**12, tokens=10, devices=4, chip=H100)
    loop = Loop(monkeypatch)
    for loop.work in (small, small, WORK, WORK):
        loop.run()
    line = loop.writer.lines[2]  # of steps 1 and 2
    assert line["time/tokens_per_second"] == pytest.approx((10 + 100) * 8 / 2)
    assert line["time/tflops_per_chip"] == pytest.approx((1 + 2) * 8 / 2 / 4)


def test_the_guard_sees_every_step(monkeypatch):
    """It gets each step with its examples; its metrics are logged with the next line; its error ends the run."""
    seen = []

    def check(step, metrics, example_ids):
        seen.append((step, float(metrics["loss"]), example_ids[0]))
        if step == 7:
            raise UserError("enough")
        return {"loss_spike": 3.0} if step == 1 else {"skipped_steps": float(step)}

    loop = Loop(monkeypatch, check=check)
    for step in range(8):
        loop.run(loss=np.nan if step else 1.0)
    with pytest.raises(UserError, match="enough"):
        loop.report.finish()
    assert [step for step, *_ in seen] == list(range(8))
    assert seen[0] == (0, 1.0, 0) and seen[2][2] == 16
    lines = loop.writer.lines
    assert "loss_spike" not in lines[0] and "loss_spike" not in lines[4]
    assert (lines[2]["loss_spike"], lines[2]["skipped_steps"]) == (3.0, 2.0)


def test_a_skipped_step_is_not_productive(monkeypatch, tmp_path):
    """Its time counts as lost."""
    loop = Loop(monkeypatch)
    for step in range(4):
        loop.run(skipped=jnp.float32(step == 1))
    loop.report.finish()
    assert loop.clock.seconds["skipped"] == pytest.approx(1.0) and loop.clock.seconds["step"] == pytest.approx(3.0)
    assert loop.writer.lines[2]["time/step_seconds"] == pytest.approx(1.0)
    with contextlib.closing(Goodput(tmp_path, loop.clock, 0, start=0.0, now=lambda: loop.time)) as goodput:
        assert goodput.record(4)["lost"] == pytest.approx(0.25)


def test_memory_is_reported_where_it_is_known(monkeypatch):
    stats = {"in_use": 3 * hardware.GIB, "peak": 5 * hardware.GIB}
    monkeypatch.setattr("varedit_jax.hardware.memory", lambda devices: stats)
    loop = Loop(monkeypatch)
    loop.run()
    loop.report.finish()
    assert (loop.writer.lines[0]["memory/in_use_gib"], loop.writer.lines[0]["memory/peak_gib"]) == (3.0, 5.0)


def test_goodput_is_logged(monkeypatch, tmp_path):
    """Every logged step has a line in goodput.jsonl, and the shares of it."""
    loop = Loop(monkeypatch)
    with contextlib.closing(Goodput(tmp_path, loop.clock, 0, start=0.0, now=lambda: loop.time)) as goodput:
        loop.report = StepReport(loop.writer, loop.clock, 2, 100, None, goodput=goodput)
        for _ in range(4):
            loop.run(part="compile" if loop.step == 0 else None, spent=2.0, data=1.0)
    line = loop.writer.lines[2]
    assert line["time/goodput"] == line["time/share/productive"] == pytest.approx(4 / 10)
    assert (line["time/share/compile"], line["time/share/data"]) == (pytest.approx(0.2), pytest.approx(0.4))
    assert sum(value for name, value in line.items() if name.startswith("time/share/")) == pytest.approx(1)
    assert [moment.step for moment in read_goodput(tmp_path)] == [0, 1, 3, 3]
