"""Compile time of a train step against the number of residual blocks.

    python benchmarks/compile_time.py [--blocks=3,6,12] [--channels=32]

Compiles the train step of a small U-Net of two levels for the local device. Compile time is XLA's,
in processor seconds, which other programs affect little; the number of operations in the program
measures its size. Prints one JSON line and a table.
"""

from __future__ import annotations

import argparse
import json
import time

import jax
import jax.numpy as jnp

from imagen_jax.config.data import DataConfig
from imagen_jax.config.schema import Config, ModelConfig
from imagen_jax.parallel import partitioning
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


def main() -> None:
    """Measures each number of blocks and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", default="3,6,12", help="residual blocks per level")
    parser.add_argument("--channels", type=int, default=32, help="width of the first level")
    flags = parser.parse_args()
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
