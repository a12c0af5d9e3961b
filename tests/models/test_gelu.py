"""The activation that is our own, against SciPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from imagen_jax.models import layers


def test_gelu():
    x = np.linspace(-12.0, 12.0, 2001).astype(np.float32)
    expected = x * scipy.special.ndtr(x.astype(np.float64))
    np.testing.assert_allclose(layers.gelu(jnp.asarray(x)), expected, atol=1e-6, rtol=1e-6)
    slope = jax.vmap(jax.grad(layers.gelu))(jnp.asarray(x))
    density = np.exp(-(x.astype(np.float64) ** 2) / 2) / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(
        slope, scipy.special.ndtr(x.astype(np.float64)) + x * density, atol=1e-6
    )
