"""Trains one stage; the same command again resumes from the newest checkpoint.

SIGTERM saves and exits with status 75: run the same command again. A run that hangs, or whose other
processes are lost, exits with status 75, too. SIGUSR1 writes a profile.
Several processes: see launch/, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os

import jax

from imagen_jax.cli import changed_data, path_flags, wiring
from imagen_jax.cli.evaluators import make_evaluators
from imagen_jax.data.batches import loaders
from imagen_jax.data.sources.registry import open_source
from imagen_jax.io import mirrors
from imagen_jax.parallel import distributed, host_memory
from imagen_jax.parallel.preemption import Preemption
from imagen_jax.training.teacher import add_teacher, with_teacher
from imagen_jax.training.train import train, with_data
from imagen_jax.training.watchdog import restartable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    wiring.add_config(parser)
    path_flags.required(parser, "--workdir", "folder of the run", bucket="run")
    parser.add_argument(
        "--allow_changes",
        metavar="FIELD[,FIELD...]",
        default="",
        help="fields or sections of the configuration that may differ from the checkpoint's",
    )
    path_flags.optional(
        parser,
        "--compiled",
        "compiled step of `imagen plan --save=FILE`; it is executed as it is, so load only "
        "files you trust",
        metavar="FILE",
    )


def run(flags: argparse.Namespace) -> None:
    """Runs the verb."""
    with Preemption() as preemption, restartable():
        config = wiring.load_config(flags)
        distributed.initialize(heartbeat_timeout=config.train.heartbeat_timeout)
        keep_compiled(flags.workdir)
        host_memory.keep_freed()
        allowed = [name for name in flags.allow_changes.split(",") if name]
        source = open_source(config.data)
        changed_data.check(config, source, flags.workdir, allowed)
        pipeline = wiring.open_pipeline(config, source)
        store = pipeline.store
        config = with_data(config, store.dim, store.fingerprint, pipeline.fingerprint())
        data = dataclasses.replace(config.data, records=source.fingerprint)
        config = dataclasses.replace(config, data=data)
        config = with_teacher(config)
        changed_data.check_lines(config, flags.workdir, allowed)
        train(
            config,
            flags.workdir,
            functools.partial(loaders.batches, pipeline),
            allow_changes=allowed,
            step_info=pipeline.step_info,
            encode=add_teacher(config, pipeline.encode),
            preemption=preemption,
            compiled_step=flags.compiled,
            evaluators=make_evaluators(config, pipeline, flags.workdir),
        )


def keep_compiled(workdir: str) -> None:
    """Sets JAX's compilation cache to WORKDIR/compiled unless the user has set one.

    That of a workdir in a bucket is in the user's cache.
    """
    folder = mirrors.home().parent if mirrors.origin(workdir) else workdir
    # JAX defines the attributes of its configuration at run time.
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "compiled"))
