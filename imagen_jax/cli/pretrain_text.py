"""Trains a SentencePiece vocabulary and a small T5 encoder on captions or a text corpus."""

from __future__ import annotations

import argparse

from imagen_jax.cli import path_flags, wiring
from imagen_jax.data.sources.registry import open_source
from imagen_jax.parallel import host_memory
from imagen_jax.training import pretrain_text as pretrain_text_lib
from imagen_jax.training import text_corpus


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    wiring.add_config(parser)
    path_flags.required(parser, "--out", "encoder folder to write", bucket="write")


def run(flags: argparse.Namespace) -> None:
    """Runs the verb."""
    config = wiring.load_config(flags)
    host_memory.keep_freed()
    settings = config.pretrain_text
    if settings.corpus:
        groups = text_corpus.read(settings.corpus, settings.max_groups)
    else:
        source = open_source(config.data)
        groups = [source.captions(i) for i in range(min(len(source), settings.max_groups))]
    pretrain_text_lib.pretrain_text(
        groups, settings, flags.out, seed=config.seed, max_len=config.text.max_len
    )
