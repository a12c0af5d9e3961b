"""Flags that several verbs share, and what is built from them: devices, source, embeddings."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os

import jax

from imagen_jax.cli import config_help, path_flags
from imagen_jax.config import overrides
from imagen_jax.config.fields import ConfigError
from imagen_jax.config.schema import Config
from imagen_jax.data.batches.pipeline import Pipeline
from imagen_jax.data.embeddings.on_the_fly import TokenSource
from imagen_jax.data.embeddings.store import EmbeddingStore
from imagen_jax.data.sources.records import AnySource
from imagen_jax.data.sources.registry import open_source
from imagen_jax.inference import adapters
from imagen_jax.inference.adapters import LoraSpec
from imagen_jax.io import buckets, paths
from imagen_jax.parallel import partitioning
from imagen_jax.stages.names import check_names
from imagen_jax.text import fingerprints
from imagen_jax.text.encoders import load_text_encoder
from imagen_jax.training.optimizer import with_rule_defaults


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds --config, for `load_config`."""
    config_help.add_config(parser)


def add_stages(parser: argparse.ArgumentParser, *, local: bool = False) -> None:
    """Adds --stages, a chain of stage folders; `local`: no addresses in buckets."""
    parser.add_argument(
        "--stages",
        required=True,
        type=path_flags.flag_list if local else path_flags.input_list,
        metavar="DIR[,DIR...]",
        help="stage folders, base first",
    )


def add_loras(parser: argparse.ArgumentParser) -> None:
    """Adds --loras, for `read_loras`."""
    parser.add_argument(
        "--loras",
        default="",
        type=path_flags.adapter_list,
        metavar="[STAGE=]PATH[@WEIGHT][,...]",
        help="LoRAs by stage name, each a folder of `export --format=lora`, or of diffusers or "
        "peft; those of a stage are added",
    )


def read_loras(flags: argparse.Namespace) -> list[LoraSpec]:
    """The LoRAs of the flags. Raises ConfigError."""
    return [adapters.parse(text) for text in flags.loras or ()]


def add_cpu_devices(parser: argparse.ArgumentParser) -> None:
    """Adds --cpu_devices, for `set_up_devices`."""
    parser.add_argument(
        "--cpu_devices", type=int, default=1, help="CPU devices that share the images"
    )


def check_least(flags: argparse.Namespace, least: int, *names: str) -> None:
    """Raises ConfigError when one of these flags, if the verb has it, is below `least`."""
    for name in names:
        if getattr(flags, name, least) < least:
            raise ConfigError(f"--{name}={getattr(flags, name)} must be at least {least}")


def read_config(flags: argparse.Namespace) -> Config:
    """The configuration of the flags, checked against the schema and the registries."""
    config = with_home(overrides.load(flags.config, flags.overrides))
    check_names(config)
    with_rule_defaults(config.optimizer)
    return config


def with_home(config: Config) -> Config:
    """The configuration with ~ expanded in its paths; `paths.local` expands those of the data.

    Raises:
      PathError: an address of another kind than gs:// and s3://.
    """
    networks = [text.partition("=")[2] for text in config.evaluate.features]
    for name, value in (
        ("pretrain_text.corpus", config.pretrain_text.corpus),
        ("train.init_from", config.train.init_from),
        ("distill.teacher", config.distill.teacher),
        ("evaluate.prompts", config.evaluate.prompts),
        *(("evaluate.features", path) for path in networks),
    ):
        if not buckets.is_address(value):
            paths.local(value, f"config.{name}")
    text = {name: paths.home(getattr(config.text, name)) for name in ("path", "vocabulary")}
    corpus = paths.home(config.pretrain_text.corpus)
    init_from = paths.home(config.train.init_from)
    teacher = paths.home(config.distill.teacher)
    prompts = paths.home(config.evaluate.prompts)
    return dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, **text),
        pretrain_text=dataclasses.replace(config.pretrain_text, corpus=corpus),
        train=dataclasses.replace(config.train, init_from=init_from),
        distill=dataclasses.replace(config.distill, teacher=teacher),
        evaluate=dataclasses.replace(config.evaluate, prompts=prompts),
    )


def load_config(flags: argparse.Namespace) -> Config:
    """The checked configuration of the flags; also sets up the host's devices for it."""
    config = read_config(flags)
    set_up_devices(config.mesh.cpu_devices)
    return config


def set_up_devices(cpu_devices: int) -> None:
    """Splits the host's cores into CPU devices; call before JAX is used.

    Data parallelism over CPU devices replaces threads inside one convolution; on few cores it is
    faster.
    """
    logging.getLogger("absl").setLevel(logging.WARNING)
    if cpu_devices > 1 and (os.cpu_count() or 1) >= cpu_devices:
        jax.config.update("jax_num_cpu_devices", cpu_devices)


def open_pipeline(config: Config, source: AnySource | None = None) -> Pipeline:
    """The batches of `config`: its source joined with its embeddings, the rows of this process.

    The store must come from the encoder of `config.text`; an empty `config.text.path` accepts any
    store. With `config.text.on_the_fly` the encoder replaces the store. `source` is that of
    `config.data`, where it is open already.
    """
    source = source or open_source(config.data)
    store = _open_text(config)
    mesh = partitioning.make_mesh(config.mesh)
    partitioning.check_batch_size(config.data.batch_size, mesh, config.train.accumulation)
    rows = partitioning.batch_rows(mesh, config.data.batch_size)
    return Pipeline(source, store, config.data, config.seed, rows)


def _open_text(config: Config) -> EmbeddingStore | TokenSource:
    if config.text.on_the_fly:
        mesh = partitioning.make_mesh(config.mesh)
        return TokenSource(load_text_encoder(config.text, mesh))
    store = config.data.embeddings
    expected = fingerprints.fingerprint(config.text, store) if config.text.path else None
    return EmbeddingStore.open(store, expected)
