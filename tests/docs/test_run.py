"""Runs the commands of the pages that are marked `run`, unchanged, with tiny configurations.

They run in a folder with the repository's scripts, in which `configs/shapes.py` and
`configs/folder.py` wrap the real ones with smaller networks and fewer steps. The quick start runs
first; the other pages use its results.
"""

import json
import os
import pathlib
import stat
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.reference import pages
from tests.reference.pages import ALL, ROOT, Block

pytestmark = pytest.mark.slow

FIRST = "docs/quickstart.md"
RUN = [b for b in ALL if b.kind == "run"]
# Precedes blocks of Python, some of which are part of a configuration file's `get_config`.
PRELUDE = """
from imagen_jax.config import overrides
from imagen_jax.config.schema import Config
c = overrides.to_config_dict(Config())
"""
TINY = """
import importlib.util


def get_config(name="base"):
    spec = importlib.util.spec_from_file_location("real", {real!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config(name)
    c.model.channels = (8,) * len(c.model.channels)
    c.model.head_dim, c.model.num_groups, c.model.embed_dim = 8, 4, 16
    c.data.batch_size, c.data.loader = 4, "numpy"
    c.pretrain_text.steps, c.pretrain_text.max_groups = 2, 200
    c.pretrain_text.emb_dim, c.pretrain_text.num_layers = 16, 1
    c.pretrain_text.num_heads, c.pretrain_text.mlp_dim = 2, 16
    # The learning rate does not depend on the number of steps, so runs can be extended.
    c.optimizer.schedule, c.optimizer.decay_fraction = "constant", None
    c.train.steps, c.train.log_every, c.checkpoint.every = 6, 1, 3
    c.mesh.cpu_devices = 1
    c.sampling.steps = 2
    if c.data.kind == "tfds":
        c.data.split = "seen_test"
    return c
"""


def write_world(folder: pathlib.Path) -> None:
    """Writes scripts, tiny configurations, images and prompts."""
    for name in ("launch", "benchmarks", "constraints.txt", "imagen_jax"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.py"):
        target = folder / "configs" / path.name
        if path.stem in ("shapes", "folder"):
            target.write_text(TINY.format(real=str(path)))
        else:
            target.symlink_to(path)
    python = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    scripts = {".venv/bin/python": python, "bin/python": python}
    scripts["bin/imagen"] = f'#!/bin/sh\nexec {sys.executable} -m imagen_jax "$@"\n'
    for name, text in scripts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    rng = np.random.default_rng(0)
    (folder / "my_images").mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (70, 70, 3), np.uint8)).save(
            folder / "my_images" / f"{i}.png"
        )
        (folder / "my_images" / f"{i}.txt").write_text(f"image {i}")
    for name, side in (("mine", 64), ("small", 16)):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(
            folder / f"{name}.png"
        )
    mask = np.zeros((64, 64), np.uint8)
    mask[32:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    (folder / "prompts.csv").write_text("prompt,category\na red circle,one\ntwo squares,two\n")


def script_of(block: Block) -> str:
    """A block of shell, after the variables that earlier blocks of its page set."""
    before = [b for b in ALL if b.page == block.page and b.line < block.line]
    variables = [pages.settings(b.code) for b in before if b.language == "bash"]
    return "\n".join(
        ["set -euo pipefail", 'imagen=".venv/bin/python -m imagen_jax"', *variables, block.code]
    )


def perform(block: Block, world: pathlib.Path) -> None:
    """Runs a block unchanged."""
    command = ["bash", "-c", script_of(block)]
    if block.language == "python":
        command = [sys.executable, "-c", PRELUDE + block.code]
    done = subprocess.run(
        command,
        cwd=world,
        env={
            **os.environ,
            "PATH": f"{world / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(world / "xla"),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> pathlib.Path:
    """The folder after the quick start."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    for block in RUN:
        if block.page == FIRST:
            perform(block, folder)
    rows = (folder / "runs/demo/samples/samples.jsonl").read_text().splitlines()
    assert len([json.loads(row) for row in rows]) == 16
    (folder / "runs/alignment.json").write_bytes((folder / "runs/demo/alignment.json").read_bytes())
    # Other folder names in the pages stand for the same stages.
    (folder / "stages").symlink_to("runs/demo/stages")
    (folder / "runs/mine").mkdir()
    (folder / "runs/mine/stages").symlink_to("../demo/stages")
    (folder / "runs/base").symlink_to("demo/base")
    return folder


OTHERS = [b for b in RUN if b.page not in (FIRST, "docs/extending.md")]


@pytest.mark.parametrize("block", OTHERS, ids=str)
def test_a_block_of_the_pages(block, world):
    perform(block, world)
