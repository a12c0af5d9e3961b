"""Settings of the whole suite, and the tiny stages its tests train, sample and split."""

import json
import os
import pathlib

# Read once, when JAX and TensorFlow are imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from imagen_jax import partitioning, stage
from imagen_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)
from imagen_jax.data import embeddings

SIZE, LENGTH, DIM = 8, 4, 8

BASE = Config(
    name="base",
    data=DataConfig(image_size=SIZE, batch_size=4, max_text_len=LENGTH),
    model=ModelConfig(
        name="efficient_unet",
        channels=(8,),
        num_res_blocks=(1,),
        self_attention=(True,),
        cross_attention=(True,),
        strided_stem=(False,),
        head_dim=8,
        num_groups=4,
        embed_dim=16,
        text_dim=DIM,
    ),
    diffusion=DiffusionConfig(prediction="x0", loss_weight="truncated_v"),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=0),
    train=TrainConfig(steps=6, log_every=1),
    checkpoint=CheckpointConfig(every=2),
    sampling=SamplingConfig(sampler="ddim", steps=4, guidance_weight=2.0),
)
SR = dataclasses.replace(
    BASE,
    name="sr",
    data=dataclasses.replace(BASE.data, image_size=2 * SIZE, lowres_size=SIZE),
    model=dataclasses.replace(BASE.model, lowres=True, patch_size=2),
    sampling=dataclasses.replace(BASE.sampling, aug_level=0.1),
)


@pytest.fixture(scope="session", autouse=True)
def quick_compilation(tmp_path_factory):
    """Tiny models run in no time: what the suite waits for is the compiler."""
    base = tmp_path_factory.getbasetemp()
    # The workers of pytest-xdist have folders side by side and compile the same programs.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", str(shared / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def base_config() -> Config:
    """The tiny base stage: 8x8 pictures, 4 text tokens of width 8."""
    return BASE


@pytest.fixture(scope="session")
def sr_config() -> Config:
    """The tiny super-resolution stage, 8 -> 16."""
    return SR


@pytest.fixture(scope="session")
def make_batch():
    """(config, seed) -> one batch of random pictures and text of 1..4 tokens."""

    def make(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        n, size = config.data.batch_size, config.data.image_size
        length, dim = config.data.max_text_len, config.model.text_dim
        batch = {
            "image": rng.uniform(-1, 1, (n, size, size, 3)).astype(np.float32),
            "text_emb": rng.normal(size=(n, length, dim)).astype(np.float32),
            "text_mask": np.arange(length) <= (np.arange(n) % length)[:, None],
        }
        if config.data.lowres_size:
            low = config.data.lowres_size
            batch["lowres"] = rng.uniform(-1, 1, (n, low, low, 3)).astype(np.float32)
        return batch

    return make


@pytest.fixture(scope="session")
def random_params():
    """config -> parameters none of which is zero, so that every path of the network counts."""

    def make(config: Config, seed: int = 0):
        shapes = jax.eval_shape(lambda: stage.init_params(config, jax.random.key(0)))
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda leaf: (
                rng.normal(size=leaf.shape) / max(np.prod(leaf.shape[:-1]), 4) ** 0.5
            ).astype(np.float32),
            partitioning.unbox(shapes),
        )

    return make


CONFIG_FILE = """
from imagen_jax import config_io

def get_config(name=""):
    return config_io.to_config_dict(config_io.from_json('''{json}'''))
"""


@pytest.fixture(scope="session")
def write_world():
    """Makes a folder of 12 pictures, their embeddings and a configuration file for `train`."""

    def write(folder: pathlib.Path, config: Config, steps: int, every: int) -> pathlib.Path:
        rng = np.random.default_rng(0)
        pictures = folder / "pictures"
        pictures.mkdir()
        captions = [f"picture {i}" for i in range(12)]
        for i, caption in enumerate(captions):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(pictures / f"{i}.png")
            (pictures / f"{i}.txt").write_text(caption)
        store = folder / "embeddings"
        store.mkdir()
        vectors = [rng.normal(size=(3, DIM)).astype(ml_dtypes.bfloat16) for _ in captions]
        unit = store / embeddings.unit_name(captions, encoder="fake")
        embeddings.write_unit(unit, captions, vectors)
        description = {"encoder": "fake", "max_len": LENGTH}
        embeddings.write_manifest(store, [embeddings.describe_unit(unit)], description)
        data = dataclasses.replace(
            config.data,
            kind="folder",
            path=str(pictures),
            embeddings=str(store),
            loader="numpy",
            max_quarantined=0.5,
        )
        config = dataclasses.replace(
            config,
            data=data,
            train=TrainConfig(steps=steps, log_every=1),
            checkpoint=CheckpointConfig(every=every),
        )
        path = folder / "tiny.py"
        path.write_text(CONFIG_FILE.format(json=json.dumps(dataclasses.asdict(config))))
        return path

    return write
