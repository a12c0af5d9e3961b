"""`data.name` counts for TFDS only: earlier versions saved a default with every kind of source."""

import dataclasses
import json

import pytest

from imagen_jax.config import overrides
from imagen_jax.config.data import ComponentConfig, DataConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.data.sources.registry import open_source


def config(**data) -> Config:
    return Config(data=DataConfig(**data))


def saved_by_an_earlier_version(given: Config) -> Config:
    """The configuration as read from a config.json in which every name has the old default."""
    values = json.loads(overrides.to_json(given))
    for source in (values["data"], *values["data"]["mixture"].values()):
        source["name"] = source["name"] or "shapes_world"
    return overrides.from_json(json.dumps(values))


def test_no_default_name():
    assert DataConfig().name == ComponentConfig().name == ""
    with pytest.raises(ConfigError, match=r"^config\.data\.name is empty, .*kind='tfds' needs"):
        open_source(DataConfig(kind="tfds", path="data"))
    mixture = {"own": ComponentConfig(kind="tfds", path="data")}
    with pytest.raises(ConfigError, match=r"^config\.data\.mixture\.own\.name is empty"):
        open_source(DataConfig(mixture=mixture))


@pytest.mark.parametrize("kind", ["folder", "tfrecord", "webdataset", "parquet"])
def test_a_run_of_an_earlier_version_resumes(kind):
    for given in (
        config(kind=kind),
        config(mixture={"own": ComponentConfig(kind=kind)}),
        config(),  # Batches of the caller's own: no source at all.
    ):
        saved = saved_by_an_earlier_version(given)
        assert saved != given and overrides.changes(saved, given) == {}
        assert overrides.changes(given, saved) == {}


def test_names_of_other_kinds_do_not_count_and_those_of_tfds_do():
    for kind, expected in (("folder", {}), ("tfds", {"data.name": ("a", "b")})):
        assert (
            overrides.changes(config(kind=kind, name="a"), config(kind=kind, name="b")) == expected
        )
    mixtures = [{"own": ComponentConfig(kind="tfds", name=name)} for name in "ab"]
    found = overrides.changes(*(config(mixture=mixture) for mixture in mixtures))
    assert found == {"data.mixture.own.name": ("a", "b")}
    # Other fields of the name `name` count as before.
    changed = dataclasses.replace(Config().model, name="efficient_unet")
    other = dataclasses.replace(Config(), model=changed)
    names = [name for name in overrides.changes(Config(), other) if name.endswith("model.name")]
    assert names == (["model.name"] if Config().model.name != "efficient_unet" else [])


def test_a_change_of_kind_counts():
    found = overrides.changes(config(kind="folder"), config(kind="tfds", name="a"))
    assert found == {"data.kind": ("folder", "tfds")}
