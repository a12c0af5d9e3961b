"""The hash of a stage's configuration, by which folders of samples know it again."""

import dataclasses

import pytest

from imagen_jax.config.text import TextConfig
from imagen_jax.stages import folder


def test_it_is_the_same_elsewhere_and_with_more_fields(base_config, monkeypatch):
    text = TextConfig(path="/a/text", fingerprint="f")
    config = dataclasses.replace(base_config, text=text)
    moved = dataclasses.replace(config, text=dataclasses.replace(text, path="/b/text"))
    assert folder.config_hash(config) == folder.config_hash(moved)
    flatten = folder.overrides.flatten_fields
    monkeypatch.setattr(
        folder.overrides, "flatten_fields", lambda *of: {**flatten(*of), "data.later": 3}
    )
    assert folder.config_hash(config) == folder.config_hash(moved)


@pytest.mark.parametrize(
    "change",
    [
        {"text": TextConfig(fingerprint="g")},
        {"model.channels": (16,)},
        {"diffusion.prediction": "eps"},
        {"sampling.steps": 5},
        {"name": "other"},
    ],
)
def test_it_is_another_one_for_other_images(base_config, change):
    ((path, value),) = change.items()
    section, _, field = path.partition(".")
    if field:
        value = dataclasses.replace(getattr(base_config, section), **{field: value})
    changed = dataclasses.replace(base_config, **{section: value})
    assert folder.config_hash(base_config) != folder.config_hash(changed)
