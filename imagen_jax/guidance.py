"""Guidance and thresholding: functions that wrap `denoise(z, logsnr) -> x0` into another one.

They compose: `threshold(guide(denoise_pair, weight), "dynamic")` is itself a `denoise`, which is
all a sampler sees (Imagen, Sec. 2.2 and 2.3).
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

Denoise = Callable[[Float[Array, "b h w c"], Float[Array, " b"]], Float[Array, "b h w c"]]
DenoisePair = Callable[
    [Float[Array, "b h w c"], Float[Array, " b"]],
    tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]],
]


def classifier_free(denoise_pair: DenoisePair, weight: float) -> Denoise:
    """Classifier-free guidance (arXiv:2207.12598): x0 = w x0(z, text) + (1 - w) x0(z).

    The paper writes it for eps; x0 is an affine function of eps at fixed z, and the weights sum to
    one, so both forms are the same. w = 1 is off.

    Args:
      denoise_pair: gives (conditional, unconditional) x0 from one batched call.
      weight: w, at least 0.
    """

    def denoise(z: Float[Array, "b h w c"], logsnr: Float[Array, " b"]) -> Array:
        conditional, unconditional = denoise_pair(z, logsnr)
        return weight * conditional + (1.0 - weight) * unconditional

    return denoise


def static_threshold(x0: Float[Array, "b h w c"], percentile: float) -> Float[Array, "b h w c"]:
    """Clips x0 to [-1, 1] (Imagen, Sec. 2.3); `percentile` is not used."""
    del percentile
    return jnp.clip(x0, -1.0, 1.0)


def dynamic_threshold(x0: Float[Array, "b h w c"], percentile: float) -> Float[Array, "b h w c"]:
    """Dynamic thresholding (Imagen, Sec. 2.3, Fig. A.31): clips to [-s, s] and divides by s.

    s is the percentile of |x0| over each picture, at least 1. Differs from paper: the code printed
    in Fig. A.31 lacks the keepdims and uses the Python `max`; this is what its text says.

    Args:
      x0: predicted pictures.
      percentile: p in [0, 100]; the paper's is 99.5.
    """
    s = jnp.percentile(jnp.abs(x0), percentile, axis=(1, 2, 3), keepdims=True)
    s = jnp.maximum(s, 1.0)
    return jnp.clip(x0, -s, s) / s


THRESHOLDS: dict[str, Callable[[Array, float], Array]] = {
    "none": lambda x0, percentile: x0,
    "static": static_threshold,
    "dynamic": dynamic_threshold,
}


def threshold(denoise: Denoise, name: str, percentile: float) -> Denoise:
    """Wraps `denoise` so that its x0 passes through row `name` of THRESHOLDS."""

    def thresholded(z: Float[Array, "b h w c"], logsnr: Float[Array, " b"]) -> Array:
        return THRESHOLDS[name](denoise(z, logsnr), percentile)

    return thresholded
