"""Editing the user's own pictures: where a stage starts from, and what it must leave alone.

Image-to-image starts from the picture noised to time `strength` instead of from noise (SDEdit,
arXiv:2108.01073). Inpainting draws under a mask: after every step the rest is replaced by the
picture noised to that level, and some steps are taken back by new noise and repeated, so that what
is drawn comes to fit what is kept (RePaint, arXiv:2201.09865, Alg. 1). Both need nothing of a
trained stage; every stage of a cascade edits the picture at its own size.

A taken-back step is one of a list of steps like any other (`walk`), and keeping the known part is
a sampler made of another one (`repaint_sampler`): the loop and `drawing` know of neither.
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
from imagen_jax.diffusion.samplers import Sampler, fold, normal
from imagen_jax.io import images

# Randomness of a step besides the sampler's own: folded into its keys.
RENOISE_STREAM, KNOWN_STREAM = 1, 2


class EditError(ValueError):
    """An edit cannot be; the message gives field, got, expected and fix."""


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """What N pictures are made from, beside their prompts.

    Attributes:
      pictures: uint8 [N, H, W, 3], square, of the size of the last stage.
      strength: time that denoising starts from, above 0 (nothing is changed) to 1 (from noise).
      masks: True where to draw, [N, H, W]; the other pixels come out as they are. None: all.
      resamplings: how often each stretch of `jump` steps is taken; 1: once, without going back.
      jump: steps that are taken back at a time.
    """

    pictures: UInt8[np.ndarray, "n side side 3"]
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
        """The edit of some of the pictures."""
        masks = None if self.masks is None else self.masks[rows]
        return dataclasses.replace(self, pictures=self.pictures[rows], masks=masks)


def sized(
    edit: Edit, size: int
) -> tuple[Float[np.ndarray, "n size size 3"], Bool[np.ndarray, "n size size 1"] | None]:
    """Pictures in [-1, 1] and masks at the size of a stage.

    A pixel of the smaller mask is drawn where any of the pixels that it stands for is, so that
    nothing of what is to be replaced is seen.
    """
    pictures = np.stack([images.resize_host(picture, size) for picture in edit.pictures])
    if edit.masks is None:
        return images.to_float(pictures), None
    covered = [
        images.resize_host(np.repeat(m[..., None] * np.uint8(255), 3, -1), size) for m in edit.masks
    ]
    return images.to_float(pictures), np.stack(covered)[..., :1] > 0


def keep(edit: Edit, drawn: UInt8[np.ndarray, "n h w 3"]) -> UInt8[np.ndarray, "n h w 3"]:
    """The last stage's pictures with the given pixels, bit for bit, outside of the masks."""
    if edit.masks is None:
        return drawn
    return np.where(edit.masks[..., None], drawn, edit.pictures)


def walk(
    steps: int, strength: float = 1.0, resamplings: int = 1, jump: int = 1
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Times that each step leads from and to, from `strength` to 0.

    Args:
      steps: of a walk from time 1; the part below `strength` has that share of them.
      strength: time to start from, above 0, at most 1.
      resamplings: how often each stretch of `jump` steps is taken. The last stretch is taken once,
        as there is nothing left to fit.
      jump: steps of a stretch.

    Returns:
      n times each. Where a step leads from a time above that which the step before led to, noise
      is to be added first.
    """
    count = max(math.ceil(steps * strength - 1e-6), 1)
    times = np.linspace(strength, 0.0, count + 1, dtype=np.float32)
    order: list[int] = []
    for first in range(0, count, jump):
        stretch = range(first, min(first + jump, count))
        order += [*stretch] * (resamplings if stretch[-1] < count - 1 else 1)
    index = np.array(order)
    return times[index], times[index + 1]


def renoise(
    z: Float[Array, "b *d"],
    logsnr_s: Float[Array, " b"],
    logsnr_t: Float[Array, " b"],
    eps: Float[Array, "b *d"],
) -> Float[Array, "b *d"]:
    """Draws z_t from q(z_t | z_s), t noisier than s: the forward process between two levels.

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
    """A sampler that draws under the mask and elsewhere keeps `known` (RePaint, Alg. 1).

    After each step z = mask * z + (1 - mask) * q_sample(known) at the level reached. Where a step
    starts from a noisier level than the one before reached, z is noised up to it first, and the
    sampler starts anew, without the history of another path.
    """

    def init(z):
        # Every level is cleaner than that: the first step does not go back.
        return sampler.init(z), jnp.full(z.shape[:1], -jnp.inf)

    def step(denoise: Denoise, z, logsnr_t, logsnr_s, keys, state):
        inner, reached = state

        def draw(stream: int) -> Array:
            return normal(fold(keys, stream), z.shape[1:])

        back = logsnr_t < reached
        choose = jax.vmap(jnp.where)
        z = choose(back, renoise(z, reached, logsnr_t, draw(RENOISE_STREAM)), z)
        inner = jax.tree.map(functools.partial(choose, back), sampler.init(z), inner)
        z, inner = sampler.step(denoise, z, logsnr_t, logsnr_s, keys, inner)
        z = jnp.where(mask, z, q_sample(known, logsnr_s, draw(KNOWN_STREAM)))
        return z, (inner, logsnr_s)

    return Sampler(init, step)
