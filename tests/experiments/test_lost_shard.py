"""A run that loses a shard: it ends with a sentence, and goes on after a check, bit for bit as if never interrupted."""

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from data_pipelines import loader
from data_pipelines import shards as shards_lib
from data_pipelines.amendments import FILE, Amendments
from data_pipelines.bad_records import check_split
from data_pipelines.shards import shard_path, write_index
from tests.data_pipelines.test_records import MODEL, Lengths, _data, _record, _write
from tests.varedit_jax.training.runs import WIDTH, Run, assert_same, every, without_times
from varedit_jax.errors import UserError
from varedit_jax.training.metrics import read_metrics

STEPS = 14
SHARDS = 8  # of 12 records


def _put(batch: dict[str, np.ndarray]) -> Any:
    """A batch of the small model, which every pixel of a row has a part in."""
    flat = (batch[side].reshape(len(batch[side]), -1).astype(np.float32) / 255 for side in ("source", "target"))
    x, y = (np.resize(pixels.mean(-1, keepdims=True), (len(pixels), WIDTH)) for pixels in flat)
    return jax.device_put({"x": x, "y": y})


def _start(directory: pathlib.Path, workdir: pathlib.Path, apply: bool = False, **fields: Any) -> Any:
    """Starts or resumes the run as a new process would; returns its state at the end."""
    launch = {name: fields.pop(name) for name in ("stop_after",) if name in fields}
    step = {name: fields.pop(name) for name in ("step_fn",) if name in fields}
    shards_lib._reader.cache_clear()  # a new process has no open file of what is gone
    data = _data([str(directory)], flip=False, **{"read_threads": 1, "bad_share": 0.0, **fields})
    source = loader.open_records(data, "train", MODEL)
    amendments = Amendments({"train": loader.kept_examples(source, None)}, workdir, apply=apply)
    batches = loader.training_batches(data, Lengths(), source, amendments=amendments)
    record = {"data": {"workers": data.workers, "bad_share": data.bad_share}}
    run = Run(workdir, STEPS, record=record, cadence=every(log_every=1, save_every=5, keep_checkpoints=9), **step)
    try:
        return run(batches=batches, data_digest=batches.digest, put=_put, evaluate=None, **launch)[0]
    finally:
        batches.close()


def test_a_run_ends_after_a_lost_shard_as_if_it_had_not_been_killed(tmp_path: pathlib.Path) -> None:
    directory, workdir = tmp_path / "set", tmp_path / "run"
    _write(directory, [_record(number, "set") for number in range(96)], shards=SHARDS)
    write_index(directory)
    _start(directory, workdir, stop_after=5)
    shard_path(directory / "train", "set", 3, SHARDS).unlink()
    with pytest.raises(UserError, match=r"1 of \d+ examples .*unreadable record.*data_pipelines.check, .*--apply_bad"):
        _start(directory, workdir)
    assert check_split(directory, "train") == {"unreadable record": 12}
    with pytest.raises(UserError, match="12 examples .* give --apply_bad_records"):
        _start(directory, workdir)
    shutil.copytree(workdir, tmp_path / "killed")
    whole = _start(directory, workdir, apply=True)
    assert json.loads((workdir / FILE).read_text()) == {
        "train": [{"from_step": 0, "left_out": []}, {"from_step": 5, "left_out": [[36, 48]]}]
    }

    def killed(*arguments: Any) -> Any:
        raise ZeroDivisionError("killed")

    workdir = tmp_path / "killed"
    with pytest.raises(ZeroDivisionError):  # before the first step behind the amendment
        _start(directory, workdir, apply=True, step_fn=killed)
    again = _start(directory, workdir, workers=2)  # without the flag, as a cluster restarts it, with workers
    assert_same(again, whole)
    assert without_times(workdir) == without_times(tmp_path / "run")
    assert [line["step"] for line in read_metrics(workdir) if "loss" in line] == list(range(STEPS))
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    assert_same(_start(directory, workdir, bad_share=0.5), whole)


def test_processes_with_other_data_are_refused_before_the_first_step(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(what: str, value: str) -> None:
        raise UserError(f"{what} {value}")

    monkeypatch.setattr("varedit_jax.training.trainer.check_same", refuse)
    with pytest.raises(UserError, match="left_out.json one"):
        Run(tmp_path, 2)(data_digest=lambda: "one")
    assert not read_metrics(tmp_path)
