"""A run on a mesh: impossible settings are refused in one sentence."""

import dataclasses

import jax
import pytest

from tests.varedit_jax.training.test_compile_step import RUN
from varedit_jax.config import MeshConfig, OptimizerConfig, RunConfig
from varedit_jax.errors import UserError
from varedit_jax.parallel.mesh import make_mesh
from varedit_jax.training.compile_step import abstract_batch
from varedit_jax.training.flops import run_flops
from varedit_jax.training.setup import MeshRun


def run_with(**transformer: str) -> RunConfig:
    """The run with some fields of the transformer replaced."""
    changed = dataclasses.replace(RUN.model.transformer, **transformer)
    return dataclasses.replace(RUN, model=dataclasses.replace(RUN.model, transformer=changed))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (run_with(attention="cudnn"), "attention is 'cudnn', which needs a compute type of 16 bits"),
        (run_with(attention="cudnn", dtype="bfloat16"), "attention is 'cudnn', which needs a GPU, not cpu"),
        (
            dataclasses.replace(RUN, optimizer=OptimizerConfig(schedule="cosine", warmup_steps=8000)),
            "optimizer.warmup_steps is 8000 and optimizer.decay_steps 0, which do not fit into 8000 steps",
        ),
    ],
)
def test_what_cannot_be(config: RunConfig, sentence: str) -> None:
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh), pytest.raises(UserError, match=sentence):
        MeshRun(config, mesh)


@pytest.mark.parametrize(
    ("batches", "sentence"), [(4, "no aspect has data.batch_size = 16 held-out"), (0, "eval_batches is 0")]
)
def test_nothing_to_evaluate_on(batches: int, sentence: str) -> None:
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        run = MeshRun(dataclasses.replace(RUN, eval_batches=batches), mesh)
        with pytest.raises(UserError, match=f"there is nothing to evaluate on: {sentence}"):
            run.evaluate(run.abstract_state, {}, [])


def test_the_work_of_an_example_depends_on_the_length_of_its_batch() -> None:
    """MFU counts padded texts, at the length they are padded to; batches of the other lengths are known ahead."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    config = dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, text_tokens=5, text_buckets=(2, 3)))
    with jax.set_mesh(mesh):
        run = MeshRun(config, mesh)
        batch = abstract_batch(config, run.pyramid, mesh)
        others = run._of_other_lengths(batch)
    assert [other["text_ids"].shape for other in others] == [(16, 2), (16, 3)]
    assert all(other.keys() == batch.keys() and other["source"] == batch["source"] for other in others)
    whole, *shorter = (run.work(0, each).flops for each in (batch, *others))
    flops = [run_flops(config, run.pyramid, text_tokens=length).training for length in (5, 2, 3)]
    assert [whole, *shorter] == flops and flops[1] < flops[2] < flops[0]
    assert flops[0] == run_flops(config, run.pyramid).training
