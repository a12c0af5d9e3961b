"""The noise-aware classifier: probabilities, loss and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config.schema import DiffusionConfig, ModelConfig
from imagen_jax.diffusion import guidance
from imagen_jax.models import classifier
from imagen_jax.parallel import partitioning

CLASSES = (3, 2)
NETWORK = classifier.Classifier(
    ModelConfig(
        channels=(8,),
        num_res_blocks=(1,),
        self_attention=(True,),
        cross_attention=(False,),
        head_dim=8,
        num_groups=4,
        embed_dim=16,
        patch_size=2,
    ),
    CLASSES,
)


@pytest.fixture(scope="module")
def params():
    """Parameters that are not zero, so every path of the network contributes."""
    example = jnp.zeros((1, 8, 8, 3)), jnp.zeros(1)
    shapes = jax.eval_shape(lambda: NETWORK.init(jax.random.key(0), *example)["params"])
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32),
        partitioning.unbox(shapes),
    )


def test_probabilities_of_all_classes_sum_to_one():
    rng = np.random.default_rng(1)
    logits = tuple(jnp.asarray(rng.normal(size=(4, n)), jnp.float32) for n in CLASSES)
    pairs = [(a, b) for a in range(3) for b in range(2)]
    each = [classifier.log_prob(logits, jnp.tile(jnp.array(pair), (4, 1))) for pair in pairs]
    np.testing.assert_allclose(np.exp(each).sum(axis=0), 1.0, rtol=1e-5)
    # Without a label of the second attribute its classes are summed over.
    first = classifier.log_prob(logits, jnp.tile(jnp.array([1, -1]), (4, 1)))
    np.testing.assert_allclose(np.exp(first), np.exp(each[2]) + np.exp(each[3]), rtol=1e-5)


def test_classifier_guidance_raises_the_probability_of_the_labels_per_image(params):
    labels = jnp.array([[0, 1], [2, -1], [1, 0]])
    z = jnp.asarray(np.random.default_rng(2).normal(size=(3, 8, 8, 3)), jnp.float32)
    logsnr = jnp.array([-1.0, 0.0, 2.0])

    @jax.jit
    def change(z, logsnr):
        """What guidance adds to x0, and log p before and after a small step along it."""

        def log_prob(z, logsnr):
            return classifier.log_prob(NETWORK.apply({"params": params}, z, logsnr), labels)

        zero = lambda z, logsnr: jnp.zeros_like(z)  # noqa: E731
        added = guidance.classifier(zero, log_prob, 1.0)(z, logsnr)
        return added, log_prob(z, logsnr), log_prob(z + 0.1 * added, logsnr)

    added, before, after = change(z, logsnr)
    assert (after > before).all()
    others, _, _ = change(z.at[0].set(-z[0]), logsnr)
    np.testing.assert_allclose(others[1:], added[1:], atol=1e-6)
    # It depends on the noise level.
    _, other, _ = change(z, logsnr + 1.0)
    assert float(jnp.abs(other - before).min()) > 1e-4


def test_a_classifier_with_zero_logits_has_the_loss_of_chance(params):
    logits = {name: jax.tree.map(jnp.zeros_like, params[name]) for name in ("logits_0", "logits_1")}
    x0 = jnp.asarray(np.random.default_rng(3).uniform(-1, 1, (4, 8, 8, 3)), jnp.float32)
    given = (NETWORK, x0, jnp.array([[0, 0], [1, 1], [2, 0], [0, -1]]), jax.random.key(1))
    losses = jax.jit(lambda p: classifier.loss_fn(p, *given, DiffusionConfig()))
    # Three images have both labels, one has the first only.
    chance = np.log(3.0) + 0.75 * np.log(2.0)
    assert float(losses({**params, **logits})) == pytest.approx(chance, rel=1e-5)
    assert float(losses(params)) != pytest.approx(chance, rel=0.01)
