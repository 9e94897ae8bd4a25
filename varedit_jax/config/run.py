"""Configurations of runs, and of their parts: optimizer, loss, data, sampling, mesh, guard and cadence."""

import dataclasses
import itertools
import math
from typing import Literal

from varedit_jax.config.annotations import Checked, check_least
from varedit_jax.config.model import ComputeType, EditorConfig

TokenizerPrecision = Literal["default", "high", "highest"]  # as of jax.default_matmul_precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked):
    """AdamW as in the recipe (model.md, section 7), or Muon for the matrices and AdamW for the rest."""

    algorithm: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 6e-5
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0  # linear from 0
    decay_steps: int = 0  # last steps, over which the cosine decays from a constant rate; 0 = all of them
    final_fraction: float = 0.0  # of learning_rate, at the end of a cosine schedule
    beta1: float = 0.9
    beta2: float = 0.97
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 5.0  # global gradient norm; 0 switches clipping off
    moment_dtype: ComputeType = "float32"  # of AdamW's first moment; the second is float32
    ema_decay: float = 0.0  # of the EMA of the parameters; 0 = none
    accumulation: int = 1  # microbatches summed into one update

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"optimizer.ema_decay is {self.ema_decay}; it must be at least 0 and below 1")
        check_least(self, 1, "optimizer.accumulation")
        if self.decay_steps < 0 or (self.decay_steps and self.schedule != "cosine"):
            raise ValueError(
                f"optimizer.decay_steps is {self.decay_steps} with schedule {self.schedule!r}; "
                f"it is a number of steps, and only a cosine schedule decays"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig(Checked):
    """Bitwise cross-entropy and the noise on its inputs (model.md, sections 3 and 7)."""

    reduction: Literal["mean", "sum"] = "mean"  # over the bits of a token
    scale_power: float = 0.5  # weight of a token ~ (tokens of its scale)^-scale_power; 0.5 as published, 0 = uniform
    noise_scales: int = 13  # scales whose bits are flipped by self-correction
    noise_max: float = 0.3  # largest flip probability; strengths are 0, 0.01, ..., noise_max
    # Who shares the strength that is drawn for a scale: a microbatch, its examples on one device of data x fsdp, or
    # nobody. Draws of "device" depend on the mesh.
    noise_strength: Literal["batch", "device", "example"] = "batch"
    text_drop: float = 0.1  # share of samples that see the unconditional text
    label_temperature: float = 0.0  # 0: bits as published; > 0: soft labels sigmoid(residual / label_temperature)
    label_smoothing: float = 0.0  # share e of the label that both values get half of, in training alone

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.label_temperature >= 0:
            raise ValueError(f"loss.label_temperature is {self.label_temperature}; it is 0 for bits, else above 0")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"loss.label_smoothing is {self.label_smoothing}; it must be at least 0 and below 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """Source of the examples, and settings of their reading."""

    name: Literal["shapes", "records"] = "shapes"  # generated, or prepared by data_pipelines.prepare
    # Of `records`, parent of the directories of `mixture`; of `shapes`, the prepared data ("": data/ in the working
    # directory).
    directory: str = ""
    cache_directory: str = ""  # local directory for copies of `records` in an object store
    train_examples: int = 0  # size of the training split of generated data
    eval_examples: int = 0  # size of their held-out split
    # Of `records`: directories of prepared data sets, and how many times each of their examples occurs per epoch. The
    # share of a data set is proportional to its weight times its size.
    mixture: tuple[tuple[str, float], ...] = ()
    aspects: tuple[str, ...] = ("1.0",)  # templates (scales.py); each image is resized to the nearest
    resize: Literal["crop", "pad"] = "crop"  # center crop, or the whole image padded with white, as in editing
    flip: bool = False  # mirror every second image whose instruction allows it
    features: Literal["online", "precomputed"] = "online"  # computed in the step, or ahead of time
    batch_size: int = 32  # examples per step, over all processes
    text_tokens: int = 512  # T: prompts are padded to this length in a batch, and longer ones cut
    # Smaller lengths, increasing: a batch for training is padded to the first that holds all of its prompts, else to
    # text_tokens. There is a compiled step for each.
    text_buckets: tuple[int, ...] = ()
    seed: int = 0  # of shuffling
    read_threads: int = 2  # per process, or per worker
    workers: int = 0  # reader processes per process of the run; 0 = its own threads
    prefetch_batches: int = 8
    bad_share: float = 0.01  # largest tolerated share of unusable examples; above it the run ends

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "data.batch_size", "data.text_tokens")
        sizes = (*self.text_buckets, self.text_tokens)
        if sizes[0] < 1 or any(low >= high for low, high in itertools.pairwise(sizes)):
            raise ValueError(
                f"data.text_buckets is {self.text_buckets!r}, and data.text_tokens {self.text_tokens}; "
                f"buckets are increasing numbers from 1, below text_tokens"
            )
        if (self.name == "records") != bool(self.mixture):
            raise ValueError(f"data.mixture is {self.mixture!r}, and data.name {self.name!r}; `records` alone has one")
        if self.flip and self.features == "precomputed":
            raise ValueError("data.flip is True, and data.features 'precomputed'; features cannot be mirrored")
        if any(not 0 <= weight < float("inf") for _, weight in self.mixture):
            raise ValueError(f"data.mixture is {self.mixture!r}; weights are numbers from 0")
        if not self.aspects or len(set(self.aspects)) < len(self.aspects):
            raise ValueError(f"data.aspects is {self.aspects!r}; it needs at least one template, and each once")
        if not 0 <= self.bad_share <= 1:
            raise ValueError(f"data.bad_share is {self.bad_share}; it must be between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig(Checked):
    """Sampling of bits (model.md, section 8). A tuple holds one value per scale; a number serves all scales."""

    guidance: float | tuple[float, ...] = 4.0  # cfg: 1 = off
    temperature: float | tuple[float, ...] = 0.5  # tau
    top_p: float = 0.0  # 0.97 removes a bit value of probability <= 0.03; 0 = off
    greedy: bool = False  # most likely bit, instead of sampling

    def __post_init__(self) -> None:
        super().__post_init__()
        temperatures = self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)
        if not all(value > 0 for value in temperatures):
            raise ValueError(f"sampling.temperature is {self.temperature}; it must be above 0")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"sampling.top_p is {self.top_p}; it must be between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditingConfig(Checked):
    """What weights were trained with, beside their model, that editing has to know. Defaults: not recorded."""

    text_dtype: ComputeType = "float32"  # of the text encoder: weights and matmuls
    tokenizer_precision: TokenizerPrecision = "default"  # of the tokenizer's convolutions
    aspects: tuple[str, ...] = ()  # templates that the transformer was trained on; (): not recorded


def per_scale(value: float | tuple[float, ...], scales: int) -> tuple[float, ...]:
    """Returns `value` as one number per scale; a shorter tuple is continued with its last number."""
    values = value if isinstance(value, tuple) else (value,)
    if not values or len(values) > scales or not all(math.isfinite(v) for v in values):
        raise ValueError(f"{value!r} is not a list of 1 to {scales} finite numbers, one per scale")
    return tuple(float(v) for v in values) + (float(values[-1]),) * (scales - len(values))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Checked):
    """Sizes of the axes of the device mesh; at most one is -1, which takes the remaining devices."""

    data: int = -1  # replicas of the parameters; includes the slices, which DCN joins
    fsdp: int = 1  # shards parameters, optimizer state and the batch
    tensor: int = 1  # shards attention heads, feed-forward width and, between blocks, tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = dataclasses.asdict(self)
        if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
            raise ValueError(
                f"mesh {', '.join(f'{axis}={size}' for axis, size in sizes.items())}: sizes are at least 1, "
                f"and one of them may be -1 for the remaining devices"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig(Checked):
    """Limits of what a run tolerates."""

    nonfinite_limit: int = 10  # consecutive skipped steps (loss or gradients not finite) that end the run
    spike_factor: float = 2.0  # a loss above this multiple of the median of the last steps is reported; 0 = never
    spike_window: int = 100  # steps of that median
    hang_minutes: float = 0.0  # without a finished step, after which the process dumps its stacks and exits; 0 = never
    # The same for what takes long by itself: starting, restoring, the first batch, compiling, evaluating, saving.
    long_minutes: float = 120.0
    # Steps between two that are computed twice and compared, to find chips that compute wrongly (training/verify.py).
    verify_every: int = 0  # 0 = never

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, "guard.verify_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cadence(Checked):
    """Steps between events of a run; 0 = never."""

    log_every: int = 10
    sample_every: int = 500  # sheets of sampled images
    eval_every: int = 500  # evaluation on the held-out split; not for tokenizers
    evaluate_first: bool = False  # evaluate and sample at step 0, too, before anything is learned
    save_every: int = 500
    save_minutes: float = 0.0  # longest time between two saves; 0 = by steps alone
    keep_checkpoints: int = 3  # newest ones
    keep_every: int = 0  # checkpoints of its multiples are kept forever; 0 = none

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 0, *(f"cadence.{field.name}" for field in dataclasses.fields(self)))
        check_least(self, 1, "cadence.keep_checkpoints")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run(Checked):
    """Fields of every training run."""

    name: str
    model: EditorConfig  # a tokenizer's run uses its tokenizer and its pyramid
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    guard: GuardConfig = GuardConfig()
    cadence: Cadence = Cadence()
    steps: int = 8000
    seed: int = 0
    init_from: str = ""  # directory of weights (an editor's trained parts, a tokenizer) that the run starts from

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, 1, "steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(_Run):
    """One training run of an editor, as an experiment config returns it."""

    loss: LossConfig = LossConfig()
    sampling: SamplingConfig = SamplingConfig()
    mesh: MeshConfig = MeshConfig()
    # Of XLA, for the step, as NAME=VALUE, over those of the chip (parallel/compiler_options.py); "NAME=" drops one.
    compiler_options: tuple[str, ...] = ()
    # (steps, scales): stages before the whole pyramid, each of which trains the first scales alone, many times cheaper,
    # on features area-resized to the last of them. This is the recipe's step from 256 px to 512 px within one run: the
    # same parameters serve every pyramid.
    stages: tuple[tuple[int, int], ...] = ()
    train_text: bool = False  # train the text encoder too, instead of keeping it frozen
    text_dtype: ComputeType = "float32"  # of a frozen text encoder: weights and matmuls
    # Of the frozen tokenizer's convolutions. A bit is the sign of a small difference: one bfloat16 pass (a TPU's
    # default) or TF32 (on a GPU) flips some of them.
    tokenizer_precision: TokenizerPrecision = "highest"
    tokenizer_weights: str = ""  # directory of the frozen tokenizer
    text_weights: str = ""  # directory of the frozen text encoder; unused with train_text
    eval_batches: int = 4  # per evaluation

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.batch_size % self.optimizer.accumulation:
            raise ValueError(
                f"data.batch_size {self.data.batch_size} does not divide into "
                f"optimizer.accumulation={self.optimizer.accumulation} microbatches"
            )
        if any(len(stage) != 2 or stage[0] < 1 or stage[1] < 2 for stage in self.stages):
            raise ValueError(f"stages={self.stages!r}: each is a pair of at least 1 step and at least 2 scales")
        if self.stages and sum(steps for steps, _ in self.stages) >= self.steps:
            raise ValueError(
                f"stages={self.stages!r} leave none of the {self.steps} steps for the whole pyramid; "
                f"lower theirs or raise steps"
            )
        if self.data.text_tokens > self.model.transformer.unconditional_rows:
            raise ValueError(
                f"data.text_tokens is {self.data.text_tokens}, but there are only "
                f"{self.model.transformer.unconditional_rows} rows of unconditional text"
            )

    @property
    def editing(self) -> EditingConfig:
        """What an editor of this run has to know."""
        return EditingConfig(
            text_dtype="float32" if self.train_text else self.text_dtype,
            tokenizer_precision=self.tokenizer_precision,
            aspects=self.data.aspects,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerRunConfig(_Run):
    """One training run of a tokenizer."""

    cadence: Cadence = Cadence(eval_every=0, keep_checkpoints=2)
    steps: int = 2000
    noise_max: float = 0.0  # largest share of bits flipped before decoding; > 0 makes the decoder robust to wrong bits
    partial_share: float = 0.0  # of images decoded from their first scales alone: moves detail to coarse bits
    train_encoder: bool = True  # False: the decoder alone learns; features and bits stay as they are
    l1_weight: float = 1.0
    perceptual_weight: float = 0.0  # of the VGG feature distance; needs perceptual_weights
    perceptual_weights: str = ""  # file of VGG-16 weights (torchvision names)
    commitment_weight: float = 0.25
    entropy_weight: float = 0.02
    entropy_temperature: float = 1.0  # of the soft bits in the entropy term
