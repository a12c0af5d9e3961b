"""Distillation: what a student learns from a teacher with the same network.

Two kinds, one after the other (arXiv:2210.03142; arXiv:2202.00512). The student of guidance learns
in one evaluation what guidance makes of two, at the guidance weight of the teacher. Differs
from paper: at one weight, not as a function of it. The student of N sampling steps learns in one
step what the teacher does in two DDIM steps, half as long each. Both change the x0 that the network
learns, and nothing else of the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.config.schema import Config
from imagen_jax.diffusion import process, samplers
from imagen_jax.diffusion.guidance import Denoise
from imagen_jax.stages.denoiser import make_denoiser
from imagen_jax.stages.loss import network_inputs
from imagen_jax.stages.stage import Stage


def add_targets(examples: Mapping[str, Any], config: Config) -> dict[str, Array]:
    """The examples with x0_target [B,H,W,3] of the teacher, and the times of the student's steps.

    Args:
      examples: as for `loss.loss_given_randomness`; and the teacher's parameters as "teacher",
        which the result lacks. Captions are not dropped.
      config: of the student; `distill` says what it learns.
    """
    found = {name: value for name, value in examples.items() if name != "teacher"}
    settings = config.distill
    found["drop"] = jnp.zeros_like(examples["drop"])
    if settings.steps is not None:
        found["time"] = start_times(examples["time"], settings.steps)
    z, logsnr, conditioning = network_inputs(found, config)
    # A learned variance changes no x0.
    sampling = dataclasses.replace(settings.sampling, variance="fixed")
    teacher = dataclasses.replace(config, sampling=sampling)
    denoise = make_denoiser(Stage(teacher, examples["teacher"]), conditioning)
    if settings.steps is None:
        target = denoise(z, logsnr)
    else:
        times = (found["time"] - share / settings.steps for share in (0.5, 1.0))
        levels = [process.logsnr_at(jnp.maximum(t, 0.0), config.diffusion) for t in times]
        target = two_steps_as_one(denoise, z, logsnr, *levels)
    return {**found, "x0_target": target}


def start_times(time: Float[Array, " b"], steps: int) -> Float[Array, " b"]:
    """The end of the one of `steps` equal parts of [0, 1] that each time is in."""
    return jnp.maximum(jnp.ceil(time * steps), 1.0) / steps


def two_steps_as_one(
    denoise: Denoise,
    z: Float[Array, "b h w c"],
    logsnr_t: Float[Array, " b"],
    logsnr_m: Float[Array, " b"],
    logsnr_s: Float[Array, " b"],
) -> Float[Array, "b h w c"]:
    """x0 with which one DDIM step ends where two end (arXiv:2202.00512, Alg. 2).

    Args:
      denoise: of the teacher.
      z: noisy images at logsnr_t.
      logsnr_t: nats, the noisiest.
      logsnr_m: nats.
      logsnr_s: nats, the cleanest.
    """
    step = samplers.ddim().step
    middle, _ = step(denoise, z, logsnr_t, logsnr_m, None, ())
    end, _ = step(denoise, middle, logsnr_m, logsnr_s, None, ())
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        [process.expand(v, z) for v in process.alpha_sigma(level)] for level in (logsnr_t, logsnr_s)
    )
    ratio = sigma_s / sigma_t
    return (end - ratio * z) / (alpha_s - ratio * alpha_t)
