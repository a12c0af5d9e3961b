"""The evaluation `sweep`: samples and measures a grid of sampling settings for sets of stages."""

from __future__ import annotations

import argparse

from imagen_jax.cli import evaluate_features, path_flags, scorer_flag, wiring
from imagen_jax.evaluation import charts, sweep, sweep_report
from imagen_jax.evaluation.features import fid, networks
from imagen_jax.evaluation.features.resizing import DEFAULT_FILTER, FILTERS, filter_name
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.evaluation.sweep import StageSet, Sweep
from imagen_jax.inference import prompts
from imagen_jax.parallel import distributed


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of `evaluate sweep`."""
    parser.add_argument(
        "--stages",
        required=True,
        action="append",
        type=path_flags.input_list,
        metavar="DIR[,DIR...]",
        help="stage folders, base first; repeat the flag for other checkpoints or encoders",
    )
    parser.add_argument(
        "--names", default="", metavar="A[,B...]", help="names of the --stages, one each"
    )
    path_flags.optional(
        parser,
        "--enlarge",
        "super-resolution stage that upsamples the images of every set without text: compares "
        "base stages alone, also with different text encoders",
        metavar="DIR",
    )
    parser.add_argument(
        "--grid",
        default="{}",
        metavar="JSON",
        help='lists of sampling fields by stage, e.g. \'{"base": {"guidance_weight": [1, 2, 4], '
        '"thresholding": ["static", "dynamic"]}}\'; instead of a list: '
        f"{' or '.join(sweep.PRESETS)}, the paper's guidance weights",
    )
    path_flags.required(
        parser, "--prompts", "prompts: .txt, .csv or .jsonl", metavar="FILE", bucket="read"
    )
    parser.add_argument("--limit", type=int, default=0, help="sample the first N prompts; 0: all")
    path_flags.required(parser, "--out", "folder to write", metavar="DIR", bucket="write")
    parser.add_argument("--seed", type=int, default=0, help="seed of all noise")
    parser.add_argument("--samples_per_prompt", type=int, default=1, help="images per prompt")
    _add_measures(parser)
    parser.add_argument("--title", default="", help="title of the figure")
    evaluate_features.add_batch_flags(parser)


def _add_measures(parser: argparse.ArgumentParser) -> None:
    """Flags of score and distance."""
    path_flags.optional(
        parser,
        "--reference",
        "real images; empty: one of the --scorer for every row of --prompts",
        metavar="DIR",
        bucket="read",
    )
    scorer_flag.add(parser)
    parser.add_argument(
        "--features",
        default="random_convolutions",
        choices=list(networks.FEATURE_NETWORKS),
        help="network of the Frechet distance; random_convolutions needs no weights and is no FID",
    )
    path_flags.optional(
        parser, "--features_from", "weights of --features", metavar="PATH", bucket="read"
    )
    parser.add_argument(
        "--filter",
        default=DEFAULT_FILTER,
        type=filter_name,
        choices=list(FILTERS),
        help="resizing of Inception's input",
    )
    path_flags.optional(
        parser,
        "--clip",
        "Hugging Face CLIP: its score instead of alignment",
        metavar="DIR",
        bucket="read",
    )
    parser.add_argument(
        "--resamples",
        type=int,
        default=fid.RESAMPLES,
        help="groups of the jackknife intervals",
    )


def run(flags: argparse.Namespace) -> None:
    """Runs `evaluate sweep`."""
    wiring.check_least(flags, 0, "limit")
    rows = prompts.read(flags.prompts)
    grid_sweep = Sweep(
        stage_sets=_stage_sets(flags.stages, flags.names),
        grid=sweep.read_grid(flags.grid),
        rows=rows,
        scorer=scorer_flag.find(flags, rows),
        scorer_name="" if flags.scorer == scorer_flag.DEFAULT else flags.scorer,
        limit=flags.limit,
        **{
            name: getattr(flags, name)
            for name in ("seed", "samples_per_prompt", "batch_size", "enlarge", "reference")
            + ("features", "features_from", "filter", "clip", "resamples")
        },
    )
    charts.check_installed()
    evaluate_features.start(flags)
    cells = sweep.run(grid_sweep, flags.out, evaluate_features.log_once)
    if distributed.is_first():
        print(sweep_report.write(cells, flags.out, flags.title), end="")


def _stage_sets(stages: list[list[str]], names: str) -> tuple[StageSet, ...]:
    split = names.split(",") if names else ["stages"] if len(stages) == 1 else []
    if len(split) != len(stages) or not all(name.isidentifier() for name in split):
        raise EvaluationError(
            f"--names={names} must be {len(stages)} words of letters, digits and _, one for each "
            "of --stages"
        )
    return tuple(
        StageSet(name, tuple(folders)) for name, folders in zip(split, stages, strict=True)
    )
