"""The listing of a configuration: every field, its value, its meaning, what differs."""

import dataclasses
import pathlib
import runpy

import pytest

from imagen_jax.config import describe, overrides
from imagen_jax.config.data import ComponentConfig
from imagen_jax.config.schema import Config


def changed(*assignments: str) -> Config:
    values = overrides.to_config_dict(Config())
    overrides.override(values, assignments)
    return overrides.from_config_dict(values)


def test_every_field_is_listed_once_with_its_meaning():
    lines = describe.describe(Config())
    listed = [line.split()[0] for line in lines]
    expected = overrides.flatten_fields(dataclasses.asdict(Config()))
    sections = {"config.data.mixture", "config.data.captions"}  # Without fields of their own.
    assert set(listed) == {f"config.{path}" for path in expected} | sections
    assert len(listed) == len(set(listed))
    (line,) = (line for line in lines if line.split()[0] == "config.diffusion.logsnr_min")
    assert " = -20.0 " in line and "nats" in line
    assert not any(line.startswith("*") for line in lines)


def test_what_differs_from_the_default_is_marked():
    lines = describe.describe(changed("train.steps=7", "data.path=/data"))
    marked = [line for line in lines if line.startswith("* ")]
    assert [line.split()[1] for line in marked] == ["config.data.path", "config.train.steps"]
    assert " = 7 " in marked[1] and "(default: 2500000)" in marked[1]
    assert " = '/data' " in marked[0] and "(default: '')" in marked[0]


def test_sources_of_a_mixture_are_listed():
    source = ComponentConfig(name="a", rate=3.0)
    data = dataclasses.replace(Config().data, mixture={"own": source})
    lines = describe.describe(dataclasses.replace(Config(), data=data))
    marked = [line.split()[1] for line in lines if line.startswith("* ")]
    assert marked == ["config.data.mixture.own.name", "config.data.mixture.own.rate"]
    assert sum("config.data.mixture.own." in line for line in lines) == len(
        dataclasses.fields(ComponentConfig)
    )


def test_weights_of_captions_are_one_field():
    data = dataclasses.replace(Config().data, captions={"caption": 0.5, "short": 0.5})
    lines = describe.describe(dataclasses.replace(Config(), data=data))
    (line,) = (line for line in lines if line.startswith("* "))
    assert line.split()[1] == "config.data.captions" and "'short': 0.5" in line


CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
PRESETS = [
    (path.name, name)
    for path in sorted(CONFIGS.glob("*.py"))
    for name in runpy.run_path(str(path))["CONFIGS"]
]


@pytest.mark.parametrize(("file", "name"), PRESETS)
def test_every_preset_is_described(file, name):
    values = overrides.from_file(str(CONFIGS / file), name)
    assert len(describe.describe(overrides.from_config_dict(values))) > 100


def test_sections_are_named_with_their_meaning():
    sections = describe.sections()
    assert sections["data"] and sections["sampling"] and "name" not in sections
