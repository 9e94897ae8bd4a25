"""Configurations of models and runs, and the table of presets.

Legend of dimension letters, used in the names of arrays everywhere (`tokens_BLC`, `q_BLHD`):

    B  batch                      C  transformer width            K  number of scales
    L  tokens of a sequence       H  attention heads              T  text tokens
    S  source (prefix) tokens     D  attention head size          E  text width
    M  key/value positions        F  feed-forward width           V  vocabulary size
    N  bits per token             Z  tokenizer channels (bits per tokenizer cell)
    h, w  token grid              y, x  pixels or tokenizer cells
"""

import dataclasses
import math
from typing import Any, Literal

Conditioning = Literal["sar", "finest", "full"]
RopeLayout = Literal["released", "paper"]
# Activations of a block that `remat_saved` can keep, in the order they are computed.
REMAT_NAMES = ("qkv", "attention", "proj", "cross_q", "cross_kv", "cross_attention", "cross_proj", "fc1", "fc2")
PIXEL_BUDGETS = ("0.06M", "0.25M", "0.60M", "1M")


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{field} is {value!r}; it must be one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Convolutional autoencoder with a binary spherical residual quantizer (model.md, section 2)."""

    bits: int = 32  # channels of the raw feature = bits per tokenizer cell
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4, 4)  # of base_channels, one a level
    base_channels: int = 128  # channels of the finest level
    encoder_blocks: int = 2  # residual blocks a level in the encoder
    decoder_blocks: int = 3  # residual blocks a level in the decoder
    norm_groups: int = 32  # groups of GroupNorm

    def __post_init__(self) -> None:
        for multiplier in self.channel_multipliers:
            channels = multiplier * self.base_channels
            if channels % self.norm_groups:
                raise ValueError(f"a level of {channels} channels does not divide into norm_groups={self.norm_groups}")

    @property
    def stride(self) -> int:
        """Pixels a tokenizer cell covers along each side."""
        return 2 ** (len(self.channel_multipliers) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Flan-T5 encoder (model.md, section 4)."""

    width: int = 2048  # E
    layers: int = 24
    heads: int = 32
    head_size: int = 64
    mlp_width: int = 5120
    vocabulary_size: int = 32128  # V
    relative_buckets: int = 32  # buckets of the relative position bias
    relative_max_distance: int = 128  # tokens; farther pairs share the last bucket
    max_tokens: int = 512  # prompts are cut here


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Scale-wise causal transformer (model.md, sections 5 and 6)."""

    depth: int = 32
    width: int = 2048  # C
    heads: int = 16  # H
    token_bits: int = 32  # N
    text_width: int = 2048  # E
    unconditional_rows: int = 512  # rows of the learned unconditional text
    levels: int = 15  # rows of the level embedding
    conditioning: Conditioning = "sar"  # what of the source a block sees
    rope_layout: RopeLayout = "released"  # where tokens sit (model.md, "Positions")
    initial_attention_scale: float = 4.0  # factor of the normalized queries in a new model
    initial_input_scale: float = 1.0  # gain of the token embedding in a new model; bits**0.5 gives tokens of size 1
    absolute_positions: bool = False  # tokens know their place in the image; not in the published models
    drop_path: float = 0.1  # stochastic depth rate of the last block; rises linearly from 0
    dtype: str = "float32"  # compute type of the blocks; parameters are float32
    attention: Literal["auto", "plain", "splash", "cudnn"] = "auto"  # kernel of self-attention; auto: by platform
    remat: Literal["none", "named", "full"] = "none"  # what of a block the backward pass computes again
    # Kept with remat="named". What is made again is fc1, the attention to the text but for its keys and values, and the
    # scores of plain attention: of 8B at 512 px 28 % of the forward pass, with plain attention 32 %.
    remat_saved: tuple[str, ...] = ("qkv", "attention", "proj", "cross_q", "cross_kv", "cross_proj", "fc2")

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(
                f"width {self.width} over {self.heads} heads gives a head size of "
                f"{self.width / self.heads:g}; it must be a multiple of 4 for 2-D RoPE"
            )
        if self.width % self.text_pool_heads:
            raise ValueError(
                f"width {self.width} does not divide over {self.text_pool_heads} text pooling heads "
                f"(text_width {self.text_width})"
            )
        _check_choice("conditioning", self.conditioning, ("sar", "finest", "full"))
        _check_choice("rope_layout", self.rope_layout, ("released", "paper"))
        _check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        _check_choice("attention", self.attention, ("auto", "plain", "splash", "cudnn"))
        _check_choice("remat", self.remat, ("none", "named", "full"))
        for name in self.remat_saved:
            _check_choice("an entry of remat_saved", name, REMAT_NAMES)

    @property
    def head_size(self) -> int:
        """D, channels a head."""
        return self.width // self.heads

    @property
    def text_pool_heads(self) -> int:
        """Heads of the attention that pools the text (model.md, section 4)."""
        return max(self.text_width // (64 if self.width > 4096 else 128), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditorConfig:
    """A complete editor: tokenizer, text encoder, transformer and the pyramid they work on."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    text: TextConfig = TextConfig()
    transformer: TransformerConfig = TransformerConfig()
    patchify: bool = False  # tokens are 2x2 patches of tokenizer cells
    pixel_budget: str = "0.25M"  # row of the published scale schedules; "" with own grids
    grids: tuple[tuple[int, int], ...] = ()  # own pyramid of token grids, coarse to fine
    position_scale: int = 1  # RoPE positions of an own pyramid lie this far apart on its last grid
    quantized_source: bool = False  # condition on the quantized source, as the paper writes it

    def __post_init__(self) -> None:
        bits = self.tokenizer.bits * (4 if self.patchify else 1)
        if self.transformer.token_bits != bits:
            raise ValueError(
                f"transformer.token_bits is {self.transformer.token_bits}, but the tokenizer gives {bits} "
                f"({self.tokenizer.bits} bits{', patchified 2x2' if self.patchify else ''})"
            )
        if self.transformer.text_width != self.text.width:
            raise ValueError(
                f"transformer.text_width is {self.transformer.text_width}, but text.width is {self.text.width}"
            )
        if bool(self.grids) == bool(self.pixel_budget):
            raise ValueError(
                f"give either pixel_budget or grids, not both or neither: "
                f"pixel_budget={self.pixel_budget!r}, grids={self.grids!r}"
            )
        if self.pixel_budget:
            _check_choice("pixel_budget", self.pixel_budget, PIXEL_BUDGETS)
        if self.position_scale < 1 or (self.position_scale > 1 and not self.grids):
            raise ValueError(
                f"position_scale is {self.position_scale} with grids={self.grids!r}: it must be at least 1, and "
                f"is for own grids; published schedules have their position grid"
            )
        if len(self.grids) > self.transformer.levels:
            raise ValueError(f"{len(self.grids)} scales, but only {self.transformer.levels} level embeddings")

    @property
    def token_stride(self) -> int:
        """Pixels a transformer token covers along each side."""
        return self.tokenizer.stride * (2 if self.patchify else 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW as in the recipe (model.md, section 7), or Muon for the matrices and AdamW for the rest."""

    algorithm: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 6e-5
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0  # linear from 0
    decay_steps: int = 0  # the cosine spans so many last steps, before them the rate is constant; 0 = all of them
    final_fraction: float = 0.0  # of learning_rate, where a cosine schedule ends
    beta1: float = 0.9
    beta2: float = 0.97
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 5.0  # global gradient norm; 0 switches clipping off
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # of AdamW's first moment; the second is float32
    ema_decay: float = 0.0  # of an average of the parameters beside them; 0 = none
    accumulation: int = 1  # microbatches summed into one update

    def __post_init__(self) -> None:
        _check_choice("optimizer.algorithm", self.algorithm, ("adamw", "muon"))
        _check_choice("optimizer.schedule", self.schedule, ("constant", "cosine"))
        _check_choice("optimizer.moment_dtype", self.moment_dtype, ("float32", "bfloat16"))
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"optimizer.ema_decay is {self.ema_decay}; it must be at least 0 and below 1")
        if self.accumulation < 1:
            raise ValueError(f"optimizer.accumulation is {self.accumulation}; it must be at least 1")
        if self.decay_steps < 0 or (self.decay_steps and self.schedule != "cosine"):
            raise ValueError(
                f"optimizer.decay_steps is {self.decay_steps} with schedule {self.schedule!r}; "
                f"it is a number of steps, and only a cosine schedule decays"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Bitwise cross-entropy and what is done to its inputs (model.md, sections 3 and 7)."""

    reduction: Literal["mean", "sum"] = "mean"  # over the bits of a token
    scale_power: float = 0.5  # weight of a token ~ (tokens of its scale)^-scale_power; 0.5 as published, 0 = uniform
    noise_scales: int = 13  # scales whose bits are flipped by self-correction
    noise_max: float = 0.3  # largest flip probability; strengths are 0, 0.01, ..., noise_max
    text_drop: float = 0.1  # share of samples that see the unconditional text
    label_temperature: float = 0.0  # 0: bits as published; > 0: soft labels sigmoid(residual / label_temperature)

    def __post_init__(self) -> None:
        _check_choice("loss.reduction", self.reduction, ("mean", "sum"))
        if not self.label_temperature >= 0:
            raise ValueError(f"loss.label_temperature is {self.label_temperature}; it is 0 for bits, else above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where examples come from."""

    name: Literal["shapes", "records"] = "shapes"  # generated, or prepared by data_pipelines.prepare
    # Where `shapes` is prepared and read, "" is data/ in the working directory; or what directories of `mixture` are
    # below.
    directory: str = ""
    train_examples: int = 0  # size of the training split, for data sets that are generated
    eval_examples: int = 0  # size of the held-out split, likewise
    # Of `records`: directories of prepared data sets, and how many times an epoch shows each of their examples. The
    # share of a data set in what is trained on is its weight times its size, over the sum of these.
    mixture: tuple[tuple[str, float], ...] = ()
    aspects: tuple[str, ...] = ("1.0",)  # templates (scales.py) that images are brought to, each to the nearest
    resize: Literal["crop", "pad"] = "crop"  # the middle of an image, or all of it on white, as in editing
    flip: bool = False  # mirror every second image whose instruction allows it
    features: Literal["online", "precomputed"] = "online"  # encode in the step, or once, ahead
    batch_size: int = 32  # examples a step, over all processes
    text_tokens: int = 512  # T: prompts are padded to this length in a batch
    seed: int = 0  # of shuffling
    read_threads: int = 2  # a process, or a worker
    workers: int = 0  # processes that read, beside each process of the run; 0 reads in threads of the run's own
    prefetch_batches: int = 8
    bad_share: float = 0.01  # of examples that cannot be used, above which a run ends

    def __post_init__(self) -> None:
        _check_choice("data.name", self.name, ("shapes", "records"))
        _check_choice("data.features", self.features, ("online", "precomputed"))
        _check_choice("data.resize", self.resize, ("crop", "pad"))
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
class SamplingConfig:
    """How bits are drawn (model.md, section 8). A tuple holds one value a scale, a number all scales."""

    guidance: float | tuple[float, ...] = 4.0  # cfg: 1 = off
    temperature: float | tuple[float, ...] = 0.5  # tau
    top_p: float = 0.0  # 0.97 removes a bit value of probability <= 0.03; 0 = off
    greedy: bool = False  # most likely bit, instead of sampling

    def __post_init__(self) -> None:
        temperatures = self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)
        if not all(value > 0 for value in temperatures):
            raise ValueError(f"sampling.temperature is {self.temperature}; it must be above 0")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"sampling.top_p is {self.top_p}; it must be between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices are laid out: sizes of the mesh's axes; at most one is -1, which takes the devices that are left."""

    data: int = -1  # copies of the parameters; several slices of a pod lie along it
    fsdp: int = 1  # parameters and optimizer state are split over it, and the batch
    tensor: int = 1  # attention heads, feed-forward width and, between blocks, tokens are split over it

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
            raise ValueError(
                f"mesh {', '.join(f'{axis}={size}' for axis, size in sizes.items())}: sizes are at least 1, "
                f"and one of them may be -1 for the devices that are left"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What watches a run (of an editor or a tokenizer)."""

    nonfinite_limit: int = 10  # steps in a row that were skipped for loss or gradients not finite, after which it ends
    spike_factor: float = 2.0  # a loss this many times the median of the last steps is reported; 0 = never
    spike_window: int = 100  # steps of that median
    hang_minutes: float = 0.0  # without a finished step; then stacks are written and the process exits; 0 = never


_CADENCE = ("log_every", "sample_every", "eval_every", "save_every", "save_minutes", "keep_every")


def _check_cadence(run: Any) -> None:
    """Numbers of steps, and of what happens every so many of them."""
    for least, names in ((1, ("steps", "keep_checkpoints")), (0, _CADENCE)):
        for name in names:
            if not getattr(run, name, least) >= least:
                raise ValueError(f"{name} is {getattr(run, name)}; it must be at least {least}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run of an editor: what an experiment card returns."""

    name: str
    model: EditorConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    mesh: MeshConfig = MeshConfig()
    guard: GuardConfig = GuardConfig()
    steps: int = 8000
    # (steps, scales): the run's first steps train so many scales of the pyramid alone, on features area-resized to the
    # last of them, many times cheaper; then come the next stage and, at last, all scales. It is the recipe's way from
    # 256 px to 512 px within one run: the same parameters serve every pyramid.
    stages: tuple[tuple[int, int], ...] = ()
    seed: int = 0
    train_text: bool = False  # train the text encoder too, instead of keeping it frozen
    text_dtype: Literal["float32", "bfloat16"] = "float32"  # of a frozen text encoder: weights and matrix products
    # Of the frozen tokenizer's convolutions. A bit is the sign of a small difference: one pass of bfloat16, the default
    # of a TPU, or TF32 on a GPU, turns some of them.
    tokenizer_precision: Literal["default", "high", "highest"] = "highest"
    tokenizer_weights: str = ""  # directory of the frozen tokenizer
    text_weights: str = ""  # directory of the frozen text encoder; unused with train_text
    init_from: str = ""  # directory of an editor whose trained parts the run starts from
    log_every: int = 10  # steps
    sample_every: int = 500  # steps between sheets of sampled images; 0 = never
    eval_every: int = 500  # steps between evaluations on the held-out split; 0 = never
    eval_batches: int = 4
    save_every: int = 500  # steps
    save_minutes: float = 0.0  # at least so often, too; 0 = by steps alone
    keep_checkpoints: int = 3  # newest ones
    keep_every: int = 0  # steps; checkpoints of multiples of it are kept for good; 0 = none

    def __post_init__(self) -> None:
        _check_cadence(self)
        _check_choice("text_dtype", self.text_dtype, ("float32", "bfloat16"))
        _check_choice("tokenizer_precision", self.tokenizer_precision, ("default", "high", "highest"))
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerRunConfig:
    """One training run of a tokenizer."""

    name: str
    model: EditorConfig  # its tokenizer and its pyramid are used
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    guard: GuardConfig = GuardConfig()
    steps: int = 2000
    seed: int = 0
    init_from: str = ""  # directory of a tokenizer that the run starts from
    noise_max: float = 0.0  # largest share of bits flipped before decoding; >0 makes the decoder forgive wrong bits
    partial_share: float = 0.0  # of the images, decoded from their first scales alone: moves detail to coarse bits
    train_encoder: bool = True  # False: features and bits stay as they are, the decoder alone learns
    l1_weight: float = 1.0
    perceptual_weight: float = 0.0  # of the VGG feature distance; needs perceptual_weights
    perceptual_weights: str = ""  # file of VGG-16 weights (torchvision names)
    commitment_weight: float = 0.25
    entropy_weight: float = 0.02
    entropy_temperature: float = 1.0  # of the soft bits in the entropy term
    log_every: int = 10
    sample_every: int = 500
    save_every: int = 500
    save_minutes: float = 0.0
    keep_checkpoints: int = 2
    keep_every: int = 0

    def __post_init__(self) -> None:
        _check_cadence(self)


# Infinity's and VAREdit's transformers (model.md, section 1): depth, width, heads.
_TRANSFORMERS = {
    "125m": (12, 768, 8),
    "350m": (16, 1152, 12),
    "700m": (24, 1536, 16),
    "2b": (32, 2048, 16),
    "2.2b": (32, 2080, 20),
    "4.5b": (40, 2688, 24),
    "8b": (40, 3584, 28),
    "8.5b": (48, 3360, 28),
    "20b": (58, 4608, 36),
}

# Flan-T5 encoders: width, layers, heads, head size, mlp width.
_TEXT_ENCODERS = {
    "small": (512, 8, 6, 64, 1024),
    "base": (768, 12, 12, 64, 2048),
    "large": (1024, 24, 16, 64, 2816),
    "xl": (2048, 24, 32, 64, 5120),
    "xxl": (4096, 24, 64, 64, 10240),
}

TOKENIZER_32BIT = TokenizerConfig(bits=32, channel_multipliers=(1, 2, 4, 4, 4))
TOKENIZER_14BIT = TokenizerConfig(bits=14, channel_multipliers=(1, 2, 4, 4))


def text_preset(name: str) -> TextConfig:
    """Flan-T5 encoder of a published size: small, base, large, xl or xxl."""
    if name not in _TEXT_ENCODERS:
        raise ValueError(f"unknown text encoder {name!r}; known are {', '.join(_TEXT_ENCODERS)}")
    width, layers, heads, head_size, mlp_width = _TEXT_ENCODERS[name]
    return TextConfig(width=width, layers=layers, heads=heads, head_size=head_size, mlp_width=mlp_width)


def _tiny() -> EditorConfig:
    """The smallest editor with every part of the large ones; for tests and dry runs."""
    return EditorConfig(
        tokenizer=TokenizerConfig(
            bits=4, channel_multipliers=(1, 1, 2), base_channels=8, norm_groups=4, encoder_blocks=1, decoder_blocks=1
        ),
        text=TextConfig(width=32, layers=2, heads=2, head_size=16, mlp_width=48),
        transformer=TransformerConfig(
            depth=3, width=32, heads=2, token_bits=4, text_width=32, unconditional_rows=16, drop_path=0.0
        ),
        pixel_budget="",
        grids=((1, 1), (2, 2), (4, 4)),
    )


def preset(name: str) -> EditorConfig:
    """Editor of a published size, or `tiny`. Names of Infinity sizes are their parameter counts.

    Raises ValueError with the known names for any other.
    """
    if name == "tiny":
        return _tiny()
    if name not in _TRANSFORMERS:
        raise ValueError(f"unknown preset {name!r}; known are {', '.join(PRESETS)}")
    depth, width, heads = _TRANSFORMERS[name]
    patchify = width >= 3360  # the 14-bit, stride 8 tokenizer goes with the large models
    return EditorConfig(
        tokenizer=TOKENIZER_14BIT if patchify else TOKENIZER_32BIT,
        transformer=TransformerConfig(depth=depth, width=width, heads=heads, token_bits=56 if patchify else 32),
        patchify=patchify,
    )


PRESETS = ("tiny", *_TRANSFORMERS)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain dicts, for ConfigDict and config.json."""
    return dataclasses.asdict(config)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Inverse of `to_dict`: builds config class `cls`; lists become tuples.

    Raises ValueError naming a field that `cls` does not have.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {unknown[0]!r}; it has {', '.join(fields)}")
    arguments = {}
    for name, value in values.items():
        field_type = fields[name].type
        if isinstance(field_type, type) and dataclasses.is_dataclass(field_type):
            arguments[name] = from_dict(field_type, dict(value))
        else:
            arguments[name] = _tuples(value)
    return cls(**arguments)


def per_scale(value: float | tuple[float, ...], scales: int) -> tuple[float, ...]:
    """`value` as one number a scale; a shorter tuple is continued with its last number."""
    values = value if isinstance(value, tuple) else (value,)
    if not values or len(values) > scales or not all(math.isfinite(v) for v in values):
        raise ValueError(f"{value!r} is not a list of 1 to {scales} finite numbers, one a scale")
    return tuple(float(v) for v in values) + (float(values[-1]),) * (scales - len(values))
