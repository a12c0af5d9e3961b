"""The section `sampling` of the schema: sampler, guidance and thresholding of a stage."""

from __future__ import annotations

import dataclasses
import itertools

from imagen_jax.config.fields import ConfigError, check_choice, doc

# Fields that say how the images are computed, and change them by rounding alone.
PLACEMENT = ("batch_size", "fsdp", "height")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How a trained stage samples; `diffusion.guidance` explains the guidance fields."""

    sampler: str = doc(
        "ddpm",
        "Row of diffusion.samplers.SAMPLERS: ddpm, ddim, dpmpp_2m, dpmpp_2m_sde or heun.",
    )
    steps: int = doc(256, "Denoising steps.")
    spacing: str = doc(
        "time",
        "Times of the steps: time (evenly spaced), logsnr (evenly spaced noise levels), karras "
        "(EDM's noise levels, rho 7), or discrete timesteps of 1000: leading, linspace, trailing, "
        "or a list of DeepFloyd IF, which replaces `steps`: fast27, smart27, smart50, smart100, "
        "smart185, super27, super40 or super100.",
    )
    timesteps: tuple[int, ...] = doc(
        (),
        "Discrete timesteps, 999..0 and decreasing, in place of `spacing` and `steps`; timestep k "
        "is time k / 1000 of the schedule. (): none.",
    )
    gamma: float = doc(0.0, "ddpm: variance is small**(1-gamma) * large**gamma, 0..1.")
    churn: float = doc(
        0.0, "heun: each step first adds noise, by which sigma / alpha rises by this share; 0: off."
    )
    variance: str = doc(
        "fixed",
        "ddpm: fixed (by gamma), or learned (gamma per pixel by the network's channels 4 to 6).",
    )
    guidance_weight: float = doc(1.35, "w in w*cond + (1-w)*uncond; 1: off.")
    guidance_schedule: tuple[tuple[float, ...], ...] = doc(
        (),
        "Knots (logsnr in nats, factor) of a factor on w - 1, linear in between and constant "
        "outside, for example ((-4, 0), (4, 1)); (): 1 everywhere.",
    )
    guidance_interval: tuple[float, ...] = doc(
        (), "(low, high): guide only for low <= logsnr < high, nats; (): always."
    )
    guidance_oscillate_after: int = doc(
        -1, "Steps with guidance, after which every second step has it; -1: all steps have it."
    )
    guidance_rescale: float = doc(
        0.0, "Guidance rescale phi: share of the conditional x0's standard deviation, 0 (off) .. 1."
    )
    guidance_parallel: float = doc(
        1.0, "APG: factor on the guidance component parallel to the conditional x0; 1: off."
    )
    guidance_norm: float = doc(
        0.0, "APG: maximal L2 norm of the difference of the two x0; 0: no limit."
    )
    thresholding: str = doc("dynamic", "Row of thresholding.THRESHOLDS: none, static or dynamic.")
    threshold_percentile: float = doc(99.5, "dynamic: percentile p of |x0|, 0..100.")
    threshold_cap: float = doc(
        0.0, "dynamic: largest divisor, at least 1; larger values are clipped. 0: no cap."
    )
    aug_level: float = doc(0.0, "SR stages: noise on the low-resolution image, 0..1.")
    loras: tuple[str, ...] = doc(
        (), "Of a request: the loaded LoRAs in use, NAME@WEIGHT; unset, all with their weights."
    )
    lora_scale: float = doc(1.0, "Factor on the weights of the LoRAs in use; 0: off.")
    dtype: str | None = doc(
        None,
        "Of parameters and activations, in place of model.dtype: float32 or bfloat16; None: "
        "bfloat16 on accelerators, float32 on CPUs.",
    )
    batch_size: int | None = doc(
        None, "Images sampled at a time, at most; None: what the devices' memory has room for."
    )
    fsdp: int | None = doc(
        None,
        "Devices of a process that share one copy of the parameters; None: 1 where a device has "
        "room for all of them, otherwise all devices.",
    )
    height: int = doc(
        1, "Devices of a process that share the rows of one image; each has all parameters."
    )

    def __post_init__(self) -> None:
        if self.dtype is not None:
            check_choice("sampling.dtype", self.dtype, ("float32", "bfloat16"))
        for field in ("batch_size", "fsdp", "height"):
            value = getattr(self, field)
            self._check(field, value is None or value >= 1, "at least 1")
        # XLA (JAX 0.10) computes other images where both axes of a mesh are larger than 1.
        self._check("fsdp", self.height == 1 or self.fsdp in (None, 1), "1 with sampling.height")
        self._check("steps", self.steps >= 1, "at least 1")
        check_choice("sampling.variance", self.variance, ("fixed", "learned"))
        falling = all(a > b for a, b in itertools.pairwise((1000, *self.timesteps, -1)))
        self._check("timesteps", falling, "decreasing within 999..0; try (999, 500, 0)")
        for field in ("gamma", "guidance_rescale", "aug_level"):
            self._check(field, 0.0 <= getattr(self, field) <= 1.0, "within 0..1")
        for field in ("guidance_weight", "guidance_norm"):
            self._check(field, 0.0 <= getattr(self, field) < float("inf"), "at least 0")
        finite = abs(self.guidance_parallel) < float("inf")
        self._check("guidance_parallel", finite, "a finite factor; try 0.0")
        self._check("churn", 0.0 <= self.churn <= 1.0, "within 0..1; EDM's S_churn / steps")
        self._check("lora_scale", abs(self.lora_scale) < float("inf"), "a finite factor; try 1.0")
        after = self.guidance_oscillate_after
        self._check("guidance_oscillate_after", after >= -1, "at least 0, or -1 for never")
        knots = self.guidance_schedule
        rising = all(len(knot) == 2 for knot in knots) and all(
            before[0] < after[0] for before, after in itertools.pairwise(knots)
        )
        self._check(
            "guidance_schedule",
            rising,
            "pairs (logsnr, factor) of rising logsnr; try ((-4.0, 0.0), (4.0, 1.0))",
        )
        interval = self.guidance_interval
        self._check(
            "guidance_interval",
            not interval or (len(interval) == 2 and interval[0] < interval[1]),
            "(low, high) in logsnr, low first; try (-4.0, 2.0), or () for everywhere",
        )
        percentile = 0.0 < self.threshold_percentile <= 100.0
        self._check("threshold_percentile", percentile, "above 0 and at most 100; try 99.5")
        cap = self.threshold_cap == 0.0 or 1.0 <= self.threshold_cap < float("inf")
        self._check("threshold_cap", cap, "at least 1, or 0 for no cap")

    @property
    def guided(self) -> bool:
        """Whether guidance changes images: the weight is not 1 at some noise level."""
        factors = [knot[1] for knot in self.guidance_schedule]
        return self.guidance_weight != 1.0 and (not factors or any(factors))

    def _check(self, field: str, holds: bool, expected: str) -> None:
        if not holds:
            got = getattr(self, field)
            raise ConfigError(f"config.sampling.{field}={got} must be {expected}")
