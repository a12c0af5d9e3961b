"""A request whose negative prompt or guide cannot change an image is refused, not ignored."""

import dataclasses

import numpy as np
import pytest

from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.inference.request import RequestError, SampleRequest, check_guided
from imagen_jax.inference.stage_sampler import Noise

OFF = SamplingConfig(guidance_weight=1.0)
ON = SamplingConfig(guidance_weight=3.0)


def chain(base_config, sr_config, *settings):
    return [
        dataclasses.replace(config, sampling=sampling)
        for config, sampling in zip((base_config, sr_config), settings, strict=False)
    ]


@pytest.mark.parametrize(
    "settings",
    [
        (OFF,),
        (OFF, OFF),
        (SamplingConfig(guidance_weight=4.0, guidance_schedule=((0.0, 0.0),)),),
        (SamplingConfig(guidance_weight=4.0, guidance_schedule=((-1.0, 0.0), (2.0, 0.0))), OFF),
        (SamplingConfig(guidance_weight=1.0, guidance_interval=(-2.0, 2.0)),),
    ],
)
def test_a_negative_prompt_without_guidance(base_config, sr_config, settings):
    configs = chain(base_config, sr_config, *settings)
    request = SampleRequest(prompts=["a", "b"], negative_prompts=["", "blurred"])
    with pytest.raises(RequestError, match="negative prompt has no effect .*base"):
        request.check(configs)
    SampleRequest(prompts=["a", "b"], negative_prompts=["", ""]).check(configs)
    SampleRequest(prompts=["a", "b"]).check(configs)


@pytest.mark.parametrize(
    ("sampler", "churn", "counts"),
    [
        ("ddpm", 0.0, {3, 4}),
        ("dpmpp_2m_sde", 0.0, {3, 4}),
        ("heun", 0.1, {4}),
        ("heun", 0.0, set()),
        ("ddim", 0.1, set()),
        ("dpmpp_2m", 0.0, set()),
    ],
)
def test_given_noise_of_the_steps_of_a_sampler(base_config, sampler, churn, counts):
    settings = dataclasses.replace(base_config.sampling, sampler=sampler, steps=4, churn=churn)
    (config,) = chain(base_config, base_config, settings)
    side = base_config.data.image_size
    for count in (3, 4):
        noise = {"base": Noise(steps=np.zeros((1, count, side, side, 3)))}
        request = SampleRequest(prompts=["a"], noise=noise)
        if count in counts:
            request.check([config])
        else:
            with pytest.raises(RequestError, match=r"noise\['base'\]\.steps"):
                request.check([config])


@pytest.mark.parametrize("settings", [(ON,), (ON, OFF), (OFF, ON)])
def test_a_negative_prompt_with_guidance(base_config, sr_config, settings):
    configs = chain(base_config, sr_config, *settings)
    SampleRequest(prompts=["a"], negative_prompts=["blurred"]).check(configs)


def test_a_guide_of_a_stage_without_guidance(base_config, sr_config):
    configs = chain(base_config, sr_config, ON, OFF)
    check_guided(configs, guides=[base_config])
    with pytest.raises(RequestError, match=r"guide 'sr' has no effect .*base 3, sr 1"):
        check_guided(configs, guides=[sr_config])
