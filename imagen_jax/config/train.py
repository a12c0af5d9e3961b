"""The sections of the schema for a run: its length, reports, faults, restarts and checkpoints."""

from __future__ import annotations

import dataclasses

from imagen_jax.config.fields import check_choice, doc


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length of the run and what is reported on the way."""

    steps: int = doc(2_500_000, "Training steps.")
    accumulation: int = doc(
        1, "Sequential parts of a batch (gradient accumulation), to save memory.", learns=False
    )
    reduce_dtype: str = doc(
        "float32",
        "Dtype in which weight gradients of a bfloat16 stage are summed over devices: float32, or "
        "bfloat16, which halves the bytes and rounds every addend to 8 bits.",
    )
    init_from: str = doc(
        "", "Stage folder or workdir of a run whose parameters a new run starts from; empty: none."
    )
    init_partial: bool = doc(
        False,
        "Start parameters at random that init_from lacks or has in another shape, and ignore those "
        "that the network lacks; each is listed. Otherwise they are an error.",
    )
    init_optimizer: str = doc(
        "reset",
        "Optimizer state with init_from: reset, or kept (of a workdir with the same parameters).",
    )
    trainable: tuple[str, ...] = doc(
        (),
        "Parameters that are trained, by patterns of their paths such as ('*attention*',); the "
        "others are frozen. (): all, or with a LoRA its own.",
    )
    overfit_batch: bool = doc(
        False, "Repeat the first batch, a test whether the stage can learn.", compiled=False
    )
    nan_patience: int = doc(
        10,
        "Consecutive bad steps (not finite, or a loss spike) at which the run rolls back.",
        learns=False,
        compiled=False,
    )
    spike_factor: float | None = doc(
        None,
        "A step is a loss spike if its loss exceeds this times the median loss of the last 50 rows "
        "of metrics.jsonl (of at least 10); None: no step is.",
        learns=False,
        compiled=False,
    )
    rollbacks: int = doc(
        1,
        "Roll-backs to the last checkpoint, over the whole run, before it gives up. Each skips the "
        "data from there to the failed step and changes the noise.",
        learns=False,
        compiled=False,
    )
    hang_timeout: float = doc(
        1800.0,
        "Seconds without a completed step after which the run writes the stacks of its threads and "
        "exits with status 75; includes start and compilation; 0: none.",
        learns=False,
        compiled=False,
    )
    heartbeat_timeout: int = doc(
        100,
        "Seconds without a sign of life after which the coordinator takes a process for dead and "
        "ends the others.",
        learns=False,
        compiled=False,
    )
    checksum_every: int = doc(
        1000,
        "Steps between comparisons of the replicas of the state; 0: none.",
        learns=False,
        compiled=False,
    )
    profile_at: int = doc(
        0,
        "First step of a profile; 0: only on SIGUSR1.",
        learns=False,
        compiled=False,
    )
    log_every: int = doc(
        100, "Steps between progress lines and metric rows.", learns=False, compiled=False
    )
    sample_every: int = doc(
        0,
        "Steps between sample grids, WORKDIR/samples and TensorBoard; 0: none.",
        learns=False,
        compiled=False,
    )
    writers: tuple[str, ...] = doc(
        ("tensorboard",),
        "Metric writers beside metrics.jsonl: rows of training.metrics.WRITERS, entry points or "
        "package.module:name.",
        learns=False,
        compiled=False,
    )

    def __post_init__(self) -> None:
        check_choice("train.reduce_dtype", self.reduce_dtype, ("float32", "bfloat16"))
        check_choice("train.init_optimizer", self.init_optimizer, ("reset", "kept"))


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Evaluations in training: what is computed, on which parameters, and when."""

    every: int = doc(0, "Steps between evaluations, besides the first and the last; 0: none.")
    evaluators: tuple[str, ...] = doc(
        ("validation_loss",),
        "What is computed: rows of cli.evaluators.EVALUATORS, entry points or package.module:name.",
    )
    averages: tuple[str, ...] = doc(
        ("ema", "params"),
        "Parameters that are evaluated: ema, params (the raw ones), or an average of "
        "ema.profiles, such as power_0.050.",
    )
    examples: int = doc(
        256,
        "Examples per evaluation, rounded up to whole batches; validation_loss reads as many of "
        "each part. Held-out images repeat with other noise where they are fewer.",
    )
    features: tuple[str, ...] = doc(
        (),
        "distances: networks with their weights, NAME=PATH: inception gives the FID, clip the "
        "CMMD; of the others the Frechet distance. Rows of features.networks.FEATURE_NETWORKS.",
    )
    prompts: str = doc("", "scorer: prompts to sample, .txt, .csv or .jsonl.")
    scorer: str = doc(
        "", "scorer: an entry point of imagen_jax.scorers, or package.module:name of your own."
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved and which checkpoints are kept."""

    every: int = doc(5_000, "Steps between saves; the last step is always saved.")
    keep: int = doc(3, "Newest checkpoints kept.")
    keep_every: int = doc(0, "Steps between checkpoints that are never deleted; 0: none.")
    keep_best: int = doc(0, "Checkpoints with the lowest best_metric that are kept; 0: none.")
    best_metric: str = doc(
        "loss",
        "Metric that keep_best compares: loss, x0_mse or grad_norm of the step, or one of an "
        "evaluation, such as ema/validation_loss.",
    )
    grace: float = doc(
        30.0,
        "Seconds from SIGTERM to the end of the machine; a save that takes longer is reported.",
    )
