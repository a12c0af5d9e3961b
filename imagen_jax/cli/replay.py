"""Replays a training step with non-finite loss: `imagen replay --workdir=DIR --step=N`."""

from __future__ import annotations

import argparse
import functools

from imagen_jax.cli import path_flags, wiring
from imagen_jax.config.train import CheckpointConfig
from imagen_jax.data.batches import loaders
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.replay import replay
from imagen_jax.training.teacher import add_teacher


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    path_flags.required(parser, "--workdir", "folder of the run", bucket="run")
    parser.add_argument("--step", required=True, type=int, help="step saved in WORKDIR/faults")


def run(flags: argparse.Namespace) -> None:
    """Runs the verb."""
    config = Checkpoints(flags.workdir, CheckpointConfig()).newest_config()
    wiring.set_up_devices(config.mesh.cpu_devices)
    pipeline = wiring.open_pipeline(config)
    batches = functools.partial(loaders.batches, pipeline)
    replay(config, flags.workdir, flags.step, batches, encode=add_teacher(config, pipeline.encode))
