"""Trains a SentencePiece vocabulary and a small T5 encoder on the captions of a data set alone."""

from __future__ import annotations

import argparse

from imagen_jax import pretrain_text as pretrain_text_lib
from imagen_jax.cli import wiring
from imagen_jax.data.index import open_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    wiring.add_config(parser)
    parser.add_argument("--out", required=True, help="encoder folder to write")


def run(flags: argparse.Namespace) -> None:
    """Carries the verb out."""
    config = wiring.load_config(flags)
    source = open_source(config.data)
    captions = [text for i in range(len(source)) for text in source.captions(i)]
    pretrain_text_lib.pretrain_text(
        captions[: config.pretrain_text.max_captions],
        config.pretrain_text,
        flags.out,
        seed=config.seed,
        max_len=config.text.max_len,
    )
