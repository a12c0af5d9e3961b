"""Computes the text embeddings of a data set's captions, once, into `config.data.embeddings`."""

from __future__ import annotations

import argparse

from imagen_jax import embed as embed_lib
from imagen_jax.cli import wiring
from imagen_jax.config import ConfigError
from imagen_jax.data.index import open_source
from imagen_jax.text import load_text_encoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    wiring.add_config(parser)
    parser.add_argument(
        "--estimate", action="store_true", help="count captions, tokens and bytes, write nothing"
    )


def run(flags: argparse.Namespace) -> None:
    """Carries the verb out."""
    config = wiring.load_config(flags)
    source = open_source(config.data)
    captions = [text for i in range(len(source)) for text in source.captions(i)]
    encoder = load_text_encoder(config.text)
    if flags.estimate:
        for name, value in embed_lib.estimate(captions, encoder).items():
            print(f"{name:>16}: {value:,}")
        return
    if not config.data.embeddings:
        raise ConfigError("config.data.embeddings='' must name the folder of the store to write")
    embed_lib.embed(captions, encoder, config.data.embeddings, config.embed.unit_size)
