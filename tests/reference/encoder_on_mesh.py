"""Loads a T5 in bfloat16 on eight virtual CPU devices: peak memory of loading, and its outputs.

A separate program, because the number of devices is fixed when JAX starts and peak memory is
measured per process. Prints a JSON object.
"""

import json
import pathlib
import sys

import jax
import numpy as np

from imagen_jax.config.schema import MeshConfig
from imagen_jax.config.text import TextConfig
from imagen_jax.parallel import partitioning
from imagen_jax.text.encoders import load_text_encoder


def peak() -> int:
    """Largest resident memory of this process so far, bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    config = TextConfig(encoder="bytes", path=sys.argv[1], dtype="bfloat16", max_len=16)
    mesh = partitioning.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    encoder = load_text_encoder(config, mesh)
    # Initialises the devices, so that their buffers and threads are not counted.
    jax.block_until_ready(jax.device_put(np.zeros((8, 8)), partitioning.replicated(mesh)))
    before = peak()
    leaves = jax.tree.leaves(encoder.params)
    grown = peak() - before

    batch = encoder.tokenize(["a red circle", "two small crosses", "", "blue"] * 2)
    encoded = encoder.encode(batch.ids, batch.mask)
    alone = load_text_encoder(config).encode(batch.ids, batch.mask)
    on_one = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    print(
        json.dumps(
            {
                "bytes": sum(leaf.nbytes for leaf in leaves),
                "bytes_per_device": on_one,
                "grown": grown,
                "dtypes": sorted({str(leaf.dtype) for leaf in leaves}),
                "rows_per_device": encoded.addressable_shards[0].data.shape[0],
                "error": float(np.abs(np.asarray(encoded) - np.asarray(alone)).max()),
                "scale": float(np.std(np.asarray(alone)[batch.mask])),
            }
        )
    )


if __name__ == "__main__":
    main()
