"""Exponential moving average of the parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from imagen_jax.config import EmaConfig


def decay_at(step: Int[Array, ""], config: EmaConfig) -> Float[Array, ""]:
    """Decay of the average at `step`, warmed up: min(decay, 1 - (1 + step)^-power).

    The first average is then the parameters themselves rather than the initialisation, and a short
    run forgets its start. Paper is silent on the decay; 0.9999 is the field's custom.
    """
    return jnp.minimum(config.decay, 1.0 - (1.0 + step) ** -config.warmup_power)


def update(average: Any, params: Any, decay: Float[Array, ""]) -> Any:
    """average <- decay * average + (1 - decay) * params, leaf by leaf, in float32."""
    return jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), average, params)
