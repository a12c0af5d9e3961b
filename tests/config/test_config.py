"""The schema, its way through ConfigDict and JSON, its errors, and every configuration file."""

import ast
import dataclasses
import functools
import json
import pathlib
import re

import jax
import numpy as np
import pytest

from imagen_jax.config import overrides
from imagen_jax.config.data import DataConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.parallel import partitioning
from imagen_jax.stages import stage
from imagen_jax.training import optimizer, step, train
from imagen_jax.training.state import TrainState, create_state

ROOT = pathlib.Path(__file__).parents[2]


def names_of(path: pathlib.Path) -> list[str]:
    """The configurations of a file, which the docstring of its `get_config` names in backticks."""
    functions = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
    (get_config,) = (n for n in functions if n.name == "get_config")
    return re.findall(r"`(\w+)`", ast.get_docstring(get_config))


FILES = sorted((ROOT / "configs").glob("*.py"))
# The paper's have tests of their own, test_imagen_configs.py.
CONFIGS = [
    f"{path.name}:{name}" for path in FILES if path.stem != "imagen" for name in names_of(path)
]


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


def test_fingerprint_tells_configurations_apart(base_config):
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
        ("data=3", "is a section; set one of its fields: batch_size"),
        ("model.channels=64", "must be of type tuple"),
        ("model.channels=(64,'a')", "config.model.channels='a' must be of type int"),
        ("model.channels=(64,64)", "give one entry per level"),
        ("model.num_groups=48", "must be multiples of config.model.num_groups=48"),
        ("model.head_dim=48", "must be multiples of config.model.head_dim=48"),
        ("model.lowres=1", "must be true or false"),
        ("model.lowres=true", "contradicts config.data.lowres_size=0"),
        ("model.lowres_residual=true", "needs config.diffusion.prediction='x0'"),
        ("sampling.sampler=ddmp", "did you mean 'ddpm'?"),
        ("sampling.steps=0", "must be at least 1"),
        ("data.lowres_size=15", "must divide"),
        ("data.batch_size=0", "must be at least 1"),
        ("optimizer.name=sgd", "is not one of adam, adamw, adafactor, lion"),
        ("diffusion.loss_weight=minsnr", "did you mean 'min_snr'?"),
    ],
)
def test_what_is_refused(assignment, says):
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
        ("    c.train.stepps = 3\n    return c", "stepps"),
        ("    c.train.steps = 'x'\n    return c", "steps"),
        ("    return {'base': c}[name]", "nope"),
        ("    return c +", "SyntaxError"),
    ],
)
def test_a_config_file_with_a_slip(tmp_path, body, says):
    path = tmp_path / "mine.py"
    path.write_text(
        "from imagen_jax import config, config_io\ndef get_config(name=''):\n"
        f"    c = config_io.to_config_dict(config.Config())\n{body}\n"
    )
    if says is None:
        assert overrides.load(f"{path}:nope") == Config()
        return
    with pytest.raises(ConfigError, match="mine.py.*" + says):
        overrides.load(f"{path}:nope")


def test_no_such_config_file():
    with pytest.raises(ConfigError, match="no file 'configs/nothing.py'"):
        overrides.load("configs/nothing.py:base")


def shrunk(config: Config) -> Config:
    """What a step depends on, with every width, count and size at its least.

    Of the levels the last remains, which has all the kinds of layers: several of them are the
    business of tests/models.
    """
    model = config.model
    levels = 1
    model = dataclasses.replace(
        model,
        channels=(8,),
        num_res_blocks=(1,),
        self_attention=model.self_attention[-1:],
        cross_attention=model.cross_attention[-1:],
        strided_stem=model.strided_stem[-1:],
        head_dim=8,
        num_groups=4,
        embed_dim=16,
        text_dim=8,
        dtype="float32",
    )
    size = model.patch_size * 2**levels
    lowres = size // 2 if config.data.lowres_size else 0
    data = DataConfig(image_size=size, lowres_size=lowres, batch_size=2, max_text_len=4)
    # A value that the program is the same for, so that files which share a network share it.
    diffusion = dataclasses.replace(config.diffusion, aug_level_max=0.5)
    return Config(data=data, model=model, diffusion=diffusion, optimizer=config.optimizer)


@functools.cache
def stepped(config: Config, make_batch) -> tuple[TrainState, dict]:
    """State and report after one step; the files share networks, which are compiled once."""
    rule = optimizer.make_optimizer(config.optimizer, 10)
    params = jax.eval_shape(lambda: stage.init_params(config, jax.random.key(0)))
    state = create_state(
        jax.tree.map(
            lambda leaf: np.full(leaf.shape, 0.01, np.float32), partitioning.unbox(params)
        ),
        rule,
    )
    return jax.jit(step.make_train_step(config, rule))(state, make_batch(config))


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_at_full_size_and_shrunk(name, make_batch):
    config = overrides.load(str(ROOT / "configs" / name))
    wide = train.with_data(config, 4096, {}, {})
    shapes = jax.eval_shape(lambda: stage.init_params(wide, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) > 1e5

    state, report = stepped(shrunk(config), make_batch)
    assert np.isfinite(report["loss"]) and report["grad_norm"] > 0
    assert int(state.step) == 1 and int(state.skipped) == 0


def test_unknown_name_in_a_projects_file():
    with pytest.raises(ConfigError, match="nope"):
        overrides.load(f"{ROOT / 'configs' / 'shapes.py'}:nope")


MIXTURE = """
from imagen_jax.config import overrides
from imagen_jax.config.schema import Config

def get_config(name=""):
    c = config_io.to_config_dict(Config())
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


def test_a_source_without_a_path_lies_where_the_data_are(mixture):
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
        ("data.mixture.coco.kind=foldr", "did you mean 'folder'?"),
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


def test_a_stage_that_learned_from_crops_draws_whole_pictures():
    crops = DataConfig(image_size=256, lowres_size=64, crop_from=1024)
    whole = crops.whole()
    assert (whole.image_size, whole.lowres_size, whole.crop_from) == (1024, 256, 0)
    assert whole.whole() is whole
    for name in ("imagen.py:sr_1024", "shapes.py:sr2"):
        config = overrides.load(str(ROOT / "configs" / name))
        whole = config.data.whole()
        assert whole.image_size == 4 * config.data.image_size == 4 * whole.lowres_size
        assert not any(config.model.self_attention) and any(config.model.cross_attention)
        assert config.model.text_conditioning == "cross"
    with pytest.raises(ConfigError, match="crop_from=1000 must be a multiple of.*image_size=256"):
        DataConfig(image_size=256, crop_from=1000)
    with pytest.raises(ConfigError, match="position_embedding=True does not go with .*crop_from"):
        overrides.load(str(ROOT / "configs/shapes.py:sr2"), ["model.position_embedding=True"])


@pytest.mark.parametrize("name", ["folder.py:base", "folder.py:sr", "coco.py:base", "coco.py:sr"])
def test_other_data_need_nothing_of_the_demo(name):
    config = overrides.load(str(ROOT / "configs" / name))
    assert "runs/demo" not in overrides.to_json(config)
