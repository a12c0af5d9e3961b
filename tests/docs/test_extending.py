"""docs/extending.md: its examples run in order as one program; registries decide on names."""

import dataclasses
import itertools
import json
import subprocess
import sys
import types

import pytest

from imagen_jax.config import data, overrides
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.config.train import TrainConfig
from imagen_jax.data.sources import registry
from imagen_jax.diffusion import process, samplers, thresholding
from imagen_jax.stages import network
from imagen_jax.stages.names import check_names
from imagen_jax.training.train import train
from tests.reference.pages import ALL, ROOT

# The fields that `check_names` checks, with their registries.
REGISTRIES = {
    "model.name": network.MODELS,
    "diffusion.schedule": process.SCHEDULES,
    "diffusion.aug_schedule": process.SCHEDULES,
    "diffusion.loss_weight": process.LOSS_WEIGHTS,
    "sampling.sampler": samplers.SAMPLERS,
    "sampling.thresholding": thresholding.THRESHOLDS,
}
BLOCKS = [b for b in ALL if b.page == "docs/extending.md" and b.language == "python"]
CONFIG_FILE = """
from imagen_jax.config import overrides
from imagen_jax.config.schema import Config

def get_config(name=""):
    return overrides.to_config_dict(Config())
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """A configuration file with all defaults."""
    path = tmp_path_factory.mktemp("config") / "default.py"
    path.write_text(CONFIG_FILE)
    return str(path)


def load(config_file, field, name):
    """The configuration with another name in a field, checked as the commands do."""
    config = overrides.load(config_file, [f"{field}={name}"])
    check_names(config)
    return config


def test_the_examples_run():
    code = "\n\n".join(b.code for b in BLOCKS if b.kind == "run")
    assert code.count("assert ") >= 8
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_builder_example_builds(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    (block,) = (b for b in BLOCKS if b.about.endswith("::test_the_builder_example_builds"))
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "dots.py").write_text(block.code)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = data.DataConfig(kind="tfds", path=str(tmp_path / "data"), name="my_package.dots:Dots")
    source = registry.open_source(config)
    captions = {caption for i in range(len(source)) for caption in source.captions(i)}
    prompts = (tmp_path / "data" / "prompts.jsonl").read_text().splitlines()
    assert captions == {json.loads(row)["prompt"] for row in prompts} and len(source) == 4
    for name in ("my_package.dots", "my_package"):
        sys.modules.pop(name)


class Recorder(types.ModuleType):
    """Stands for the module wandb: keeps what a run receives."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.rows, self.finished, self.Image = [], [], 0, lambda pixels: pixels.shape

    def init(self, **settings):
        self.started.append(settings)
        return self

    def define_metric(self, name, *, step_metric):
        assert (name, step_metric) == ("*", "train_step")

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished += 1


def test_the_weights_and_biases_writer_receives_a_run(
    base_config, make_batch, tmp_path, monkeypatch
):
    name = "test_the_weights_and_biases_writer_receives_a_run"
    (block,) = (b for b in BLOCKS if b.about.endswith(f"::{name}"))
    (tmp_path / "my_wandb.py").write_text(block.code)
    monkeypatch.syspath_prepend(str(tmp_path))
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    settings = TrainConfig(
        steps=4, log_every=2, sample_every=4, writers=("my_wandb:WeightsAndBiases",)
    )
    config = dataclasses.replace(base_config, train=settings)
    batches = lambda step: itertools.repeat(make_batch(config))  # noqa: E731
    train(config, str(tmp_path / "run"), batches, lambda line: None)
    (started,) = recorder.started
    assert started["resume"] == "allow" and recorder.finished == 1
    *scalars, images = recorder.rows
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for row, line in zip(scalars, map(json.loads, lines), strict=True):
        assert row.pop("train_step") == line["step"]
        assert row == {k: v for k, v in line.items() if k not in ("step", "seconds")}
    assert images["train_step"] == 4 and images["samples"][-1] == 3
    assert not (tmp_path / "run" / "tensorboard").exists()
    sys.modules.pop("my_wandb")


def test_an_unknown_writer_is_refused(base_config, tmp_path):
    config = dataclasses.replace(base_config, train=TrainConfig(writers=("tensorbord",)))
    with pytest.raises(ConfigError, match="config.train.writers='tensorbord'.*'tensorboard'"):
        train(config, str(tmp_path), lambda step: ())


@pytest.mark.parametrize("field", REGISTRIES)
def test_an_unknown_name_is_refused_with_the_nearest_one(config_file, field):
    row = sorted(REGISTRIES[field])[0]
    with pytest.raises(ConfigError) as error:
        load(config_file, field, f"{row}z")
    message = str(error.value)
    assert message.startswith(f"config.{field}={f'{row}z'!r} is not one of ")
    assert all(name in message for name in REGISTRIES[field])
    assert message.endswith(f"did you mean {row!r}?") and "\n" not in message


@pytest.mark.parametrize("field", REGISTRIES)
def test_a_row_added_at_run_time_is_accepted(config_file, field, monkeypatch):
    with pytest.raises(ConfigError):
        load(config_file, field, "new_row")
    rows = REGISTRIES[field]
    monkeypatch.setitem(rows, "new_row", next(iter(rows.values())))
    section, name = field.split(".")
    assert getattr(getattr(load(config_file, field, "new_row"), section), name) == "new_row"


def test_an_unknown_prediction_is_refused(config_file):
    with pytest.raises(ConfigError, match="did you mean 'x0'"):
        load(config_file, "diffusion.prediction", "x00")


def test_every_row_can_be_configured(config_file):
    for field, rows in REGISTRIES.items():
        for name in rows:
            load(config_file, field, name)


def test_the_options_of_a_sampler_are_fields_and_arguments():
    fields = {field.name for field in dataclasses.fields(SamplingConfig)}
    assert samplers.OPTIONS.keys() <= samplers.SAMPLERS.keys()
    for name, options in samplers.OPTIONS.items():
        assert set(options) <= fields
        samplers.make_sampler(SamplingConfig(sampler=name))


def test_an_unknown_kind_of_source_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="config.data.kind='foldr'.*did you mean 'folder'"):
        registry.open_source(data.DataConfig(kind="foldr", path=str(tmp_path)))
    mixture = {"coco": data.ComponentConfig(kind="foldr", path=str(tmp_path))}
    with pytest.raises(ConfigError, match="config.data.mixture.coco.kind='foldr'"):
        registry.open_source(data.DataConfig(mixture=mixture))
