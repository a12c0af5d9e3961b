"""Image-to-image and inpainting with any trained stage.

Image-to-image starts from the given image noised to time `strength` (SDEdit, arXiv:2108.01073).
Inpainting samples under a mask: after every step the pixels outside the mask are replaced by the
given image noised to that level, and some steps are repeated after new noise, which matches the
sampled part to the kept part (RePaint, arXiv:2201.09865, Alg. 1). Every stage of a cascade edits
the image at its own size.

Repeated steps are entries of the list of timesteps (`timesteps`), and `repaint_sampler` wraps any
sampler, so the denoising loop has no special case for editing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from imagen_jax.diffusion.guidance import Denoise
from imagen_jax.diffusion.process import alpha_sigma, expand, q_sample
from imagen_jax.diffusion.samplers import Sampler, fold_in_keys, normal
from imagen_jax.io.images import resize_host, to_float

# Streams of a step's noise beside the sampler's own: folded into its keys.
RENOISE_STREAM, KNOWN_STREAM = 1, 2


class EditError(ValueError):
    """An edit is invalid; the message gives field, got, expected and fix."""


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """N images to start from, beside their prompts.

    Attributes:
      images: uint8 [N, H, W, 3], square, of the size of the last stage.
      strength: time that denoising starts from, above 0 (nothing changes) to 1 (from noise).
      masks: True where to sample, [N, H, W]; the other pixels are kept. None: sample all.
      resamplings: how often each group of `jump` steps is run; 1: once.
      jump: steps in a group.
    """

    images: UInt8[np.ndarray, "n side side 3"]
    strength: float = 1.0
    masks: Bool[np.ndarray, "n side side"] | None = None
    resamplings: int = 1
    jump: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.strength <= 1.0:
            raise EditError(f"strength={self.strength} must be above 0 and at most 1; try 0.6")
        for name in ("resamplings", "jump"):
            if getattr(self, name) < 1:
                raise EditError(f"{name}={getattr(self, name)} must be at least 1")
        if self.masks is None and self.resamplings > 1:
            raise EditError(f"resamplings={self.resamplings} needs masks; leave it at 1")

    def rows(self, rows: Sequence[int] | np.ndarray) -> Edit:
        """The edit of some of the images."""
        masks = None if self.masks is None else self.masks[rows]
        return dataclasses.replace(self, images=self.images[rows], masks=masks)


def resize_edit(
    edit: Edit, size: int
) -> tuple[Float[np.ndarray, "n size size 3"], Bool[np.ndarray, "n size size 1"] | None]:
    """Images in [-1, 1] and masks at the size of a stage.

    A pixel of the smaller mask is True where any of its source pixels is, so no masked source
    pixel contributes to a kept one.
    """
    resized = np.stack([resize_host(image, size) for image in edit.images])
    if edit.masks is None:
        return to_float(resized), None
    covered = [
        resize_host(np.repeat(m[..., None] * np.uint8(255), 3, -1), size) for m in edit.masks
    ]
    return to_float(resized), np.stack(covered)[..., :1] > 0


def composite(edit: Edit, sampled: UInt8[np.ndarray, "n h w 3"]) -> UInt8[np.ndarray, "n h w 3"]:
    """The last stage's images with the given pixels, bit for bit, outside the masks."""
    if edit.masks is None:
        return sampled
    return np.where(edit.masks[..., None], sampled, edit.images)


def timesteps(
    steps: int,
    strength: float = 1.0,
    resamplings: int = 1,
    jump: int = 1,
    listed: Sequence[float] = (),
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Times that each step starts from and ends at, from `strength` to 0.

    Args:
      steps: number of steps from time 1 to 0; from `strength` on it is that share of them.
      strength: time to start from, above 0, at most 1.
      resamplings: how often each group of `jump` steps is run. The last group is run once.
      jump: steps in a group.
      listed: times of `timesteps.step_times` in place of `steps`; the last ones are used, in the
        share `strength`.

    Returns:
      n times each. Where a step starts from a later time than the step before it ended at, noise
      has to be added first.
    """
    steps = len(listed) - 1 if listed else steps
    count = max(math.ceil(steps * strength - 1e-6), 1)
    times = np.linspace(strength, 0.0, count + 1, dtype=np.float32)
    if listed:
        times = np.asarray(listed[-count - 1 :], np.float32)
    order: list[int] = []
    for first in range(0, count, jump):
        group = range(first, min(first + jump, count))
        order += [*group] * (resamplings if group[-1] < count - 1 else 1)
    index = np.array(order)
    return times[index], times[index + 1]


def renoise(
    z: Float[Array, "b *d"],
    logsnr_s: Float[Array, " b"],
    logsnr_t: Float[Array, " b"],
    eps: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """Samples z_t from q(z_t | z_s), t noisier than s: the forward process between two levels.

    mean = (alpha_t / alpha_s) z_s; variance = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2.
    """
    alpha_s, sigma_s = (expand(v, z) for v in alpha_sigma(logsnr_s))
    alpha_t, sigma_t = (expand(v, z) for v in alpha_sigma(logsnr_t))
    ratio = alpha_t / alpha_s
    variance = jnp.maximum(sigma_t**2 - ratio**2 * sigma_s**2, 0.0)
    return ratio * z + jnp.sqrt(variance) * eps


def repaint_sampler(
    sampler: Sampler, known: Float[Array, "b h w c"], mask: Bool[Array, "b h w 1"]
) -> Sampler:
    """Wraps a sampler: samples under the mask, keeps `known` elsewhere (RePaint, Alg. 1).

    After each step z = mask * z + (1 - mask) * q_sample(known) at the level reached. Where a step
    starts from a noisier level than the step before it reached, z is noised to that level first and
    the wrapped sampler's state is reset.
    """

    def init(z):
        # -inf: the first step adds no noise before it.
        return sampler.init(z), jnp.full(z.shape[:1], -jnp.inf)

    def step(denoise: Denoise, z, logsnr_t, logsnr_s, keys, state):
        inner, reached = state

        def noise(stream: int) -> Array:
            return normal(fold_in_keys(keys, stream), z.shape[1:])

        back = logsnr_t < reached
        choose = jax.vmap(jnp.where)
        z = choose(back, renoise(z, reached, logsnr_t, noise(RENOISE_STREAM)), z)
        inner = jax.tree.map(functools.partial(choose, back), sampler.init(z), inner)
        z, inner = sampler.step(denoise, z, logsnr_t, logsnr_s, keys, inner)
        z = jnp.where(mask, z, q_sample(known, logsnr_s, noise(KNOWN_STREAM)))
        return z, (inner, logsnr_s)

    return Sampler(init, step)
