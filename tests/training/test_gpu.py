"""bfloat16 and fused attention on a GPU against float32 and plain attention.

Needs a GPU: JAX_PLATFORMS=cuda python -m pytest tests/training/test_gpu.py
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config.schema import ModelConfig
from imagen_jax.models import attention
from imagen_jax.models.unet import UNet
from imagen_jax.parallel import partitioning

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

BATCH, TOKENS, DIM = 4, 32, 64
MODEL = ModelConfig(
    channels=(64, 128),
    num_res_blocks=(2, 2),
    self_attention=(False, True),
    cross_attention=(False, True),
    head_dim=64,
    num_groups=8,
    embed_dim=256,
    text_dim=DIM,
)
# bfloat16 has 8 significant bits: one rounding has a relative error of up to 2^-9.
CLOSE = 0.03


def relative_error(found, expected):
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def attention_and_gradient(dtype, mask):
    """The output of attention and the gradients of a weighted sum of it."""
    shapes = ((BATCH, 256, 128), (BATCH, 256 + TOKENS, 128), (BATCH, 256 + TOKENS, 128))
    inputs = [normal(seed, *shape).astype(dtype) for seed, shape in enumerate(shapes)]
    weights = normal(9, *shapes[0])

    def total(q, k, v):
        out = attention.attend(q, k, v, heads=2, mask=mask).astype(jnp.float32)
        return jnp.sum(out * weights), out

    gradient, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return out, *gradient


@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_equals_plain_attention(masked):
    mask = jnp.ones((BATCH, 256 + TOKENS), bool)
    if masked:  # Texts of different lengths, one of them empty.
        mask = mask.at[:, 256:].set(jnp.arange(TOKENS) < jnp.array([[32], [7], [1], [0]]))
    q = jax.ShapeDtypeStruct((BATCH, 256, 2, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((BATCH, 256 + TOKENS, 2, 64), jnp.bfloat16)
    assert attention.attention_implementation(q, k, "gpu") == "cudnn"
    with jax.default_matmul_precision("highest"):
        expected = attention_and_gradient(jnp.float32, mask)
    found = attention_and_gradient(jnp.bfloat16, mask)
    for name, one, other in zip(("out", "q", "k", "v"), found, expected, strict=True):
        assert relative_error(one, other) < CLOSE, name


def test_the_bfloat16_network_equals_the_float32_network():
    z, logsnr, text = normal(0, BATCH, 32, 32, 3), normal(1, BATCH), normal(2, BATCH, TOKENS, DIM)
    mask = jnp.arange(TOKENS) < jnp.array([[32], [7], [1], [0]])
    target = normal(3, BATCH, 32, 32, 3)
    params = partitioning.unbox(UNet(MODEL).init(jax.random.key(4), z, logsnr, text, mask))
    # The last layer is initialised to zero, which would hide all others.
    params = jax.tree.map(lambda p: p + 0.02 * normal(5, *p.shape), params)

    def output_and_gradient(dtype):
        network = UNet(dataclasses.replace(MODEL, dtype=dtype))

        def loss(params):
            out = network.apply(params, z, logsnr, text, mask).astype(jnp.float32)
            return jnp.mean((out - target) ** 2), out

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    with jax.default_matmul_precision("highest"):
        gradient, out = output_and_gradient("float32")
    half_gradient, half_out = output_and_gradient("bfloat16")
    assert relative_error(half_out, out) < CLOSE
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])  # noqa: E731
    assert relative_error(flat(half_gradient), flat(gradient)) < CLOSE
