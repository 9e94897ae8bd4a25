"""Settings that the published runs share, and their layouts on machines; the configs `varedit_*` add the rest.

AdamW with betas 0.9 / 0.97 at a constant rate, gradients clipped at 5, bfloat16 compute over float32 weights,
self-correction up to 0.3 on 13 scales, the loss reweighted by scale, text dropped with probability 0.1. The precision
of the frozen encoders follows results/precision.md. What the paper does not say is as in the release's trainer, by the
defaults that it has from Infinity (docs/model.md, section 7): weight decay 0.005, no label smoothing, and strengths of
self-correction that each device draws for its own examples.

Variants of the configs: `tiny`, for a CPU; `v5p_128`, `v5p_256`, `v6e_256`, `v5e_256` and `h100_64`, layouts for those
machines, whose requirements are in results/compile_ahead.md.
"""

import dataclasses

from experiments.configs import shapes
from varedit_jax.config import (
    REMAT_NAMES,
    Cadence,
    DataConfig,
    EditorConfig,
    GuardConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    PixelBudget,
    RematName,
    RunConfig,
    TransformerConfig,
    preset,
)


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine, which gives a variant of the configs its name."""

    chips: int
    topology: str = ""  # for experiments.compile_ahead; "" for GPUs


MACHINES = {
    # Cloud TPU counts the TensorCores of v5p, two per chip, and the chips of v5e and v6e.
    "v5p_128": Machine(64, "v5p:4x4x4"),
    "v5p_256": Machine(128, "v5p:4x4x8"),
    "v6e_256": Machine(256, "v6e:16x16"),
    "v5e_256": Machine(256, "v5e:16x16"),
    "h100_64": Machine(64),
}


@dataclasses.dataclass(frozen=True)
class MachineLayout:
    """Layout of a run on a machine. Devices along `tensor` work on the same examples; the remaining axis is fsdp."""

    accumulation: int  # microbatches per step
    tensor: int = 1
    data: int = 1  # replicas of the parameters
    saved: tuple[RematName, ...] = TransformerConfig.remat_saved  # of a block's activations; the others are recomputed
    options: tuple[str, ...] = ()  # of the compiler, over those of the chip (parallel/compiler_options.py)
    samples: bool = True  # a sheet of samples fits beside the state (results/compile_ahead.md)


# By config and machine. Spare memory saves activations: on v5p and H100, and for 2B, all named ones, so that the
# backward pass recomputes attention scores alone. 8B has 64 shards: 128 or 256 pieces of its 3,584 rows are no whole
# number of tiles of 8 rows, and their gradients are not scattered; v5e chips scatter over a part of the slice only. The
# rest of the chips are replicas, or share examples over `tensor` where activations are too large for one, or the batch
# does not divide.
LAYOUTS = {
    "varedit_2b_256": {
        "v5p_128": MachineLayout(1, saved=REMAT_NAMES),
        "v5p_256": MachineLayout(1, saved=REMAT_NAMES),
        "v6e_256": MachineLayout(1, saved=REMAT_NAMES),
        "v5e_256": MachineLayout(2, data=4, saved=REMAT_NAMES),
        "h100_64": MachineLayout(2, saved=REMAT_NAMES),
    },
    "varedit_2b_512": {
        "v5p_128": MachineLayout(3, saved=REMAT_NAMES),
        "v5p_256": MachineLayout(3, tensor=2, saved=REMAT_NAMES),
        "v6e_256": MachineLayout(3, tensor=4, saved=REMAT_NAMES),
        "v5e_256": MachineLayout(5, tensor=4, saved=REMAT_NAMES),
        "h100_64": MachineLayout(5, saved=REMAT_NAMES),
    },
    "varedit_8b_512": {
        "v5p_128": MachineLayout(6, saved=REMAT_NAMES),
        "v5p_256": MachineLayout(3, data=2, saved=REMAT_NAMES),
        "v6e_256": MachineLayout(3, data=4),
        "v5e_256": MachineLayout(6, data=4),
        "h100_64": MachineLayout(8, saved=REMAT_NAMES),
    },
    "varedit_8b_1024": {
        "v5p_128": MachineLayout(8, saved=REMAT_NAMES, samples=False),
        "v5p_256": MachineLayout(4, data=2, saved=REMAT_NAMES, samples=False),
        "v6e_256": MachineLayout(4, tensor=2, data=2, samples=False),
        "v5e_256": MachineLayout(8, tensor=4, samples=False),
        "h100_64": MachineLayout(8, samples=False),
    },
}
VARIANTS = ("", "tiny", *MACHINES)
# Checkpoints that a run keeps forever, at most: with the newest 3 and one being written, ten are on the disk. A float32
# parameter and its two moments are 12 bytes: 10 x 101 GB for 8B, 10 x 26 GB for 2B.
KEPT = 6
# Without a finished step, after which a run ends itself with the stacks of all threads and a code that is restarted
# (guard.hang_minutes). A pod that hangs is paid for until somebody looks, perhaps a whole night; a false alarm costs a
# restart and the steps since the last save. The longest step of the layouts is predicted to take 35 s
# (results/compile_ahead.md).
HANG_MINUTES = 30.0
# Outputs of data_pipelines.prepare for the recipe's training data, each example once per epoch.
MIXTURE = (("seed_data_edit", 1.0), ("imgedit", 1.0))


def make_run(
    name: str,
    size: str,
    pixel_budget: PixelBudget,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    variant: str = "",
) -> RunConfig:
    """Returns a published run at preset `size`.

    Variant "tiny" has the same settings over the smallest model and images; one of `MACHINES` has its layout.
    """
    model = preset(size)
    transformer = dataclasses.replace(model.transformer, dtype="bfloat16", remat="full")
    model = dataclasses.replace(model, pixel_budget=pixel_budget, transformer=transformer)
    run = RunConfig(
        name=name,
        model=model,
        optimizer=OptimizerConfig(
            learning_rate=learning_rate, beta1=0.9, beta2=0.97, clip_norm=5.0, weight_decay=0.005
        ),
        loss=LossConfig(
            scale_power=0.5,
            noise_scales=13,
            noise_max=0.3,
            noise_strength="device",
            text_drop=0.1,
            label_smoothing=0.0,
        ),
        data=DataConfig(
            name="records",
            directory="data",
            mixture=MIXTURE,
            batch_size=batch_size,
            text_buckets=(64, 128),  # most instructions are short; the longest need all 512 tokens
            read_threads=16,
        ),
        steps=steps,
        cadence=Cadence(keep_every=_keep_every(steps)),
        guard=GuardConfig(hang_minutes=HANG_MINUTES),
        text_dtype="bfloat16",
        tokenizer_precision="high",
    )
    if variant == "tiny":
        return dataclasses.replace(
            run,
            name=f"{name}_tiny",
            model=_tiny(model),
            data=DataConfig(batch_size=8, text_tokens=32, train_examples=256, eval_examples=32),
            steps=20,
            train_text=True,
            tokenizer_weights=shapes.SHIPPED,
        )
    return on_machine(run, variant) if variant else run


def _keep_every(steps: int) -> int:
    """Returns the least multiple of the steps between saves of which a run of `steps` has at most `KEPT`."""
    every = Cadence.save_every
    return -(-steps // (KEPT * every)) * every


def on_machine(run: RunConfig, machine: str) -> RunConfig:
    """Returns a run in the layout of a machine."""
    layout = LAYOUTS[run.name][machine]
    transformer = dataclasses.replace(run.model.transformer, remat="named", remat_saved=layout.saved)
    sample_every = run.cadence.sample_every if layout.samples else 0
    return dataclasses.replace(
        run,
        cadence=dataclasses.replace(run.cadence, sample_every=sample_every),
        model=dataclasses.replace(run.model, transformer=transformer),
        optimizer=dataclasses.replace(run.optimizer, accumulation=layout.accumulation),
        compiler_options=layout.options,
        mesh=MeshConfig(
            data=layout.data, fsdp=MACHINES[machine].chips // (layout.data * layout.tensor), tensor=layout.tensor
        ),
    )


def _tiny(model: EditorConfig) -> EditorConfig:
    """Returns the smallest model with the block settings of `model`, on the shipped tokenizer of `shapes`."""
    small = shapes.MODEL
    transformer = dataclasses.replace(
        model.transformer,
        depth=2,
        width=64,
        heads=2,
        token_bits=small.transformer.token_bits,
        text_width=small.transformer.text_width,
    )
    return dataclasses.replace(small, transformer=transformer)
