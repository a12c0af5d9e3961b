"""Builds a data set where needed, indexes it and lists the records that cannot be used."""

from __future__ import annotations

import argparse
import json
import pathlib

import numpy as np

from imagen_jax.cli import beam_flag, path_flags, wiring
from imagen_jax.config.fields import ConfigError
from imagen_jax.data.index import duplicates
from imagen_jax.data.index.indexed_source import IndexedSource
from imagen_jax.data.sources import names
from imagen_jax.data.sources.mixture import Mixture
from imagen_jax.data.sources.registry import open_source
from imagen_jax.io import atomic, images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    wiring.add_config(parser)
    path_flags.optional(
        parser,
        "--captions",
        "also write the first caption of every image to this .jsonl file, prompts for sample",
        metavar="FILE",
    )
    parser.add_argument(
        "--duplicates",
        action="store_true",
        help="also count records that repeat another by captions, bytes or pixels",
    )
    path_flags.optional(
        parser,
        "--overlap",
        "also list training images that are among those of this folder, such as an evaluation set",
        metavar="DIR",
    )
    beam_flag.add(parser, "index the data and find duplicates")


def run(flags: argparse.Namespace) -> None:
    """Carries the verb out."""
    config = wiring.load_config(flags)
    if flags.beam_options:
        beam_flag.build_index(config.data, flags.beam_options, repeats=flags.duplicates)
    source = open_source(config.data, fresh=True)
    print(f"{len(source)} usable images, fingerprint {source.fingerprint}")
    print(f"captions per image: {source.report.caption_counts()}")
    parts = source.sources if isinstance(source, Mixture) else {"": source}
    for name, part in parts.items():
        if isinstance(part, IndexedSource):
            _report_repeats(part, f"{name}: " if name else "", flags)
    if flags.captions:
        first = (source.captions(i)[0] for i in range(len(source)))
        rows = (json.dumps({"prompt": caption}) for caption in dict.fromkeys(first))
        atomic.write_text(flags.captions, "".join(row + "\n" for row in rows))


def _report_repeats(source: IndexedSource, prefix: str, flags: argparse.Namespace) -> None:
    """Prints the duplicates of a source and its overlap with a folder, as the flags ask for."""
    if flags.duplicates:
        found = [source.duplicates(kind) for kind in duplicates.KINDS]
        for line in duplicates.describe(found, len(source)):
            print(prefix + line)
    if flags.overlap:
        for kind in ("bytes", "pixels"):
            rows = duplicates.overlap(source.image_keys(kind), _keys(flags.overlap, kind), kind)
            shown = ", ".join(source.table.key(i) for i in rows[:5].tolist())
            print(
                f"{prefix}overlap with {flags.overlap} by {kind}: {len(rows):,} of {len(source):,} "
                f"records{f' ({shown})' if shown else ''}"
            )


def _keys(folder: str, kind: str) -> np.ndarray:
    """The keys of the images in a folder."""
    paths = [path for path in pathlib.Path(folder).rglob("*") if names.is_image(path.name)]
    if not paths:
        raise ConfigError(f"--overlap={folder} holds no images; give a folder of image files")
    found = []
    for path in sorted(paths):
        try:
            found.append(duplicates.image_key(path.read_bytes(), kind))
        except images.ImageError as error:
            raise ConfigError(f"--overlap={folder}: {path}: {error}; remove it") from None
    return np.array(found)
