"""Fields of diffusers' `DDPMScheduler` as DiffusionConfig and SamplingConfig, and back.

The scheduler of a DeepFloyd IF pipeline holds the noise process, the spacing of the timesteps, the
variance and the thresholding. A value that cannot be represented is an error that names the field.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.config.schema import DiffusionConfig
from imagen_jax.diffusion.process import cosine_steps
from imagen_jax.interop import weights
from imagen_jax.interop.if_config import DIFFUSERS_VERSION

SCHEDULE = "cosine_steps"

# Fields with one supported value, of the process.
_PROCESS = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}
# Defaults of diffusers for the other fields.
_DEFAULTS = {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
}
_PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# variance_type -> `sampling.variance`, `sampling.gamma`.
_VARIANCES = {
    "learned_range": ("learned", 0.0),
    "fixed_small": ("fixed", 0.0),
    "fixed_small_log": ("fixed", 0.0),
    "fixed_large": ("fixed", 1.0),
}
_SPACINGS = ("leading", "linspace", "trailing")


def process(given: Mapping[str, Any], where: str) -> DiffusionConfig:
    """The noise process of a scheduler.

    Args:
      given: its fields; missing ones have diffusers' defaults.
      where: name of the file for messages.

    Raises:
      WeightsError: the value of a field cannot be represented; the field is named.
    """
    # beta_schedule has no default here: diffusers' own, linear, is not represented.
    values = {**_PROCESS, "beta_schedule": "linear", **_DEFAULTS, **given}
    for field, expected in _PROCESS.items():
        _require(values[field] == expected, values, field, expected, where)
    for field in sorted(values.keys() - _PROCESS.keys() - _DEFAULTS.keys()):
        known = field.startswith("_") or values[field] is None
        _require(known, values, field, "fields known here", where)
    prediction = values["prediction_type"]
    # A tuple: a list in the file cannot be hashed.
    _require(prediction in tuple(_PREDICTIONS), values, "prediction_type", _PREDICTIONS, where)
    logsnr = cosine_steps(dtype=np.float32).astype(np.float32)
    return DiffusionConfig(
        prediction=_PREDICTIONS[prediction],
        loss_weight=_PREDICTIONS[prediction],
        schedule=SCHEDULE,
        aug_schedule=SCHEDULE,
        aug_upsampling="corners",
        # The network embeds no noise level outside its table.
        logsnr_min=float(logsnr[-1]),
        logsnr_max=float(logsnr[0]),
    )


def sampling(given: Mapping[str, Any], where: str) -> SamplingConfig:
    """Sampler, spacing, variance and thresholding of a scheduler; arguments as of `process`.

    Raises:
      WeightsError: the value of a field cannot be represented; the field is named.
    """
    values = {**_DEFAULTS, **given}
    variance = values["variance_type"]
    _require(variance in tuple(_VARIANCES), values, "variance_type", _VARIANCES, where)
    _require(values["timestep_spacing"] in _SPACINGS, values, "timestep_spacing", _SPACINGS, where)
    _require(values["steps_offset"] == 0, values, "steps_offset", 0, where)
    for field in ("thresholding", "clip_sample"):
        _require(isinstance(values[field], bool), values, field, "true or false", where)
    fields: dict[str, Any] = {"thresholding": "none"}
    if values["thresholding"]:
        cap, ratio = values["sample_max_value"], values["dynamic_thresholding_ratio"]
        fields = {"thresholding": "dynamic", "threshold_cap": _number(cap)}
        _require(fields["threshold_cap"] >= 1, values, "sample_max_value", "1 or more", where)
        percentile = round(100 * _number(ratio), 6)
        fields["threshold_percentile"] = percentile
        valid = 0 < percentile <= 100
        _require(valid, values, "dynamic_thresholding_ratio", "above 0, at most 1", where)
    elif values["clip_sample"]:
        fields = {"thresholding": "static"}
        _require(values["clip_sample_range"] == 1, values, "clip_sample_range", 1.0, where)
    try:
        return SamplingConfig(
            sampler="ddpm",
            spacing=values["timestep_spacing"],
            variance=_VARIANCES[variance][0],
            gamma=_VARIANCES[variance][1],
            **fields,
        )
    except ConfigError as error:
        raise weights.WeightsError(f"{where}: {error}") from error


def scheduler_config(diffusion: DiffusionConfig, settings: SamplingConfig) -> dict[str, Any]:
    """Fields of `DDPMScheduler` for a stage; inverse of `process` and `sampling`.

    Raises:
      WeightsError: diffusers does not support the value of a field; the field is named.
    """
    values = {**_PROCESS, **_DEFAULTS, "_diffusers_version": DIFFUSERS_VERSION}
    predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    _require_ours(diffusion.schedule == SCHEDULE, diffusion, "schedule", SCHEDULE)
    _require_ours(diffusion.logsnr_shift == 0, diffusion, "logsnr_shift", 0.0)
    values["prediction_type"] = predictions[diffusion.prediction]
    values["timestep_spacing"] = settings.spacing if settings.spacing in _SPACINGS else "leading"
    variances = {found: theirs for theirs, found in reversed(_VARIANCES.items())}
    key = (settings.variance, 0.0 if settings.variance == "learned" else settings.gamma)
    _require_ours(key in variances, settings, "gamma", "0.0 or 1.0")
    values["variance_type"] = variances[key]
    values["clip_sample"] = settings.thresholding != "none"
    if settings.thresholding == "dynamic":
        values["thresholding"] = True
        values["dynamic_thresholding_ratio"] = settings.threshold_percentile / 100
        # Without a cap: a value that no pixel reaches.
        values["sample_max_value"] = settings.threshold_cap or 1e9
    return values


def same(given: Mapping[str, Any], diffusion: DiffusionConfig, settings: SamplingConfig) -> bool:
    """Whether a scheduler still describes a stage, so that its file can be written unchanged."""
    ours = scheduler_config(diffusion, settings)
    return scheduler_config(process(given, "source"), sampling(given, "source")) == ours


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _require(
    supported: bool, values: Mapping[str, Any], field: str, expected: Any, where: str
) -> None:
    if not supported:
        named = ", ".join(map(repr, expected)) if isinstance(expected, dict | tuple) else expected
        named = repr(expected) if named is None or isinstance(named, bool) else named
        raise weights.WeightsError(
            f"{where}: {field}={values[field]!r} cannot be represented, only {named}"
        )


def _require_ours(supported: bool, section: Any, field: str, expected: Any) -> None:
    if not supported:
        name = "diffusion" if isinstance(section, DiffusionConfig) else "sampling"
        got = dataclasses.asdict(section)[field]
        raise weights.WeightsError(
            f"config.{name}.{field}={got!r} cannot be represented in diffusers, only {expected}"
        )
