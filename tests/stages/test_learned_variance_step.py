"""A sampling step with learned variance against the formulas of Nichol & Dhariwal in float64.

Theirs are those of a discrete chain (improved-diffusion, gaussian_diffusion.py, with the betas of a
respaced chain); here they start from the cumulated alphas of two steps.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion import process, samplers
from imagen_jax.stages import denoiser
from imagen_jax.stages.conditioning import Conditioning, Text
from imagen_jax.stages.stage import Stage

TEXT = Text(jnp.zeros((2, 4, 8)), jnp.ones((2, 4), bool))


def their_step(prediction: str, output, z, noise, abar_t: float, abar_s: float) -> np.ndarray:
    """One step of `p_sample` with ModelVarType.LEARNED_RANGE, all in float64."""
    values, variance = np.split(np.asarray(output, np.float64), 2, axis=-1)
    z, noise = np.asarray(z, np.float64), np.asarray(noise, np.float64)
    beta = 1.0 - abar_t / abar_s
    x0 = {
        "eps": np.sqrt(1.0 / abar_t) * z - np.sqrt(1.0 / abar_t - 1.0) * values,
        "x0": values,
        "v": np.sqrt(abar_t) * z - np.sqrt(1.0 - abar_t) * values,
    }[prediction]
    x0 = np.clip(x0, -1.0, 1.0)
    first = beta * np.sqrt(abar_s) / (1.0 - abar_t)
    second = (1.0 - abar_s) * np.sqrt(1.0 - beta) / (1.0 - abar_t)
    low, high = np.log(beta * (1.0 - abar_s) / (1.0 - abar_t)), np.log(beta)
    share = (variance + 1.0) / 2.0
    return first * x0 + second * z + np.exp(0.5 * (share * high + (1.0 - share) * low)) * noise


@pytest.mark.parametrize("prediction", process.PREDICTIONS)
@pytest.mark.parametrize("times", [(1.0, 0.96), (0.52, 0.48), (0.08, 0.04), (0.002, 0.001)])
def test_a_step_is_that_of_nichol_and_dhariwal(base_config, monkeypatch, prediction, times):
    settings = dataclasses.replace(
        base_config.sampling,
        sampler="ddpm",
        variance="learned",
        guidance_weight=1.0,
        thresholding="static",
    )
    config = dataclasses.replace(
        base_config,
        model=dataclasses.replace(base_config.model, out_channels=6),
        diffusion=dataclasses.replace(base_config.diffusion, prediction=prediction),
        sampling=settings,
    )
    rng = np.random.default_rng(0)
    z, noise = (jnp.asarray(rng.normal(size=(2, 8, 8, 3)), jnp.float32) for _ in range(2))
    output = jnp.asarray(rng.normal(size=(2, 8, 8, 6)), jnp.float32)
    monkeypatch.setattr(denoiser, "apply", lambda *_, **__: output)
    denoise = denoiser.make_denoiser(Stage(config, {}), Conditioning(TEXT))
    logsnr = [jnp.full(2, process.logsnr_at(jnp.float32(t), config.diffusion)) for t in times]
    found, _ = samplers.make_sampler(settings).step(denoise, z, *logsnr, noise, ())
    abar = [1.0 / (1.0 + np.exp(-float(level[0]))) for level in logsnr]
    expected = their_step(prediction, output, z, noise, *abar)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(found) / scale, expected / scale, atol=2e-5)
