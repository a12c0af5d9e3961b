"""A stage's denoiser for sampling: the network with guidance and thresholding.

Guidance needs two estimates of x0 at the same z: `make_denoiser` evaluates both as one batch of 2B
(Imagen, Sec. 2.2), or with a second network (autoguidance).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.diffusion import guidance, process, samplers, thresholding, timesteps
from imagen_jax.stages.classifier import TrainedClassifier
from imagen_jax.stages.conditioning import Conditioning, Text, null_text
from imagen_jax.stages.network import apply
from imagen_jax.stages.stage import Stage


class ClassGuidance(NamedTuple):
    """Classifier guidance of B images.

    Attributes:
      classifier: trained on noisy images of the stage's size.
      labels: the class of each attribute; -1: not given.
      scale: of the classifier's gradient.
    """

    classifier: TrainedClassifier
    labels: Int[Array, "b k"]
    scale: Float[Array, " b"]


def predict_x0(
    stage: Stage,
    z: Float[Array, "b size size 3"],
    logsnr: Float[Array, " b"],
    conditioning: Conditioning,
    texts: Sequence[Text],
) -> list[Float[Array, "b size size 3"]]:
    """The x0 of `predict`."""
    return [x0 for x0, _ in predict(stage, z, logsnr, conditioning, texts)]


def predict(
    stage: Stage,
    z: Float[Array, "b size size 3"],
    logsnr: Float[Array, " b"],
    conditioning: Conditioning,
    texts: Sequence[Text],
) -> list[tuple[Array, Array | None]]:
    """x0, and gamma of a learned variance, of one z for K texts, by one evaluation of the network.

    Args:
      stage: parameters and configuration.
      z: noisy images.
      logsnr: their noise level, nats.
      conditioning: of the B images; its text is not used.
      texts: K times embeddings and mask of B prompts; the network's batch is K B.

    Returns:
      K pairs of arrays [B, size, size, 3], see `guidance.Estimate`; gamma is None where the network
      has no channels for it.
    """
    params, config = stage.params, stage.config

    # The K copies of an image are neighbours in the batch, so they stay on its device.
    def repeat(v: Array) -> Array:
        return jnp.repeat(v, len(texts), axis=0)

    text = Text(
        *(
            jnp.stack(part, axis=1).reshape(-1, *part[0].shape[1:])
            for part in zip(*texts, strict=True)
        )
    )
    z, logsnr = repeat(z), repeat(logsnr)
    if conditioning.lowres is not None:
        conditioning = conditioning._replace(lowres=repeat(conditioning.lowres))
    if conditioning.lowres_logsnr is not None:
        conditioning = conditioning._replace(lowres_logsnr=repeat(conditioning.lowres_logsnr))
    output = apply(params, config, z, logsnr, conditioning._replace(text=text))

    def split(v: Array) -> list[Array]:
        v = v.reshape(-1, len(texts), *v.shape[1:])
        return [v[:, index] for index in range(len(texts))]

    x0 = split(process.to_x0(config.diffusion.prediction, output[..., :3], z=z, logsnr=logsnr))
    if output.shape[-1] < 6:
        return [(each, None) for each in x0]
    # The network's -1..1 is gamma's 0..1 (Nichol & Dhariwal 2021; DeepFloyd IF).
    return list(zip(x0, split(0.5 * (output[..., 3:6] + 1.0)), strict=True))


def make_denoiser(
    stage: Stage,
    conditioning: Conditioning,
    *,
    negative: Text | None = None,
    guide: Stage | None = None,
    guidance_weight: Float[Array, " b"] | None = None,
    classes: ClassGuidance | None = None,
) -> Callable[[Array, Array], Any]:
    """`denoise(z, logsnr) -> x0` of a stage with its guidance and thresholding.

    Guidance extrapolates from another estimate of x0 to the conditional one. The other estimate is
    this network's without text, or for the negative prompt; with `guide` (autoguidance) it is that
    network's, for the same prompt or the negative one. For a sampler with learned variance it
    returns a `guidance.Estimate`, whose gamma is that of the prompt.

    Args:
      stage: parameters, usually the EMA, and configuration; `config.sampling` gives guidance and
        thresholding.
      conditioning: of the B images.
      negative: embeddings and mask of the negative prompts, shaped as those of the prompts.
      guide: a weaker checkpoint of a stage with the same image sizes.
      guidance_weight: per image, in place of `sampling.guidance_weight`; ignored where that is 1
        (guidance off).
      classes: classifier guidance, added to the guided estimate; None: off.

    Raises:
      ConfigError: the guide has other image sizes or another text width.
    """
    config, text = stage.config, conditioning.text
    settings = config.sampling
    if guide is not None:
        check_guide(config, guide.config)

    gammas: list[Array | None] = []  # Of the last evaluation.

    def conditional(z: Array, logsnr: Array) -> Array:
        own, z = _in_step(stage, z)
        ((x0, gamma),) = predict(own, z, logsnr, conditioning, [text])
        gammas[:] = [gamma]
        return x0

    def pair(z: Array, logsnr: Array) -> tuple[Array, Array]:
        if guide is not None:
            weaker, _ = _in_step(guide, z)
            other = predict_x0(weaker, z, logsnr, conditioning, [negative or text])[0]
            return conditional(z, logsnr), other
        texts = [text, negative or null_text(text)]
        own, z = _in_step(stage, z)
        (x0, gamma), (other, _) = predict(own, z, logsnr, conditioning, texts)
        gammas[:] = [gamma]
        return x0, other

    guided = conditional
    if settings.guidance_weight != 1.0:
        levels = timesteps.step_levels(settings, config.diffusion)
        guided = guidance.guide(pair, settings, levels, guidance_weight)
    if classes is not None:
        trained, labels, scale = classes
        guided = guidance.classifier(
            guided, lambda z, logsnr: trained.log_prob(z, logsnr, labels), scale
        )
    denoise = thresholding.threshold(guided, settings)
    if not samplers.takes_estimate(settings):
        return denoise

    def denoise_with_variance(z: Array, logsnr: Array) -> guidance.Estimate:
        x0 = denoise(z, logsnr)
        (gamma,) = gammas
        assert gamma is not None  # Config checks the number of channels.
        return guidance.Estimate(x0, gamma)

    return denoise_with_variance


def _in_step(stage: Stage, z: Array) -> tuple[Stage, Array]:
    """The same values; sharded parameters depend on z.

    The compiler moves what no step changes out of the loop: it would gather all parameters before
    the first step and keep them.
    """
    if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1:
        return stage, z
    params, z = jax.lax.optimization_barrier((stage.params, z))
    return stage._replace(params=params), z


def check_guide(config: Config, guide: Config) -> None:
    """Raises ConfigError unless the stage `guide` can guide the stage `config` (autoguidance)."""
    for field in ("data.image_size", "data.lowres_size", "model.text_dim"):
        section, name = field.split(".")
        got, expected = (getattr(getattr(c, section), name) for c in (guide, config))
        if got != expected:
            raise ConfigError(
                f"guide: config.{field}={got} must be {expected}, as in the stage "
                f"{config.name!r} that it guides; try an earlier checkpoint of that stage"
            )
