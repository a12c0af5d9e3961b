"""The bundled configuration files: names, one step of each when shrunk, what they depend on."""

import ast
import dataclasses
import functools
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
from imagen_jax.stages.network import init_params
from imagen_jax.training import optimizer, step, train
from imagen_jax.training.state import TrainState, create_state

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*.py"))
# test_imagen_configs.py tests those of the paper.
CONFIGS = [
    f"{path.name}:{name}"
    for path in FILES
    if path.stem != "imagen"
    for name in overrides.names(str(path))
]


def shrunk(config: Config) -> Config:
    """The fields that a step depends on, with every width, count and size at its minimum.

    The last level remains, which has all kinds of layers; tests/models cover several levels.
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
        pooling_heads=min(model.pooling_heads, 2),
        text_width=min(model.text_width, 32),
        num_groups=4,
        embed_dim=16,
        text_dim=8,
        dtype="float32",
    )
    size = model.patch_size * 2**levels
    lowres = size // 2 if config.data.lowres_size else 0
    data = DataConfig(image_size=size, lowres_size=lowres, batch_size=2, max_text_len=4)
    # The same value for all files, so that files with equal networks share one program.
    diffusion = dataclasses.replace(config.diffusion, aug_level_max=0.5)
    return Config(data=data, model=model, diffusion=diffusion, optimizer=config.optimizer)


@functools.cache
def stepped(config: Config, make_batch) -> tuple[TrainState, dict]:
    """State and report after one step; files with equal networks share the compiled step."""
    rule = optimizer.make_optimizer(config.optimizer, 10)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    state = create_state(
        jax.tree.map(
            lambda leaf: np.full(leaf.shape, 0.01, np.float32), partitioning.unbox(params)
        ),
        rule,
    )
    return jax.jit(step.make_train_step(config, rule))(state, make_batch(config))


LARGE = ("folder.py:base_64", "folder.py:sr_256")  # Their steps take long to compile.


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in LARGE else n for n in CONFIGS],
)
def test_configuration_at_full_size_and_shrunk(name, make_batch):
    config = overrides.load(str(ROOT / "configs" / name))
    wide = train.with_data(config, 4096, {}, {})
    shapes = jax.eval_shape(lambda: init_params(wide, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) > 1e5

    state, report = stepped(shrunk(config), make_batch)
    assert np.isfinite(report["loss"]) and report["grad_norm"] > 0
    assert int(state.step) == 1 and int(state.skipped) == 0


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_unknown_name_in_a_bundled_file_lists_the_valid_names(file):
    names = overrides.names(str(file))
    assert names
    with pytest.raises(ConfigError) as error:
        overrides.load(f"{file}:bsae")
    message = str(error.value)
    assert message.startswith(f"--config={file}: name='bsae' is not one of {', '.join(names)}")
    assert "did you mean" in message and "\n" not in message


def test_a_stage_trained_on_crops_samples_whole_images():
    crops = DataConfig(image_size=256, lowres_size=64, crop_from=1024)
    whole = crops.uncropped()
    assert (whole.image_size, whole.lowres_size, whole.crop_from) == (1024, 256, 0)
    assert whole.uncropped() is whole
    for name in ("imagen.py:sr_1024", "shapes.py:sr2"):
        config = overrides.load(str(ROOT / "configs" / name))
        whole = config.data.uncropped()
        assert whole.image_size == 4 * config.data.image_size == 4 * whole.lowres_size
        assert not any(config.model.self_attention) and any(config.model.cross_attention)
        assert config.model.text_conditioning == "cross"
    with pytest.raises(ConfigError, match="crop_from=1000 must be a multiple of.*image_size=256"):
        DataConfig(image_size=256, crop_from=1000)
    with pytest.raises(ConfigError, match="position_embedding=True does not go with .*crop_from"):
        overrides.load(str(ROOT / "configs/shapes.py:sr2"), ["model.position_embedding=True"])


@pytest.mark.parametrize("name", ["folder.py:base", "folder.py:sr", "coco.py:base", "coco.py:sr"])
def test_other_data_do_not_depend_on_the_demo(name):
    config = overrides.load(str(ROOT / "configs" / name))
    assert "runs/demo" not in overrides.to_json(config)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_the_default_loader_or_a_reason(file):
    """seqio is the default input; a file that takes the other loader says why in its docstring."""
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    for name in overrides.names(str(file)):
        loader = overrides.load(f"{file}:{name}").data.loader
        assert loader == "seqio" or "data.loader is numpy" in docstring, name


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_docstrings_say_command_hardware_time_and_result(file):
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    assert re.search(r"^    (python -m imagen_jax|make|bash) ", docstring, re.M)
    for word in ("Hardware", "Time", "esult"):
        assert word in docstring, word


@pytest.mark.parametrize(("name", "weight"), [("base", 1.35), ("sr", 8.0)])
def test_guidance_on_coco_is_the_papers(name, weight):
    assert overrides.load(f"{ROOT / 'configs/coco.py'}:{name}").sampling.guidance_weight == weight
