"""Targets of distillation against the samplers and the guidance that they stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config.distill import DistillConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.diffusion import process, samplers
from imagen_jax.stages import distillation, loss
from imagen_jax.stages.conditioning import null_text
from imagen_jax.stages.denoiser import predict_x0
from imagen_jax.stages.stage import Stage

PLAIN = SamplingConfig(guidance_weight=1.0, thresholding="none")


def student(config, steps=None, **sampling):
    settings = DistillConfig("teacher", steps, dataclasses.replace(PLAIN, **sampling))
    return dataclasses.replace(config, distill=settings)


@pytest.fixture(params=["base_config", "sr_config"])
def config(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def examples(config, make_batch, random_params):
    batch = {name: jnp.asarray(value) for name, value in make_batch(config).items()}
    batch |= loss.sample_randomness(jax.random.key(3), 4, config)
    return {
        **batch,
        "drop": jnp.ones(4, bool),
        "teacher": jax.tree.map(jnp.asarray, random_params(config, 1)),
    }


def test_guidance_is_learned_in_one_evaluation(config, examples):
    found = distillation.add_targets(examples, student(config, guidance_weight=3.0))
    assert "teacher" not in found and not found["drop"].any()
    np.testing.assert_array_equal(found["time"], examples["time"])
    z, logsnr, conditioning = loss.network_inputs(found, config)
    texts = [conditioning.text, null_text(conditioning.text)]
    stage = Stage(config, examples["teacher"])
    with_text, without = predict_x0(stage, z, logsnr, conditioning, texts)
    expected = 3.0 * with_text - 2.0 * without
    np.testing.assert_allclose(found["x0_target"], expected, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_step_learns_two_of_the_teacher(config, examples, steps):
    settings = student(config, steps)
    found = distillation.add_targets(examples, settings)
    ends = np.asarray(found["time"], np.float64) * steps
    np.testing.assert_allclose(ends, ends.round(), atol=1e-5)
    assert (ends >= examples["time"] * steps - 1e-5).all() and (ends.round() <= steps).all()
    z, logsnr, conditioning = loss.network_inputs(found, config)

    def denoise(z, logsnr):
        stage = Stage(config, examples["teacher"])
        return predict_x0(stage, z, logsnr, conditioning, [conditioning.text])[0]

    step = samplers.ddim().step
    middle, end = (
        process.logsnr_at(jnp.maximum(found["time"] - share / steps, 0.0), config.diffusion)
        for share in (0.5, 1.0)
    )
    halfway, _ = step(denoise, z, logsnr, middle, None, ())
    two, _ = step(denoise, halfway, middle, end, None, ())
    one, _ = step(lambda z, logsnr: found["x0_target"], z, logsnr, end, None, ())
    np.testing.assert_allclose(one, two, atol=2e-5)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(config, examples):
    """Without guidance the target is the teacher's own estimate; with it, it is not."""
    losses = []
    for weight in (1.0, 3.0):
        settings = student(config, guidance_weight=weight)
        found = distillation.add_targets(examples, settings)
        value, report = loss.loss_given_randomness(examples["teacher"], found, None, settings)
        losses.append(float(value))
        assert float(value) == pytest.approx(float(report["loss"]))
    assert losses[0] < 1e-8 < 1e-4 < losses[1]


@pytest.mark.parametrize("prediction", ["x0", "v", "eps"])
def test_the_network_learns_the_target_in_its_own_prediction(
    base_config, make_batch, monkeypatch, prediction
):
    """An output of exactly x0_target, said as eps or v, has no loss."""
    diffusion = dataclasses.replace(
        base_config.diffusion, prediction=prediction, loss_weight=prediction
    )
    config = dataclasses.replace(base_config, diffusion=diffusion)
    batch = {name: jnp.asarray(value) for name, value in make_batch(config).items()}
    batch |= loss.sample_randomness(jax.random.key(3), 4, config)
    batch |= {"x0_target": 0.5 * batch["image"], "time": jnp.array([0.2, 0.4, 0.6, 0.8])}
    z, logsnr, _ = loss.network_inputs(batch, config)
    alpha, sigma = (process.expand(v, z) for v in process.alpha_sigma(logsnr))
    eps = (z - alpha * batch["x0_target"]) / sigma
    outputs = {"x0": batch["x0_target"], "eps": eps, "v": alpha * eps - sigma * batch["x0_target"]}
    monkeypatch.setattr(loss, "apply", lambda *args, **options: outputs[prediction])
    value, report = loss.loss_given_randomness({}, batch, None, config)
    assert float(value) < 1e-8 and float(report["x0_mse"]) < 1e-8


@pytest.mark.parametrize("steps", [None, 2])
def test_a_teacher_that_samples_with_learned_variance(
    base_config, make_batch, random_params, steps
):
    """The target is that of the same teacher with the fixed variance: x0 does not depend on it."""
    config = dataclasses.replace(
        base_config, model=dataclasses.replace(base_config.model, out_channels=6)
    )
    given = {name: jnp.asarray(value) for name, value in make_batch(config).items()}
    given |= loss.sample_randomness(jax.random.key(3), 4, config)
    given["teacher"] = jax.tree.map(jnp.asarray, random_params(config, 1))
    fixed, learned = (
        distillation.add_targets(
            given, student(config, steps, sampler="ddpm", variance=variance, guidance_weight=3.0)
        )["x0_target"]
        for variance in ("fixed", "learned")
    )
    np.testing.assert_array_equal(fixed, learned)


def test_the_bound_of_a_student_is_that_of_the_images(base_config, make_batch, monkeypatch):
    """A variance learned from the teacher's estimate would be that of no image."""
    config = dataclasses.replace(
        base_config,
        model=dataclasses.replace(base_config.model, out_channels=6),
        diffusion=dataclasses.replace(base_config.diffusion, vlb_weight=0.5),
    )
    batch = {name: jnp.asarray(value) for name, value in make_batch(config).items()}
    batch |= loss.sample_randomness(jax.random.key(3), 4, config)
    output = jax.random.normal(jax.random.key(4), (4, 8, 8, 6))
    monkeypatch.setattr(loss, "apply", lambda *args, **options: output)
    _, plain = loss.loss_given_randomness({}, batch, None, config)
    target = {**batch, "x0_target": 0.5 * batch["image"]}
    _, distilled = loss.loss_given_randomness({}, target, None, config)
    assert float(distilled["vlb"]) == float(plain["vlb"])
    assert float(distilled["x0_mse"]) != float(plain["x0_mse"])


@pytest.mark.parametrize("steps", [0, -2])
def test_steps_below_one_are_refused(steps):
    with pytest.raises(ConfigError, match=r"config\.distill\.steps=-?\d must be at least 1"):
        DistillConfig("teacher", steps)


def test_steps_need_a_teacher():
    with pytest.raises(ConfigError, match=r"distill\.steps=4 needs config\.distill\.teacher"):
        DistillConfig(steps=4)
