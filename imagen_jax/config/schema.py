"""The configuration schema: frozen dataclasses, read and written by `overrides`.

A run is one `Config`. Every field has its documentation and unit in its metadata (`doc`), from
which `imagen config` and the reference are generated. The sections `data`, `sampling`, `text`,
`train` and `checkpoint` are in modules of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from imagen_jax.config import bounds
from imagen_jax.config.data import DataConfig
from imagen_jax.config.distill import DistillConfig
from imagen_jax.config.fields import ConfigError, check_choice, doc, section
from imagen_jax.config.lora import LoraConfig
from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.config.text import EmbedConfig, PretrainTextConfig, TextConfig
from imagen_jax.config.train import CheckpointConfig, EvaluateConfig, TrainConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A U-Net. Per-level tuples go from high to low resolution.

    `unet` is the base model of the paper (ADM's topology), `efficient_unet` its super-resolution
    model (Appendix B).
    """

    name: str = doc("unet", "Row of stages.network.MODELS: unet or efficient_unet.")
    channels: tuple[int, ...] = doc((512, 1024, 1536, 2048), "Width per level.")
    num_res_blocks: tuple[int, ...] = doc((3, 3, 3, 3), "Residual blocks per level.")
    self_attention: tuple[bool, ...] = doc((False, True, True, True), "Self-attention per level.")
    cross_attention: tuple[bool, ...] = doc(
        (False, True, True, True), "Whether the level's pixels attend to the text tokens."
    )
    text_conditioning: str = doc(
        "concat",
        "How pixels attend to text: concat (text keys/values beside the self-attention's own), "
        "cross (a layer of its own) or none (pooled text only).",
    )
    position_embedding: bool = doc(
        False,
        "Add a learned position embedding to the input of attention (as in ViT); fixes the "
        "image size.",
    )
    text_pooling: str = doc(
        "attention",
        "Pooled text vector: attention, mean, or token (IF: an extra token that also attends to "
        "padding).",
    )
    pooling_heads: int = doc(64, "token pooling: attention heads.")
    text_norm: str = doc(
        "layer", "Norm of the tokens: layer (once), group (in every attention block; IF) or none."
    )
    text_width: int = doc(
        0, "Width to which the tokens are projected before attention; 0: not projected."
    )
    noise_embedding: str = doc(
        "time",
        "How logsnr is embedded: time (continuous) or steps (the nearest of IF's 1000 steps).",
    )
    activation: str = doc("swish", "Nonlinearity: swish or gelu.")
    middle_attention: tuple[bool, ...] = doc(
        (), "unet: self- and cross-attention of the middle, two entries; (): the last level's."
    )
    residual_divisor: float = doc(1.0, "Residual blocks divide their sum by this (IF's SR: 1.414).")
    head_dim: int = doc(64, "Channels per attention head.")
    num_groups: int = doc(32, "Groups of GroupNorm.")
    patch_size: int = doc(1, "Space-to-depth factor at the input and output; 1: none.")
    strided_stem: tuple[bool, ...] = doc(
        (), "efficient_unet: whether each level starts with a strided convolution; (): all do."
    )
    embed_dim: int = doc(0, "Width of the time and pooled-text embedding; 0: 4 * channels[0].")
    skip_scale: float | None = doc(
        None,
        "Factor on skip connections; None: the network's own (unet 1, efficient_unet 2**-0.5).",
    )
    dropout: float = doc(0.0, "Dropout in the residual blocks, 0..1.")
    lowres: bool = doc(False, "Whether the input includes a low-resolution image (SR stages).")
    lowres_residual: bool = doc(False, "Add the low-resolution image to the output (x0 only).")
    text_dim: int = doc(0, "Width of the text embeddings; 0: that of the encoder.")
    out_channels: int = doc(
        3, "Channels of the output: 3, or 6 with those of a learned variance (sampling.variance)."
    )
    dtype: str = doc("float32", "Activation dtype; parameters are always float32.")
    remat: str = doc(
        "none",
        "Activations that the backward pass recomputes: none, blocks (inside each residual and "
        "attention block) or full (inside whole levels, and inside their blocks).",
        learns=False,
    )

    def with_defaults(self, defaults: Mapping[str, Any]) -> ModelConfig:
        """The same with `defaults`, a network's own values, in place of fields that are None."""
        own = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **own)

    def __post_init__(self) -> None:
        bounds.check(self, "model")
        check_choice("model.remat", self.remat, ("none", "blocks", "full"))
        check_choice("model.text_conditioning", self.text_conditioning, ("concat", "cross", "none"))
        check_choice("model.text_pooling", self.text_pooling, ("attention", "mean", "token"))
        check_choice("model.text_norm", self.text_norm, ("layer", "group", "none"))
        check_choice("model.noise_embedding", self.noise_embedding, ("time", "steps"))
        check_choice("model.activation", self.activation, ("swish", "gelu"))
        if self.text_norm == "group" and self.text_width % 32:
            raise ConfigError(
                f"config.model.text_width={self.text_width} must be a multiple of 32, the groups "
                "of config.model.text_norm='group'"
            )
        if len(self.middle_attention) not in (0, 2):
            raise ConfigError(
                f"config.model.middle_attention={self.middle_attention} must have two entries, "
                "self- and cross-attention, or none"
            )
        levels = len(self.channels)
        for field in ("num_res_blocks", "self_attention", "cross_attention"):
            if len(getattr(self, field)) != levels:
                raise ConfigError(
                    f"config.model.{field} has {len(getattr(self, field))} entries, "
                    f"config.model.channels has {levels}; give one entry per level"
                )
        for level, width in enumerate(self.channels):
            attends = self.self_attention[level] or self.cross_attention[level]
            if (attends or (level == levels - 1 and self.middle_attention)) and (
                width % self.head_dim
            ):
                raise ConfigError(
                    f"config.model.channels={self.channels} must be multiples of "
                    f"config.model.head_dim={self.head_dim} where pixels attend"
                )
            if width % self.num_groups:
                raise ConfigError(
                    f"config.model.channels={self.channels} must be multiples of "
                    f"config.model.num_groups={self.num_groups}"
                )


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The noise process, what the network predicts and how its error is weighted."""

    prediction: str = doc("eps", "What the network predicts: eps, x0 or v.")
    schedule: str = doc(
        "cosine",
        "Row of diffusion.process.SCHEDULES: cosine, linear or cosine_steps (IF's 1000 steps).",
    )
    logsnr_shift: float = doc(0.0, "Added to logsnr, nats; 2*log(64/d) is simple diffusion's.")
    logsnr_min: float = doc(-20.0, "Lower clip of logsnr, nats.")
    logsnr_max: float = doc(20.0, "Upper clip of logsnr, nats.")
    loss_weight: str = doc("eps", "Row of diffusion.process.LOSS_WEIGHTS.")
    vlb_weight: float = doc(
        0.0,
        "Weight of the variational bound in bits per dimension, which trains a learned variance "
        "(model.out_channels=6); Nichol & Dhariwal's is 0.001. 0: off.",
    )
    cond_drop_prob: float = doc(0.1, "Probability of training without text, 0..1.")
    text_noise: float = doc(
        0.0,
        "Standard deviation of Gaussian noise on the text embeddings in training, relative to "
        "their root mean square: near words come to mean the same. 0: off.",
    )
    aug_level_max: float = doc(
        1.0, "SR stages: training samples aug_level from U(0, aug_level_max), 0..1."
    )
    aug_schedule: str = doc("cosine", "Schedule that turns aug_level into noise.")
    aug_noise_size: str = doc(
        "image", "SR stages: resolution of the aug_level noise: image, or lowres (upsampled)."
    )

    aug_upsampling: str = doc(
        "bilinear",
        "SR stages: upsampling of the low-resolution image: bilinear, or corners (bilinear with "
        "the corner pixels of both images aligned; IF).",
    )

    def __post_init__(self) -> None:
        check_choice("diffusion.aug_noise_size", self.aug_noise_size, ("image", "lowres"))
        check_choice("diffusion.aug_upsampling", self.aug_upsampling, ("bilinear", "corners"))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning-rate schedule."""

    name: str = doc("adam", "Row of training.optimizer.RULES: adam, adamw, adafactor or lion.")
    learning_rate: float = doc(1e-4, "Peak learning rate.")
    schedule: str = doc("constant", "After the warm-up: constant, cosine, linear_tail or rsqrt.")
    warmup_steps: int = doc(10_000, "Steps of linear warm-up.")
    decay_fraction: float | None = doc(
        None, "linear_tail: share of the run over which it falls to zero; None: 0.3."
    )
    b1: float | None = doc(None, "adam, adamw, lion: decay of the first moment; None: 0.9.")
    b2: float | None = doc(
        None, "adam, adamw, lion: decay of the second moment; None: 0.999, lion 0.99."
    )
    eps: float | None = doc(
        None, "adam, adamw: added to the root of the second moment; None: 1e-8."
    )
    weight_decay: float = doc(
        0.0,
        "adamw, adafactor, lion: decoupled decay of kernels per step, times the learning rate; "
        "norms and biases do not decay.",
    )
    multipliers: tuple[str, ...] = doc(
        (),
        "Learning rates of parts, PATTERN=FACTOR on the paths of parameters, such as "
        "('text_*=0.1',); the last match counts.",
    )
    clip_norm: float = doc(1.0, "Global gradient norm is clipped to this; 0: not clipped.")
    multiply_by_parameter_scale: bool = doc(False, "Adafactor: steps relative to the weights' rms.")


MAX_SIGMA_REL = 0.28  # The mean over the whole run, the widest average, has 12**-0.5 = 0.289.


def check_sigma_rel(field: str, sigma_rel: float) -> None:
    """Raises ConfigError unless `sigma_rel` is a relative width of a power-function average."""
    if not 0.0 < sigma_rel < MAX_SIGMA_REL:
        raise ConfigError(
            f"{field}={sigma_rel} must be a relative width above 0 and below {MAX_SIGMA_REL}; "
            "try 0.1"
        )


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """Moving averages of the parameters, kept in float32."""

    decay: float = doc(0.9999, "Decay per step once warmed up, 0..1.")
    warmup_power: float = doc(0.75, "Decay at step t is min(decay, 1 - (1 + t)**-power).")
    profiles: tuple[float, ...] = doc(
        (),
        "Relative widths sigma_rel of power-function averages tracked beside the ordinary one, "
        "each as large as the parameters, for example (0.05, 0.1), 0..0.28; (): none.",
    )
    snapshot_every: int = doc(
        0,
        "Steps between snapshots of the power-function averages, besides the last; 0: none.",
        learns=False,
        compiled=False,
    )

    def __post_init__(self) -> None:
        for index, sigma_rel in enumerate(self.profiles):
            check_sigma_rel(f"config.ema.profiles[{index}]", sigma_rel)
        if len({f"{sigma_rel:.3f}" for sigma_rel in self.profiles}) < len(self.profiles):
            raise ConfigError(
                f"config.ema.profiles={self.profiles} must differ in their first three decimals; "
                "try (0.05, 0.1)"
            )
        if self.snapshot_every < 0:
            raise ConfigError(
                f"config.ema.snapshot_every={self.snapshot_every} must be at least 1, or 0 for none"
            )
        if self.snapshot_every and not self.profiles:
            raise ConfigError(
                f"config.ema.snapshot_every={self.snapshot_every} has nothing to save: "
                "config.ema.profiles=() must name widths; try (0.05, 0.1)"
            )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices and how arrays are sharded over them."""

    data: int = doc(
        -1, "Devices of each slice along the data axis; -1: all remaining devices of a slice."
    )
    fsdp: int = doc(
        1, "Devices of each slice along the fsdp axis, which shards batch and parameters."
    )
    tensor: int = doc(1, "Devices of each slice along the tensor axis, which shards channels.")
    dcn_data: int = doc(
        -1,
        "Slices along the data axis: gradients cross the data-centre network once per step; "
        "-1: all remaining slices.",
    )
    dcn_fsdp: int = doc(
        1, "Slices along the fsdp axis: parameters cross the data-centre network, too."
    )
    cpu_devices: int = doc(
        1,
        "CPU devices that the host's cores are split into, without an accelerator.",
        compiled=False,
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """One stage of a cascade: its data, text encoder, network, process, training and sampling."""

    name: str = doc("stage", "Name of the stage, used in reports.", learns=False, compiled=False)
    seed: int = doc(0, "Seed of initialisation, data order, noise and drop-out.")
    data: DataConfig = section(DataConfig, "Images, captions and batches.")
    text: TextConfig = section(TextConfig, "Frozen text encoder.")
    pretrain_text: PretrainTextConfig = section(
        PretrainTextConfig, "Pre-training of a small text encoder.", learns=False, compiled=False
    )
    embed: EmbedConfig = section(EmbedConfig, "Embedding store.", learns=False, compiled=False)
    model: ModelConfig = section(ModelConfig, "U-Net.")
    lora: LoraConfig = section(LoraConfig, "Low-rank updates of the kernels.")
    diffusion: DiffusionConfig = section(DiffusionConfig, "Noise process and loss.")
    distill: DistillConfig = section(DistillConfig, "Distillation of another stage.")
    optimizer: OptimizerConfig = section(OptimizerConfig, "Optimizer and learning rate.")
    ema: EmaConfig = section(EmaConfig, "Moving averages of the parameters.")
    train: TrainConfig = section(TrainConfig, "Length of the run, accumulation, reports.")
    evaluate: EvaluateConfig = section(
        EvaluateConfig, "Evaluations in training.", learns=False, compiled=False
    )
    checkpoint: CheckpointConfig = section(
        CheckpointConfig, "Checkpoints.", learns=False, compiled=False
    )
    mesh: MeshConfig = section(MeshConfig, "Devices and sharding.", learns=False)
    sampling: SamplingConfig = section(
        SamplingConfig, "Sampler, guidance, thresholding.", learns=False, compiled=False
    )

    def __post_init__(self) -> None:
        bounds.check(self)
        if self.diffusion.logsnr_min >= self.diffusion.logsnr_max:
            raise ConfigError(
                f"config.diffusion.logsnr_min={self.diffusion.logsnr_min} must be below "
                f"config.diffusion.logsnr_max={self.diffusion.logsnr_max}"
            )
        if self.model.lowres != bool(self.data.lowres_size):
            raise ConfigError(
                f"config.model.lowres={self.model.lowres} contradicts "
                f"config.data.lowres_size={self.data.lowres_size}; "
                "an SR stage sets both, a base stage neither"
            )
        if self.model.lowres_residual and self.diffusion.prediction != "x0":
            raise ConfigError(
                "config.model.lowres_residual=True needs config.diffusion.prediction='x0', "
                f"got {self.diffusion.prediction!r}"
            )
        for field, needed in (
            ("sampling.variance='learned'", self.sampling.variance == "learned"),
            (f"diffusion.vlb_weight={self.diffusion.vlb_weight}", self.diffusion.vlb_weight > 0),
        ):
            if needed and self.model.out_channels != 6:
                raise ConfigError(
                    f"config.{field} needs config.model.out_channels=6, got "
                    f"{self.model.out_channels}"
                )
        if self.model.position_embedding and self.data.crop_from:
            raise ConfigError(
                "config.model.position_embedding=True does not go with "
                f"config.data.crop_from={self.data.crop_from}: positions in a crop differ from "
                "those in the image; set either to its default"
            )
