"""Thresholding: what keeps a guided x0 within [-1, 1] (Imagen, Sec. 2.3).

Guidance carries x0 beyond the range of the training pictures, and the sampler feeds it back step
after step. A new kind is one function and one row of THRESHOLDS.
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

    s is the percentile of |x0| over each picture, at least 1 and at most `cap`. Differs from paper:
    the code printed in Fig. A.31 lacks the keepdims and uses the Python `max`; this is what its
    text says. The cap is not the paper's: 1 makes this static clipping, large values leave it as it
    is, those between let strong guidance saturate a little instead of paling everything else.

    Args:
      x0: predicted pictures.
      percentile: p in [0, 100]; the paper's is 99.5.
      cap: largest s; 0: none.
    """
    s = percentile_of(jnp.abs(x0), percentile).reshape(-1, 1, 1, 1)
    s = jnp.clip(s, 1.0, cap or jnp.inf)
    return jnp.clip(x0, -s, s) / s


def percentile_of(values: Float[Array, "b h w c"], percentile: float) -> Float[Array, " b"]:
    """Percentile of each picture's values, as `jnp.percentile`, without sorting them.

    The bits of floats that are not negative, read as integers, are in the same order. So the value
    with k smaller ones is found bit by bit, each by counting: 31 passes over the values, where
    sorting them took a fifth of a small stage's time.

    Args:
      values: float32, none negative.
      percentile: p in [0, 100]; between two values it is linear.
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
