"""Compile time of a train step against the number of residual blocks; and of a scan over them.

    python benchmarks/compile_time.py [--blocks=3,6,12] [--channels=32]
    python benchmarks/compile_time.py --topology=v5e-4 --blocks=2,8 --channels=512 [--exact]

Compiles the train step of a small U-Net of two levels for the local device. With --topology: the
gradient of the equal residual blocks of one level of an SR stage for one chip, one after the other
and as a scan that stacks their parameters. Compile time is XLA's, in processor seconds, which other
programs affect little; the number of operations in the program measures its size. Prints one JSON
line and a table.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp

from imagen_jax.config.data import DataConfig
from imagen_jax.config.schema import Config, ModelConfig
from imagen_jax.models import layers
from imagen_jax.parallel import partitioning
from imagen_jax.parallel.topology import open_slice
from imagen_jax.planning import plan
from imagen_jax.stages.network import init_params
from imagen_jax.training.optimizer import make_optimizer
from imagen_jax.training.state import create_state
from imagen_jax.training.step import make_train_step


def config_of(blocks: int, channels: int) -> Config:
    """A U-Net of two levels at 16 pixels with `blocks` residual blocks per level."""
    model = ModelConfig(
        channels=(channels, 2 * channels),
        num_res_blocks=(blocks, blocks),
        self_attention=(False, True),
        cross_attention=(False, True),
        head_dim=channels,
        num_groups=8,
        text_dim=16,
    )
    return Config(model=model, data=DataConfig(image_size=16, batch_size=2, max_text_len=8))


def measure(blocks: int, channels: int) -> dict[str, float]:
    """Processor seconds of tracing and of compiling, and the number of operations."""
    config = config_of(blocks, channels)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    params = jax.eval_shape(lambda: partitioning.unbox(init_params(config, jax.random.key(0))))
    state = jax.eval_shape(lambda p: create_state(p, optimizer), params)
    data = config.data
    batch = {
        "image": (data.batch_size, data.image_size, data.image_size, 3),
        "text_emb": (data.batch_size, data.max_text_len, config.model.text_dim),
        "text_mask": (data.batch_size, data.max_text_len),
    }
    dtypes = {"text_mask": jnp.bool_}
    shapes = {
        name: jax.ShapeDtypeStruct(shape, dtypes.get(name, jnp.float32))
        for name, shape in batch.items()
    }
    step = jax.jit(make_train_step(config, optimizer))
    started = time.process_time()
    lowered = step.lower(state, shapes)
    traced = time.process_time()
    lowered.compile(compiler_options=partitioning.train_step_options())
    compiled = time.process_time()
    return {
        "blocks": blocks,
        "trace_s": round(traced - started, 1),
        "compile_s": round(compiled - traced, 1),
        "operations": lowered.as_text().count(" = "),
    }


def measure_level(
    blocks: int, *, channels: int, scanned: bool, topology: str, exact: bool
) -> dict[str, float | bool]:
    """Processor seconds of compiling the equal blocks of a level, and memory.

    Args:
      blocks: number of blocks.
      channels: their width; 8 images have 16,384 / `channels` pixels on a side, as in sr_256.
      scanned: whether they are a scan over their stacked parameters.
      topology: a TPU slice, of which one chip is used.
      exact: whether to compile as for a run, not quickly.
    """
    chip = jax.sharding.SingleDeviceSharding(open_slice(topology).devices[0])
    config = ModelConfig(dtype="bfloat16")
    block = layers.ResBlock(config, channels, always_project=True)
    side = 16_384 // channels

    def on_chip(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=chip)

    x = on_chip((8, side, side, channels), jnp.bfloat16)
    embedding = on_chip((8, 4 * channels), jnp.bfloat16)
    made = jax.eval_shape(block.init, jax.random.key(0), x, embedding)
    params = jax.tree.map(lambda p: on_chip(p.shape, p.dtype), partitioning.unbox(made))

    def loss(each: list[Any], x: Any, embedding: jax.Array) -> jax.Array:
        if scanned:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
            x, _ = jax.lax.scan(lambda x, p: (block.apply(p, x, embedding), None), x, stacked)
        else:
            for p in each:
                x = block.apply(p, x, embedding)
        return jnp.sum(jnp.square(x.astype(jnp.float32)))

    lowered = jax.jit(jax.value_and_grad(loss)).lower([params] * blocks, x, embedding)
    options: dict[str, Any] = {} if exact else dict(plan.QUICK)
    begin = time.process_time()
    compiled = lowered.compile(options)
    seconds = time.process_time() - begin
    memory: Any = compiled.memory_analysis()
    return {
        "blocks": blocks,
        "scanned": scanned,
        "compile_s": round(seconds, 1),
        "memory_mib": round((memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20),
        "operations": lowered.as_text().count(" = "),
    }


def compare(flags: argparse.Namespace) -> None:
    """Prints the compile times of each number of blocks, in turn and scanned."""
    print("| blocks | scanned | operations | compile s | temporaries and results, MiB |")
    print("|---|---|---|---|---|")
    rows = []
    for blocks in map(int, flags.blocks.split(",")):
        for scanned in (False, True):
            row = measure_level(
                blocks,
                channels=flags.channels,
                scanned=scanned,
                topology=flags.topology,
                exact=flags.exact,
            )
            rows.append(row)
            print(
                f"| {blocks} | {'yes' if scanned else 'no'} | {row['operations']:,} "
                f"| {row['compile_s']} | {row['memory_mib']} |",
                flush=True,
            )
    print(json.dumps({"topology": flags.topology, "exact": flags.exact, "rows": rows}))


def main() -> None:
    """Measures each number of blocks and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", default="3,6,12", help="residual blocks per level")
    parser.add_argument("--channels", type=int, default=32, help="width of the first level")
    parser.add_argument("--topology", default="", help="a TPU slice: compares with a scan")
    parser.add_argument("--exact", action="store_true", help="with --topology: as for a run")
    flags = parser.parse_args()
    if flags.topology:
        compare(flags)
        return
    rows = [measure(int(blocks), flags.channels) for blocks in flags.blocks.split(",")]
    print(json.dumps({"device": jax.devices()[0].device_kind, "rows": rows}))
    print("| res blocks | operations | trace s | compile s | growth beyond the work |")
    print("|---|---|---|---|---|")
    for before, row in zip([None, *rows], rows, strict=False):
        growth = "-"
        if before:
            work = row["operations"] / before["operations"]
            growth = f"{row['compile_s'] / before['compile_s'] / work:.2f}"
        print(
            f"| {row['blocks']} | {row['operations']:,} | {row['trace_s']} | {row['compile_s']} "
            f"| {growth} |"
        )


if __name__ == "__main__":
    main()
