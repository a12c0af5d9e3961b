"""Every numeric field refuses what it cannot mean, before a command does anything."""

import dataclasses

import pytest

from imagen_jax.cli import main
from imagen_jax.config import bounds, overrides
from imagen_jax.config.data import ComponentConfig, DataConfig
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config

# Any finite number has a meaning, or the section checks relations of its own.
FREE = {"text.layer", "diffusion.logsnr_shift", "diffusion.logsnr_min", "diffusion.logsnr_max"}
OPTIONAL = {"model.skip_scale", "optimizer.decay_fraction", "optimizer.b1", "optimizer.b2"}
OPTIONAL |= {"optimizer.eps", "train.spike_factor", "lora.alpha"}


def numeric_fields() -> dict[str, object]:
    """Path -> default of the fields that hold numbers, sections of `sampling` apart."""
    config = Config(data=DataConfig(mixture={"own": ComponentConfig()}))
    found = overrides.flatten_fields(dataclasses.asdict(config))

    def number(value: object) -> bool:
        parts = value if isinstance(value, tuple) and value else (value,)
        return all(isinstance(v, int | float) and not isinstance(v, bool) for v in parts)

    return {
        path: value
        for path, value in found.items()
        if path in OPTIONAL or number(value)
        if not path.startswith(("sampling.", "distill.sampling.")) and not path.endswith(".rate")
    }


def test_every_numeric_field_has_a_range():
    paths = {path.replace(".own.", ".*.") for path in numeric_fields()} | {"ema.profiles"}
    assert paths - FREE == set(bounds.BOUNDS)


def with_value(path: str, value: object) -> Config:
    values = dataclasses.asdict(Config(data=DataConfig(mixture={"own": ComponentConfig()})))
    *parents, leaf = path.replace(".*.", ".own.").split(".")
    node = values
    for name in parents:
        node = node[name]
    whole = type(node[leaf]) is int
    if isinstance(node[leaf], tuple):
        node[leaf] = (value,) * max(len(node[leaf]), 1)
    else:
        node[leaf] = int(value) if whole and value == value // 1 else float(value)
    return overrides.from_dict(Config, values)


@pytest.mark.parametrize("path", sorted(bounds.BOUNDS))
def test_below_and_above_the_range(path):
    bound = bounds.BOUNDS[path]
    tuples = path in ("model.channels", "model.num_res_blocks")
    lower = [int(bound.low) - 1, -(10**6)]
    if bound.open_low:
        lower.append(0 if path != "ema.profiles" else 0.0)
    if bound.high < float("inf"):
        lower.append(int(bound.high) + 1)
    for value in lower:
        given = value if tuples or isinstance(getattr_path(path), int) else float(value)
        with pytest.raises(ConfigError, match=r"config\.") as error:
            with_value(path, given)
        assert "must " in str(error.value) and "\n" not in str(error.value)


def getattr_path(path: str) -> object:
    return numeric_fields().get(path.replace(".*.", ".own."), 0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "path",
    ["optimizer.learning_rate", "diffusion.logsnr_shift", "ema.decay", "data.max_quarantined"],
)
def test_nan_and_infinities_are_refused(path, value):
    with pytest.raises(ConfigError, match=f"config.{path}={value} must be"):
        with_value(path, value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.steps=-5", "config.train.steps=-5 must be at least 1"),
        ("train.steps=0", "config.train.steps=0 must be at least 1"),
        ("train.log_every=0", "config.train.log_every=0 must be at least 1"),
        ("train.accumulation=-2", "config.train.accumulation=-2 must be at least 1"),
        ("checkpoint.keep=0", "config.checkpoint.keep=0 must be at least 1"),
        ("checkpoint.every=-1", "config.checkpoint.every=-1 must be at least 1"),
        ("optimizer.learning_rate=-1e-4", "config.optimizer.learning_rate=-0.0001 must be above 0"),
        ("diffusion.cond_drop_prob=1.5", "must be at least 0 and at most 1"),
        ("model.dropout=1.0", "config.model.dropout=1.0 must be at least 0 and below 1"),
        ("ema.decay=-0.9", "config.ema.decay=-0.9 must be at least 0 and at most 1"),
        ("data.max_quarantined=2.0", "config.data.max_quarantined=2.0 must be at least 0 and"),
        ("data.image_size=-64", "config.data.image_size=-64 must be at least 1"),
        ("seed=-1", "config.seed=-1 must be at least 0 and at most 4294967295"),
        ("mesh.data=-2", "config.mesh.data=-2 must be at least 1, or -1"),
        ("pretrain_text.steps=-1", "config.pretrain_text.steps=-1 must be at least 1"),
        ("diffusion.logsnr_min=30.0", "must be below config.diffusion.logsnr_max=20.0"),
    ],
)
def test_train_refuses_and_leaves_no_workdir(override, says, tmp_path, capsys):
    command = ["train", "--config=configs/shapes.py:base", f"--workdir={tmp_path}/run"]
    assert main.main([*command, f"--config.{override}"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and says in lines[0]
    assert not (tmp_path / "run").exists()
