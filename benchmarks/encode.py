"""Throughput of a T5 encoder by caption length.

    python benchmarks/encode.py [--preset=t5_v1_1_small] [--batch=32] [--dtype=float32]

Uses random weights of a public architecture on all devices. For each length to which `embed` pads:
captions/s, tokens/s, and FLOP/s by `t5.flops`, without compilation. Prints a table and one JSON
line.
"""

import argparse
import dataclasses
import json
import time

import jax
import numpy as np

from imagen_jax.config.schema import MeshConfig
from imagen_jax.models import t5
from imagen_jax.parallel import partitioning
from imagen_jax.text.frozen_encoder import encode_tokens

LENGTHS = (8, 16, 32, 64, 128)
SECONDS = 3.0  # Minimum measured time per length, after the first call.


def measure(params, config, mesh, batch, length):
    """Calls per second."""
    sharding = partitioning.batch_sharding(mesh)
    rng = np.random.default_rng(0)
    ids = rng.integers(2, config.vocab_size, (batch, length)).astype(np.int32)
    ids, mask = jax.device_put((ids, np.ones(ids.shape, bool)), sharding)

    def encode():
        return encode_tokens(params, ids, mask, config=config, sharding=sharding)

    jax.block_until_ready(encode())
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        jax.block_until_ready(encode())
        calls += 1
    return calls / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="t5_v1_1_small", choices=t5.T5_PRESETS)
    parser.add_argument("--batch", type=int, default=32, help="captions per call")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--fsdp", type=int, default=1)
    flags = parser.parse_args()
    config = dataclasses.replace(t5.T5_PRESETS[flags.preset], dtype=flags.dtype)
    mesh = partitioning.make_mesh(MeshConfig(fsdp=flags.fsdp))
    partitioning.check_batch_size(flags.batch, mesh)

    def init():
        params = partitioning.unbox(t5.init_params(config, jax.random.key(0)))
        return jax.tree.map(lambda leaf: leaf.astype(flags.dtype), params)

    shardings = partitioning.param_shardings(t5.boxed_shapes(config), mesh)
    params = jax.jit(init, out_shardings=shardings)()
    devices = f"{mesh.size} {jax.devices()[0].device_kind}"
    print(f"{flags.preset} in {flags.dtype}, {flags.batch} captions per call, {devices}")
    print(f"{'tokens':>6} {'captions/s':>11} {'tokens/s':>9} {'GFLOP/s':>8}")
    rows = []
    for length in LENGTHS:
        captions = flags.batch * measure(params, config, mesh, flags.batch, length)
        flops = captions * t5.flops(config, length)
        rows.append({"length": length, "captions_per_second": captions, "flops": flops})
        print(f"{length:>6} {captions:>11.1f} {captions * length:>9.0f} {flops / 1e9:>8.1f}")
    print(json.dumps({**vars(flags), "devices": devices, "rows": rows}))


if __name__ == "__main__":
    main()
