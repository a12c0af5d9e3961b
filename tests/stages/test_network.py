"""A stage's network: values that the configuration leaves to it."""

import dataclasses

import pytest

from imagen_jax.config import overrides
from imagen_jax.config.schema import Config, ModelConfig
from imagen_jax.stages import network


@pytest.mark.parametrize(("name", "own"), [("unet", 1.0), ("efficient_unet", 2**-0.5)])
def test_a_saved_configuration_equals_the_default_of_its_network(name, own):
    def config(skip_scale: float | None) -> Config:
        return Config(model=ModelConfig(name=name, skip_scale=skip_scale))

    assert network.with_defaults(config(None)) == config(own)
    assert network.with_defaults(config(0.25)) == config(0.25)
    saved = overrides.from_json(overrides.to_json(config(own)))
    assert saved.model.skip_scale == own
    assert overrides.changes(saved, network.with_defaults(config(None))) == {}
    other = dataclasses.replace(saved, model=dataclasses.replace(saved.model, skip_scale=0.25))
    assert list(overrides.changes(other, network.with_defaults(config(None)))) == [
        "model.skip_scale"
    ]
