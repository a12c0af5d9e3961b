"""Exports and loads a stage of 2 GB; says how much memory that took.

    python tests/reference/export_memory.py write|export|load WORKDIR OUT

`write` saves a checkpoint of random parameters. `export` is `imagen export`; `load` loads the
stage folder and samples an image. Both print the bytes by which the process's own memory grew at
most after its imports. Pages mapped from files are not counted, as the system takes them back.
"""

import math
import os
import pathlib
import re
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.cli import main as cli
from imagen_jax.config.data import DataConfig
from imagen_jax.config.sampling import SamplingConfig
from imagen_jax.config.schema import Config, ModelConfig
from imagen_jax.config.train import CheckpointConfig
from imagen_jax.inference.cascade import Cascade
from imagen_jax.parallel import partitioning
from imagen_jax.stages import network
from imagen_jax.stages.folder import MAX_SHARD_BYTES
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.state import TrainState

LIMIT = MAX_SHARD_BYTES + 2 * 10**9
CONFIG = Config(
    name="base",
    data=DataConfig(image_size=8, batch_size=1, max_text_len=4),
    model=ModelConfig(
        name="efficient_unet",
        channels=(512, 1024),
        num_res_blocks=(10, 10),
        self_attention=(False, False),
        cross_attention=(False, False),
        strided_stem=(False, True),
        head_dim=64,
        num_groups=32,
        embed_dim=16,
        text_dim=8,
    ),
    sampling=SamplingConfig(sampler="ddim", steps=1, guidance_weight=1.0),
)


def write(workdir: pathlib.Path) -> None:
    """A checkpoint whose average is the stage; nothing else of it is read."""
    rng = np.random.default_rng(0)

    def values(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale = 1 / math.sqrt(max(1, math.prod(leaf.shape[:-1])))
        return jnp.asarray(rng.normal(size=leaf.shape) * scale, jnp.float32)

    average = jax.tree.map(values, partitioning.unbox(network.boxed_shapes(CONFIG)))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(average))
    assert 1.9e9 < size < 2.1e9, size
    zero, none = jnp.zeros((), jnp.int32), {"none": jnp.zeros(1)}
    state = TrainState(step=zero, params=none, ema={"ema": average}, opt_state=none, skipped=zero)
    checkpoints = Checkpoints(str(workdir), CheckpointConfig(), access="write")
    checkpoints.save(1, state, CONFIG)
    checkpoints.wait()
    checkpoints.close()


def held() -> int:
    """This process's own memory, bytes."""
    text = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", text)[1])


class Peak:
    """The largest own memory so far, read every few milliseconds."""

    def __init__(self):
        self.bytes, self._done = 0, threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, held())

    def stop(self) -> int:
        self._done.set()
        return self.bytes


def main() -> int:
    action, workdir, out = sys.argv[1:]
    if action == "write":
        write(pathlib.Path(workdir))
        return 0
    jax.block_until_ready(jnp.zeros(1))  # The backend's threads exist.
    before, peak = held(), Peak()
    if action == "export":
        status = cli.main(["export", f"--workdir={workdir}", f"--out={out}"])
    else:
        cascade = Cascade.load([out], text_encoder=None)
        text = np.zeros((1, 4, 8), np.float32)
        images = cascade.sample(text_emb=text, text_mask=np.ones((1, 4), bool))
        status = int(images.shape != (1, 8, 8, 3))
    print(f"{peak.stop() - before} bytes of {LIMIT}")
    return status


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
