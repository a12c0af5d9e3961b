"""A preview of training on 8 CPU devices, fsdp=4: python -m tests.reference.sharded_preview OUT

OUT.npz has the grid, OUT.json the memory and the largest all-gather of the sampler.
"""

import dataclasses
import json
import sys

import jax
import numpy as np

from imagen_jax.config.schema import Config, MeshConfig
from imagen_jax.parallel import partitioning
from imagen_jax.stages.network import init_params
from imagen_jax.training import preview
from tests.reference import sharded_cascade

BATCH = 16


def config() -> Config:
    """The super-resolution stage of `sharded_cascade`, on a mesh."""
    return dataclasses.replace(sharded_cascade.configs()[1], mesh=MeshConfig(fsdp=4))


def batch() -> dict[str, np.ndarray]:
    """A batch of random images and text."""
    rng = np.random.default_rng(0)
    length, dim = sharded_cascade.LENGTH, sharded_cascade.DIM
    return {
        "image": rng.uniform(-1, 1, (BATCH, 16, 16, 3)).astype(np.float32),
        "lowres": rng.uniform(-1, 1, (BATCH, 8, 8, 3)).astype(np.float32),
        "text_emb": rng.normal(size=(BATCH, length, dim)).astype(np.float32),
        "text_mask": np.arange(length) < rng.integers(1, length + 1, (BATCH, 1)),
    }


def shapes() -> dict:
    """Shapes of the parameters, boxed with their axis names."""
    return jax.eval_shape(lambda: init_params(config(), jax.random.key(0)))


def main(out: str) -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = partitioning.make_mesh(config().mesh)
    params = jax.device_put(
        sharded_cascade.random_tree(shapes()), partitioning.param_shardings(shapes(), mesh)
    )
    found: list[dict] = []
    preview.sample_stage = sharded_cascade.Recorded("sample", preview.sample_stage, found)
    grid = preview.sampled_grid(config(), [params], partitioning.place_batch(batch(), mesh))
    np.savez(f"{out}.npz", grid=grid)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    with open(f"{out}.json", "w") as file:
        json.dump({"programs": found, "largest_layer": largest, "total": total}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
