"""The schema, its conversion to ConfigDict and JSON, overrides, and errors."""

import copy
import dataclasses
import json
import pathlib
import re

import pytest

from imagen_jax.config import overrides
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config

ROOT = pathlib.Path(__file__).parents[2]


def sections(cls=Config, path="config"):
    """(path, field) of every field of the schema."""
    for field in dataclasses.fields(cls):
        yield f"{path}.{field.name}", field
        if dataclasses.is_dataclass(field.default_factory):
            yield from sections(field.default_factory, f"{path}.{field.name}")


def overridden(*assignments: str) -> Config:
    values = overrides.to_config_dict(Config())
    overrides.override(values, assignments)
    return overrides.from_config_dict(values)


def test_round_trips(sr_config):
    assert overrides.from_config_dict(overrides.to_config_dict(sr_config)) == sr_config
    assert overrides.from_json(overrides.to_json(sr_config)) == sr_config
    assert hash(sr_config) == hash(overrides.from_json(overrides.to_json(sr_config)))


def test_different_configurations_have_different_fingerprints(base_config):
    again = overrides.from_json(overrides.to_json(base_config))
    assert overrides.fingerprint(again) == overrides.fingerprint(base_config)
    other = dataclasses.replace(base_config, seed=1)
    assert overrides.fingerprint(other) != overrides.fingerprint(base_config)


def test_every_field_is_documented():
    undocumented = [
        path for path, field in sections() if not field.metadata.get("doc", "").endswith(".")
    ]
    assert not undocumented


def test_overrides_take_the_type_of_the_field():
    config = overridden(
        "data.batch_size=8",
        "optimizer.learning_rate=1",
        "model.channels=(64,128)",
        "model.num_res_blocks=[1, 2]",
        "model.self_attention=(True,False)",
        "model.cross_attention=(True,False)",
        "data.path=3",
        "optimizer.multiply_by_parameter_scale=true",
        "diffusion.logsnr_shift=-0.5",
        "name=a=b",
    )
    assert config.data.batch_size == 8 and config.data.path == "3" and config.name == "a=b"
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.model.channels == (64, 128) and config.model.num_res_blocks == (1, 2)
    assert config.optimizer.multiply_by_parameter_scale is True
    assert config.diffusion.logsnr_shift == -0.5


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        (
            "data.bach_size=8",
            "config.data.bach_size is not a field; did you mean config.data.batch",
        ),
        ("dta.batch_size=8", "config.dta is not a field; did you mean config.data?"),
        ("data.batch_size.x=8", "config.data.batch_size.x is not a field"),
        ("data.batch_size=many", "config.data.batch_size='many' must be of type int"),
        ("data.batch_size=1.5", "must be of type int"),
        ("data.batch_size=True", "must be of type int"),
        ("data.batch_size", "has no value"),
        ("data=3", "is a section; set one of its fields: background, batch_size"),
        ("model.channels=64", "must be of type tuple"),
        ("model.channels=(64,'a')", "config.model.channels='a' must be of type int"),
        ("model.channels=(64,64)", "give one entry per level"),
        ("model.num_groups=48", "must be multiples of config.model.num_groups=48"),
        ("model.head_dim=48", "must be multiples of config.model.head_dim=48"),
        ("model.lowres=1", "must be true or false"),
        ("model.lowres=true", "contradicts config.data.lowres_size=0"),
        ("model.lowres_residual=true", "needs config.diffusion.prediction='x0'"),
        ("sampling.steps=0", "must be at least 1"),
        ("data.lowres_size=15", "must divide"),
        ("data.batch_size=0", "must be at least 1"),
    ],
)
def test_invalid_overrides(assignment, says):
    with pytest.raises(ConfigError) as error:
        overridden(assignment)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_json_saved_before_a_field_existed_is_read_with_its_default():
    values = json.loads(overrides.to_json(Config(seed=7)))
    del values["train"]["steps"]
    assert overrides.from_json(json.dumps(values)) == Config(seed=7)


def test_json_with_an_unknown_field_is_refused():
    values = json.loads(overrides.to_json(Config()))
    values["train"]["stepps"] = 3
    with pytest.raises(ConfigError, match="config.train.stepps.*config.train.steps"):
        overrides.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("    return c", None),
        (
            "    c.train.stepps = 3\n    return c",
            "mine.py, line 4: config.train.stepps is not a field; did you mean config.train.steps?",
        ),
        (
            "    c.trian.steps = 3\n    return c",
            "mine.py, line 4: config.trian is not a field; did you mean config.train?",
        ),
        (
            "    c['train']['stepps'] += 3\n    return c",
            "mine.py, line 4: config.train.stepps is not a field; did you mean config.train.steps?",
        ),
        (
            "    c.train.steps = 'x'\n    return c",
            "mine.py, line 4: config.train.steps='x' must be of type int, got str",
        ),
        (
            "    c.data.mixture = {'a': {'rat': 1.0}}\n    return c",
            "mine.py: config.data.mixture.a.rat is not a field; "
            "did you mean config.data.mixture.a.rate?",
        ),
        (
            "    return {'base': c}[name]",
            "mine.py, line 4: KeyError: 'nope'; does get_config know the name 'nope'?",
        ),
        ("    return c +", "mine.py, line 4: SyntaxError: invalid syntax"),
        ("    pass", "mine.py: get_config('nope') returned NoneType, expected a ConfigDict"),
        ("get_config = None", "mine.py has no function get_config(name)"),
    ],
)
def test_a_config_file_with_a_mistake(tmp_path, body, says):
    path = tmp_path / "mine.py"
    path.write_text(
        "from imagen_jax.config import overrides, schema\ndef get_config(name=''):\n"
        f"    c = overrides.to_config_dict(schema.Config())\n{body}\n"
    )
    if says is None:
        assert overrides.load(f"{path}:nope") == Config()
        return
    with pytest.raises(ConfigError) as error:
        overrides.load(f"{path}:nope")
    assert str(error.value) == f"--config={path}:nope: {tmp_path}/{says}"


def test_the_line_of_a_file_with_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def get_config():\n    return 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    for file in ("mine.py", "./mine.py"):
        with pytest.raises(ConfigError) as error:
            overrides.load(file)
        assert str(error.value) == f"--config={file}: {file}, line 2: ZeroDivisionError: " + (
            "division by zero"
        )


def test_names_of_a_file_that_declares_none(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config(name=''):\n    return {}\n")
    assert overrides.names(str(path)) == []


def test_a_probed_field_is_absent():
    """hasattr and copies work on the values that a configuration file changes."""
    values = overrides.to_config_dict(Config())
    assert hasattr(values.train, "steps") and not hasattr(values.train, "stepps")
    copied = copy.deepcopy(values)
    assert overrides.from_config_dict(copied) == Config()
    with pytest.raises(ConfigError, match=r"config\.train\.stepps is not a field"):
        copied.train.stepps = 1


def test_no_such_config_file():
    with pytest.raises(ConfigError, match="no file 'configs/nothing.py'"):
        overrides.load("configs/nothing.py:base")


MIXTURE = """
from imagen_jax.config import overrides
from imagen_jax.config.schema import Config

def get_config(name=""):
    c = overrides.to_config_dict(Config())
    c.data.mixture = {
        "coco": {"kind": "tfds", "name": "coco_captions", "path": "/data", "rate": 3},
        "own": {"kind": "folder", "path": "/own"},
    }
    return c
"""


@pytest.fixture
def mixture(tmp_path) -> str:
    path = tmp_path / "mixture.py"
    path.write_text(MIXTURE)
    return str(path)


def test_sources_of_a_mixture_are_overridden_by_name(mixture):
    config = overrides.load(mixture, ["data.mixture.own.rate=0.5", "data.mixture.coco.split=val"])
    coco, own = config.data.mixture["coco"], config.data.mixture["own"]
    assert (coco.rate, coco.split, coco.path) == (3.0, "val", "/data")
    assert (own.rate, own.kind, own.split) == (0.5, "folder", "train")
    assert overrides.from_json(overrides.to_json(config)) == config
    assert hash(config) == hash(overrides.from_json(overrides.to_json(config)))


def test_a_source_without_a_path_has_the_path_of_the_section(mixture):
    config = overrides.load(mixture, ["data.path=/shared", "data.mixture.coco.path="])
    assert {name: s.path for name, s in config.data.sources().items()} == {
        "coco": "/shared",
        "own": "/own",
    }


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.mixture.coc.rate=1", "did you mean config.data.mixture.coco?"),
        ("data.mixture.coco.rat=1", "did you mean config.data.mixture.coco.rate?"),
        ("data.mixture.coco=1", "config.data.mixture.coco is a section"),
        ("data.mixture.coco.rate=0", "rate=0.0 must be above 0"),
    ],
)
def test_mistakes_in_a_mixture(mixture, override, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        overrides.load(mixture, [override])


def test_what_a_run_may_change_in_a_mixture(mixture):
    config = overrides.load(mixture)
    moved = overrides.load(mixture, ["data.mixture.own.path=/elsewhere"])
    assert overrides.changes(config, moved) == {}
    rated = overrides.load(mixture, ["data.mixture.own.rate=2"])
    assert overrides.changes(config, rated) == {"data.mixture.own.rate": (1.0, 2.0)}
    alone = dataclasses.replace(config, data=dataclasses.replace(config.data, mixture={}))
    assert overrides.changes(alone, config)["data.mixture.coco.rate"] == (None, 3.0)
    assert overrides.changes(config, alone)["data.mixture.coco.rate"] == (3.0, None)
