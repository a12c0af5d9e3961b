"""Builds a data set where needed, indexes it and lists the records that cannot be used."""

from __future__ import annotations

import argparse
import json

from imagen_jax.cli import path_flags, wiring
from imagen_jax.data.sources.registry import open_source
from imagen_jax.io import atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    wiring.add_config(parser)
    path_flags.optional(
        parser,
        "--captions",
        "also write the first caption of every image to this .jsonl file, prompts for sample",
        metavar="FILE",
    )


def run(flags: argparse.Namespace) -> None:
    """Carries the verb out."""
    config = wiring.load_config(flags)
    source = open_source(config.data)
    print(f"{len(source)} usable images, fingerprint {source.fingerprint}")
    print(f"captions per image: {source.report.caption_counts()}")
    if flags.captions:
        first = (source.captions(i)[0] for i in range(len(source)))
        rows = (json.dumps({"prompt": caption}) for caption in dict.fromkeys(first))
        atomic.write_text(flags.captions, "".join(row + "\n" for row in rows))
