"""The hybrid loss: the bound trains the variance channels and leaves the rest as it was."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.stages import loss as loss_module
from imagen_jax.stages.loss import loss_given_randomness, sample_randomness


@pytest.fixture
def config(base_config) -> Config:
    return dataclasses.replace(
        base_config,
        model=dataclasses.replace(base_config.model, out_channels=6),
        diffusion=dataclasses.replace(base_config.diffusion, schedule="cosine_steps"),
    )


def with_weight(config: Config, weight: float) -> Config:
    return dataclasses.replace(
        config, diffusion=dataclasses.replace(config.diffusion, vlb_weight=weight)
    )


def test_only_the_variance_is_trained_by_the_bound(config, make_batch, monkeypatch):
    """With the network replaced by its output: gradients by channel."""
    monkeypatch.setattr(loss_module, "apply", lambda params, *_, **__: params)
    batch = jax.tree.map(jnp.asarray, make_batch(config))
    batch |= sample_randomness(jax.random.key(1), len(batch["image"]), config)
    output = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 6)), jnp.float32)

    def gradient(weight: float):
        loss = lambda output: loss_given_randomness(  # noqa: E731
            output, batch, jax.random.key(2), with_weight(config, weight)
        )
        return jax.value_and_grad(loss, has_aux=True)(output)

    (plain, _), of_plain = gradient(0.0)
    (hybrid, report), of_hybrid = gradient(0.5)
    np.testing.assert_array_equal(of_plain[..., :3], of_hybrid[..., :3])
    assert not of_plain[..., 3:].any() and (of_hybrid[..., 3:] != 0).all()
    assert float(hybrid) == pytest.approx(float(plain + 0.5 * report["vlb"]), rel=1e-6)


def test_both_settings_need_the_channels(base_config):
    with pytest.raises(ConfigError, match=r"diffusion.vlb_weight=0.001 needs config.model.out_ch"):
        with_weight(base_config, 0.001)
    sampling = dataclasses.replace(base_config.sampling, variance="learned")
    with pytest.raises(ConfigError, match="sampling.variance='learned' needs"):
        dataclasses.replace(base_config, sampling=sampling)
