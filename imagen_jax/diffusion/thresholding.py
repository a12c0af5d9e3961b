"""Thresholding: keeps a guided x0 within [-1, 1] (Imagen, Sec. 2.3).

Guidance moves x0 beyond the range of the training images, and every step of the sampler adds to
it. A new kind is one function and one row of THRESHOLDS.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.diffusion.guidance import Denoise


def static(x0: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Clips x0 to [-1, 1] (Imagen, Sec. 2.3)."""
    return jnp.clip(x0, -1.0, 1.0)


def dynamic(
    x0: Float[Array, "b h w c"], percentile: float, cap: float = 0.0
) -> Float[Array, "b h w c"]:
    """Dynamic thresholding (Imagen, Sec. 2.3, Fig. A.31): clips to [-s, s] and divides by s.

    s is the percentile of |x0| over each image, at least 1 and at most `cap`. Differs from paper:
    the code of Fig. A.31 lacks keepdims and uses the Python `max`; this follows its text. The cap
    is not in the paper: 1 is static thresholding, a large cap has no effect, a cap between lets
    strong guidance clip some pixels instead of reducing the contrast of the whole image.

    Args:
      x0: predicted images.
      percentile: p in [0, 100]; the paper's is 99.5.
      cap: largest s; 0: none.
    """
    s = percentile_of(jnp.abs(x0), percentile).reshape(-1, 1, 1, 1)
    s = jnp.clip(s, 1.0, cap or jnp.inf)
    return jnp.clip(x0, -s, s) / s


def percentile_of(values: Float[Array, "b h w c"], percentile: float) -> Float[Array, " b"]:
    """Percentile of each image's values, equal to `jnp.percentile`, without sorting.

    The bits of non-negative floats, read as integers, have the order of the floats. The value of
    rank k is found bit by bit, from the highest: 31 counting passes over the values. Sorting took a
    fifth of a small stage's sampling time.

    Args:
      values: float32, none negative.
      percentile: p in [0, 100]; linear between two values.
    """
    bits = jax.lax.bitcast_convert_type(values.reshape(values.shape[0], -1), jnp.int32)
    position = percentile / 100.0 * (bits.shape[1] - 1)
    rank = int(position)

    def add_bit(index, found):
        candidate = found | (1 << (30 - index))
        smaller = jnp.sum(bits < candidate[:, None], axis=1)
        return jnp.where(smaller <= rank, candidate, found)

    low = jax.lax.fori_loop(0, 31, add_bit, jnp.zeros(bits.shape[0], jnp.int32))
    larger = jnp.where(bits > low[:, None], bits, jnp.iinfo(jnp.int32).max).min(axis=1)
    repeated = jnp.sum(bits <= low[:, None], axis=1) > rank + 1
    high = jnp.where(repeated | (rank + 1 == bits.shape[1]), low, larger)
    low, high = (jax.lax.bitcast_convert_type(v, jnp.float32) for v in (low, high))
    return low + (position - rank) * (high - low)


THRESHOLDS: dict[str, Callable[[Array, SamplingConfig], Array]] = {
    "none": lambda x0, settings: x0,
    "static": lambda x0, settings: static(x0),
    "dynamic": lambda x0, settings: dynamic(
        x0, settings.threshold_percentile, settings.threshold_cap
    ),
}


def threshold(denoise: Denoise, settings: SamplingConfig) -> Denoise:
    """Wraps `denoise` so that its x0 passes through row `settings.thresholding`."""

    def thresholded(z: Float[Array, "b h w c"], logsnr: Float[Array, " b"]) -> Array:
        return THRESHOLDS[settings.thresholding](denoise(z, logsnr), settings)

    return thresholded
