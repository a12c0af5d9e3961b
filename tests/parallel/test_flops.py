"""FLOPs of traced programs, against hand counts, the compiler's and the paper's."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from imagen_jax.config import overrides
from imagen_jax.models.unet import UNet
from imagen_jax.parallel import flops, partitioning
from imagen_jax.stages.network import init_params


def count(fn, *shapes) -> float:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return flops.count(jax.make_jaxpr(fn)(*arrays))


def test_products_by_hand():
    assert count(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)) == 840
    # Of a row of four pixels under a kernel of three, padded: 2 + 3 + 3 + 2 products.
    conv = lambda x, k: lax.conv_general_dilated(x, k, (1,), "SAME")  # noqa: E731
    assert count(conv, (2, 6, 4), (8, 6, 3)) == 2 * (2 * 8 * 6) * 10


def test_a_loop_counts_as_often_as_it_runs_and_a_branch_once():
    once = count(lambda a, b: a @ b, (4, 4), (4, 4))
    loop = lambda a, b: lax.scan(lambda x, _: (x @ b, None), a, length=7)[0]  # noqa: E731
    assert count(loop, (4, 4), (4, 4)) == 7 * once
    either = lambda a, b: lax.cond(a[0, 0] > 0, lambda: a @ b @ b, lambda: a)  # noqa: E731
    assert count(either, (4, 4), (4, 4)) == 2 * once


def network(x, kernels):
    for kernel, (stride, groups) in zip(kernels, ((1, 1), (2, 1), (1, 4)), strict=True):
        dims = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(
            x, kernel, (stride,) * 2, "SAME", dimension_numbers=dims, feature_group_count=groups
        )
    return jnp.sum((x.reshape(-1, 64) @ jnp.ones((64, 64))) ** 2)


def test_gradients_of_convolutions_agree_with_the_compiler():
    shapes = [(2, 16, 16, 32), [(3, 3, 32, 64), (3, 3, 64, 64), (3, 3, 16, 64)]]
    arrays = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda s: type(s) is tuple
    )
    traced = jax.jit(jax.grad(network, argnums=(0, 1))).trace(*arrays)
    expected = traced.lower().cost_analysis()["flops"]
    assert flops.count(traced.jaxpr) == pytest.approx(expected, rel=0.01)


def test_recomputation_is_work():
    f = lambda a, b: jnp.sum(jnp.sin(jnp.sin(a @ b) @ b))  # noqa: E731
    plain = count(jax.grad(f), (8, 8), (8, 8))
    assert count(jax.grad(jax.checkpoint(f)), (8, 8), (8, 8)) == plain + 2 * 2 * 8**3


@pytest.mark.slow
def test_the_base_model_takes_what_the_paper_s_figures_say():
    config = overrides.load("configs/imagen.py:base_64")
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    size, length = config.data.image_size, config.data.max_text_len
    traced = jax.make_jaxpr(UNet(config.model).apply)(
        {"params": partitioning.unbox(params)},
        jnp.zeros((1, size, size, 3)),
        jnp.zeros((1,)),
        jnp.zeros((1, length, config.model.text_dim)),
        jnp.ones((1, length), bool),
    )
    # 1.58 TFLOP, with products that fall on the padding counted in.
    assert 0.93 * 1.58e12 < flops.count(traced) < 1.58e12
