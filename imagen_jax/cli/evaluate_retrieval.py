"""The evaluation `retrieval`: the real image nearest to each sample, among a folder of them."""

from __future__ import annotations

import argparse
import pathlib

from imagen_jax.cli import evaluate_features, path_flags, wiring
from imagen_jax.config.data import FITS
from imagen_jax.config.fields import ConfigError, unknown_name
from imagen_jax.evaluation import samples
from imagen_jax.evaluation.features import networks
from imagen_jax.evaluation.retrieval import grid
from imagen_jax.evaluation.retrieval.scorer import NEAR_DUPLICATE, Retrieval
from imagen_jax.io import atomic, images
from imagen_jax.parallel import distributed


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of `evaluate retrieval`."""
    path_flags.required(
        parser, "--samples", "folder written by `imagen sample`", metavar="DIR", bucket="read"
    )
    path_flags.required(
        parser, "--gallery", "captioned folder of real images", metavar="DIR", bucket="read"
    )
    parser.add_argument(
        "--match",
        default="",
        metavar="FIELD",
        help="field of the prompt row and of the gallery's metadata.jsonl that names the right "
        "image; default: the prompt is one of its captions",
    )
    parser.add_argument("--by", default="", metavar="FIELD", help="row field that groups prompts")
    parser.add_argument(
        "--marks",
        default="",
        metavar="FIELD[,FIELD...]",
        help="fields in which the nearest image is compared with the row",
    )
    path_flags.optional(
        parser, "--against", "other samples of the same prompts, to compare", metavar="DIR"
    )
    _add_measure(parser)
    path_flags.required(parser, "--out", "card to write", metavar="FILE.json", bucket="write")
    path_flags.optional(
        parser, "--grid", "figure of samples beside the real images", metavar="FILE.png"
    )
    parser.add_argument(
        "--limit_grid", type=int, default=24, help="pairs in --grid, from the first"
    )
    parser.add_argument("--credit", default="", metavar="TEXT", help="text at the bottom of --grid")


def _add_measure(parser: argparse.ArgumentParser) -> None:
    """Flags of how images are compared."""
    parser.add_argument(
        "--size",
        type=int,
        default=0,
        help="side at which images are compared, pixels; 0: the smaller of the samples' and of the "
        "gallery's first image",
    )
    parser.add_argument(
        "--fit", default="center_crop", choices=FITS, help="how real images become square"
    )
    parser.add_argument(
        "--near_duplicate",
        type=float,
        default=NEAR_DUPLICATE,
        metavar="LEVELS",
        help="real images with at most this root mean square difference (of 255) are one answer",
    )
    parser.add_argument(
        "--features",
        default="",
        choices=["", *networks.FEATURE_NETWORKS],
        help="network of a second measure beside pixels",
    )
    path_flags.optional(
        parser, "--features_from", "weights of --features", metavar="PATH", bucket="read"
    )
    evaluate_features.add_batch_flags(parser)


def run(flags: argparse.Namespace) -> None:
    """Runs `evaluate retrieval`."""
    wiring.check_least(flags, 1, "limit_grid")
    if not 0 <= flags.near_duplicate < 256:
        raise ConfigError(f"--near_duplicate={flags.near_duplicate} must be in 0..255")
    evaluate_features.start(flags)
    rows = samples.read_rows(flags.samples)
    marks = tuple(filter(None, flags.marks.split(",")))
    names = list(dict.fromkeys(name for row in rows for name in row))
    for flag, field in (("--by", flags.by), *(("--marks", field) for field in marks)):
        if field and field not in names:
            raise ConfigError(f"{unknown_name(flag, field, names)}; a field of the samples' rows")
    scorer = Retrieval(
        flags.gallery,
        match=flags.match,
        marks=marks,
        store=str(pathlib.Path(flags.out).with_suffix(".features")),
        **{
            name: getattr(flags, name)
            for name in ("size", "fit", "near_duplicate", "features", "features_from", "batch_size")
        },
    )
    card = scorer.evaluate(flags.samples, flags.by, against=flags.against)
    if not distributed.is_first():
        return
    atomic.write_json(flags.out, card)
    print(scorer.format_table(card))
    if flags.grid:
        figure = grid.make_grid(
            flags.samples, flags.gallery, card["rows"], limit=flags.limit_grid, credit=flags.credit
        )
        images.save_png(flags.grid, figure, {"samples": flags.samples})
        print(flags.grid)
