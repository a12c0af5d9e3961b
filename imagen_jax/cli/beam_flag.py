"""The flag --beam_options of `prepare` and `embed`: work over all records by Apache Beam."""

from __future__ import annotations

import argparse
import dataclasses

from imagen_jax.config.data import DataConfig
from imagen_jax.data.beam import index
from imagen_jax.data.index import duplicates
from imagen_jax.data.sources.registry import open_source


def add(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds the flag; `what`: the work that a pipeline does."""
    parser.add_argument(
        "--beam_options",
        default="",
        metavar="NAME=VALUE[,...]",
        help=f"{what} by an Apache Beam pipeline with these options, as of TFDS, such as "
        "runner=FlinkRunner,flink_master=HOST:8081; the result is the same",
    )


def build_index(data: DataConfig, options: str, *, repeats: bool = False) -> None:
    """Builds the indexes of all sources, and which records `data.unique` leaves out.

    Args:
      data: the sources.
      options: of Beam.
      repeats: also find the duplicates of every kind.

    Raises:
      ConfigError: see `beam.pipeline.run`; a source is in a bucket.
    """
    sources = list(data.sources().values()) if data.mixture else [data]
    index.check_address(*(source.path for source in sources))
    every = {name: dataclasses.replace(source, unique="") for name, source in data.mixture.items()}
    open_source(
        dataclasses.replace(data, unique="", mixture=every),
        lambda line: None,
        share=index.sharing(options),
    )
    for source in sources:
        if source.unique:
            plain = dataclasses.replace(source, unique="")
            index.find_duplicates(plain, source.unique, options)
        for kind in duplicates.KINDS if repeats else ():
            index.find_duplicates(source, kind, options)
