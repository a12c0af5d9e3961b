"""Memory, FLOPs, communication, time and cost of a run on a TPU slice, without the slice.

Compiles the real train step, sampler or text encoder with libtpu (pip install 'imagen_jax[tpu]');
the base model of the paper takes some minutes. Slices have Cloud TPU's names: v4-128 and v5p-128
have 64 chips, v5e-256 has 256. h200-8 is a machine with eight GPUs, for which JAX's CUDA plugin
compiles (pip install 'imagen_jax[cuda]'). --topology=here plans for the devices of this machine.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from imagen_jax.cli import path_flags, wiring
from imagen_jax.cli.sample import read_settings
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.data.embeddings.store import EmbeddingStore
from imagen_jax.data.embeddings.unit_file import EmbeddingError
from imagen_jax.inference.request import with_settings
from imagen_jax.io import atomic
from imagen_jax.parallel import compiled, gpu_targets, partitioning, topology
from imagen_jax.planning import cascade_plan, nearest, plan
from imagen_jax.planning.plan import Plan
from imagen_jax.planning.report import report
from imagen_jax.planning.search import search_batch, search_train
from imagen_jax.training.teacher import with_teacher

STAGES = ("train", "sample", "embed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    wiring.add_config(parser)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="slice or GPUs, such as v5e-256 or h200-8, or here",
    )
    parser.add_argument("--stage", choices=STAGES, default="train", help="the program")
    parser.add_argument(
        "--cascade",
        default="",
        type=path_flags.flag_list,
        metavar="FILE[:NAME][,...]",
        help="sample: the stages after --config; plans them all with the text encoder",
    )
    parser.add_argument(
        "--stage_settings",
        metavar="JSON",
        default="{}",
        help="sample: sampling fields by stage name, as of `imagen sample`",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=0,
        help="images (embed: captions) at a time, over all chips; "
        "default: config.data.batch_size for train, else one per device",
    )
    parser.add_argument(
        "--search", action="store_true", help="find the largest batch, over remat and accumulation"
    )
    parser.add_argument(
        "--exact", action="store_true", help="compile as the run will, 5-20 times slower"
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=None,
        help="share of the peak, 0..1, to assume in place of the predicted time",
    )
    parser.add_argument("--price", type=float, default=None, help="cost of a chip-hour")
    path_flags.optional(
        parser, "--save", "write the compiled step for `train --compiled`", metavar="FILE"
    )
    path_flags.optional(parser, "--json", "write the plan's numbers", metavar="FILE")


def run(flags: argparse.Namespace) -> None:
    """Runs the verb."""
    if flags.mfu is not None and not 0.0 < flags.mfu <= 1.0:
        raise ConfigError(f"--mfu={flags.mfu} must be above 0 and at most 1; try 0.4")
    wiring.check_least(flags, 0, "batch")
    if flags.save and flags.stage != "train":
        raise ConfigError(f"--save={flags.save} needs --stage=train, got --stage={flags.stage}")
    if flags.stage_settings != "{}" and flags.stage != "sample":
        raise ConfigError(f"--stage_settings needs --stage=sample, got --stage={flags.stage}")
    if flags.cascade and (flags.stage != "sample" or flags.search):
        raise ConfigError("--cascade goes with --stage=sample, without --search")
    where, config = _open(flags)
    if flags.stage != "embed":
        config = with_text_dim(config)
    options = {} if flags.exact or flags.topology == "here" else plan.QUICK
    how = "as the run will" if not options else "quickly (--exact: as the run will)"
    if gpu_targets.is_gpu(flags.topology):
        options, how = gpu_targets.COMPILER_OPTIONS, "without tuned kernels"
    if flags.cascade:
        _run_cascade(flags, config, where, options)
        return
    made = _make(flags, config, where, options)
    print(report(made, flags.mfu, flags.price))
    print(f"\ncompiled {how} in {made.compile_seconds:.0f} s")
    numbers = made.as_json()
    if not made.fits and flags.stage == "train" and not flags.search:
        numbers["nearest"] = _nearest(made, options)
    if flags.save:
        _save(made, flags.save)
    if flags.json:
        atomic.write_json(flags.json, numbers)


def _nearest(made: Plan, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Prints the nearest settings with which the step fits; returns them for --json."""

    def compile_plan(config: Config) -> Plan:
        return plan.compile_program(plan.train_program(config, made.slice), made.slice, options)

    found = nearest.nearest(made, compile_plan, print)
    print("\n".join(nearest.report(found)))
    return [change.as_json() for change in found]


def _run_cascade(
    flags: argparse.Namespace, config: Config, where: topology.Slice, options: Mapping[str, Any]
) -> None:
    """Plans the stages of --config and --cascade with their text encoder."""
    specs = [argparse.Namespace(**{**vars(flags), "config": spec}) for spec in flags.cascade]
    configs = [config, *(with_text_dim(wiring.read_config(spec)) for spec in specs)]
    configs = with_settings(configs, read_settings(flags.stage_settings), "--stage_settings")
    batch = flags.batch or len(where.devices)
    made = cascade_plan.plan_cascade(configs, where, batch, options, print)
    print("\n" + cascade_plan.report(made))
    if flags.json:
        atomic.write_json(flags.json, made.as_json())


def _open(flags: argparse.Namespace) -> tuple[topology.Slice, Config]:
    """The slice and the configuration; for a named slice JAX computes on the CPU."""
    if flags.topology == "here":
        config = wiring.load_config(flags)
        return topology.this_machine(), config
    config = wiring.read_config(flags)
    jax.config.update("jax_platforms", "cpu")
    return topology.open_slice(flags.topology), config


def with_text_dim(config: Config) -> Config:
    """The configuration with `model.text_dim`, read from the embedding store if it is 0."""
    if config.model.text_dim:
        return config
    try:
        dim = EmbeddingStore.open(config.data.embeddings).dim
    except EmbeddingError as error:
        raise ConfigError(
            "config.model.text_dim=0 must be the width of the text embeddings, or the store of "
            "config.data.embeddings must exist; "
            f"try --config.model.text_dim=4096 (T5-XXL): {error}"
        ) from error
    return dataclasses.replace(config, model=dataclasses.replace(config.model, text_dim=dim))


def _make(
    flags: argparse.Namespace, config: Config, where: topology.Slice, options: Mapping[str, Any]
) -> Plan:
    """The plan for the flags."""
    if flags.stage == "train":
        if flags.batch:
            data = dataclasses.replace(config.data, batch_size=flags.batch)
            config = dataclasses.replace(config, data=data)
        config = with_teacher(config)
        if flags.search:
            return search_train(config, where, options, print)
        return plan.compile_program(plan.train_program(config, where), where, options)
    program_of = plan.sample_program if flags.stage == "sample" else plan.embed_program
    (config,) = with_settings([config], read_settings(flags.stage_settings), "--stage_settings")
    if flags.search:
        return search_batch(lambda n: program_of(config, where, n), where, options, print)
    batch = flags.batch or len(where.devices)
    return plan.compile_program(program_of(config, where, batch), where, options)


def _save(made: Plan, path: str) -> None:
    """Writes the compiled step."""
    if made.compiled is None:
        raise ConfigError(f"--save={path}: the step does not fit and is not saved")
    config = made.program.config
    mesh = partitioning.make_mesh(config.mesh, made.slice.devices)
    size = compiled.save(path, made.compiled, compiled.identity(config, list(mesh.devices.flat)))
    print(f"saved the compiled step, {size / 1e6:.0f} MB: train --compiled={path}")
