"""Samplers beside diffusers' schedulers, step for step. Needs torch and diffusers, `peers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion import process, samplers
from tests.reference import diffusion as reference

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

STEPS, COUNT, SHAPE = 20, 3, (4, 4, 3)
SHARES = np.array([0.6, 0.4])
MEANS = np.random.default_rng(0).uniform(-0.9, 0.9, (2, 48))
DEVIATION = 0.2
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def exact_x0(z, logsnr):
    """The exact denoiser of a mixture, as both sides' model."""
    flat = np.asarray(z, np.float64).reshape(COUNT, -1)
    x0 = reference.mixture_mean(flat, logsnr, SHARES, MEANS, DEVIATION)
    return x0.reshape(z.shape).astype(np.float32)


def theirs(scheduler, logsnrs, z, prediction):
    """z after each of the scheduler's steps, [STEPS, B, H, W, C]."""
    visited = []
    z = torch.from_numpy(z)
    for t, logsnr in zip(scheduler.timesteps, logsnrs, strict=True):
        x0 = exact_x0(z.numpy(), logsnr)
        alpha, sigma = reference.scales(logsnr)
        answer = x0 if prediction == "sample" else (z.numpy() - alpha * x0) / sigma
        answer = torch.from_numpy(np.asarray(answer, np.float32))
        z = scheduler.step(answer, t, z, return_dict=False)[0]
        visited.append(z.numpy())
    return np.stack(visited)


def ours(sampler, logsnrs, z, prediction):
    """The same by one of our samplers; the last step ends in x0 itself, as the loop's does."""
    visited = []
    z = jnp.asarray(z)
    state = sampler.init(z)
    for index, logsnr in enumerate(logsnrs):

        def denoise(z, logsnr, exact=logsnr):
            x0 = exact_x0(z, exact)
            alpha, sigma = reference.scales(exact)
            answer = x0 if prediction == "sample" else (z - alpha * x0) / sigma
            name = {"sample": "x0", "epsilon": "eps"}[prediction]
            answer = jnp.asarray(answer, jnp.float32)
            return process.to_x0(name, answer, z=z, logsnr=logsnr)

        level = jnp.full(COUNT, logsnr, jnp.float32)
        if index == STEPS - 1:
            z = denoise(z, level)
        else:
            end = jnp.full(COUNT, logsnrs[index + 1], jnp.float32)
            z, state = sampler.step(denoise, z, level, end, keys(index), state)
        visited.append(np.asarray(z))
    return np.stack(visited)


def keys(step):
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    return fold(jax.random.split(jax.random.key(5), COUNT), step)


@pytest.fixture
def same_noise(monkeypatch):
    """diffusers draws, step by step, the noise that our sampler draws."""
    step = iter(range(STEPS))
    draw = lambda *args, **options: torch.from_numpy(  # noqa: E731
        np.array(samplers.normal(keys(next(step)), SHAPE))
    )
    for name in ("scheduling_ddpm", "scheduling_dpmsolver_multistep"):
        monkeypatch.setattr(getattr(diffusers.schedulers, name), "randn_tensor", draw)


@pytest.mark.parametrize("prediction", ["sample", "epsilon"])
@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize(
    ("name", "options"),
    [("ddpm", {"gamma": 0.0}), ("ddpm", {"gamma": 1.0}), ("ddim", {}), ("dpmpp_2m", {}),
     ("dpmpp_2m_sde", {})],
)  # fmt: skip
def test_every_step_agrees(name, options, schedule, prediction, same_noise):
    given = {"beta_schedule": SCHEDULES[schedule], "prediction_type": prediction}
    if name == "ddpm":
        variance = "fixed_large" if options["gamma"] else "fixed_small"
        scheduler = diffusers.DDPMScheduler(variance_type=variance, clip_sample=False, **given)
    elif name == "ddim":
        scheduler = diffusers.DDIMScheduler(clip_sample=False, **given)
    else:
        scheduler = diffusers.DPMSolverMultistepScheduler(
            # The clip, which its documentation asks for with cosine, leaves alpha a size at which
            # float32 can divide by it.
            algorithm_type="sde-dpmsolver++" if name == "dpmpp_2m_sde" else "dpmsolver++",
            solver_order=2,
            lambda_min_clipped=-5.1,
            **given,
        )
    scheduler.set_timesteps(STEPS)
    signal = scheduler.alphas_cumprod.numpy().astype(np.float64)[scheduler.timesteps.numpy()]
    logsnrs = np.log(signal) - np.log1p(-signal)
    z = np.random.default_rng(1).normal(size=(COUNT, *SHAPE)).astype(np.float32)
    expected = theirs(scheduler, logsnrs, z, prediction)
    got = ours(samplers.SAMPLERS[name](**options), logsnrs, z, prediction)
    differences = np.abs(got - expected).max(axis=(1, 2, 3, 4))
    print(f"{name} {options} {schedule} {prediction}: {differences.max():.1e}")
    assert differences.max() <= 1e-4
    # ... and no step does so by standing still.
    assert np.abs(np.diff(expected, axis=0)).max(axis=(1, 2, 3, 4)).min() > 4e-4
