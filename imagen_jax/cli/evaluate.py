"""Evaluates samples; `imagen evaluate WHAT --help` lists the flags of an evaluation."""

from __future__ import annotations

import argparse
import pathlib

from imagen_jax.cli import (
    evaluate_features,
    evaluate_retrieval,
    evaluate_sweep,
    path_flags,
    scorer_flag,
)
from imagen_jax.cli import sample as sample_verb
from imagen_jax.evaluation import drawbench, edges, report, samples, scorers
from imagen_jax.evaluation.raters import build, score, tables
from imagen_jax.evaluation.raters.studies import STUDIES, letters
from imagen_jax.io import atomic
from imagen_jax.parallel import distributed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of every evaluation."""
    evaluations = parser.add_subparsers(dest="what", metavar="WHAT", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return evaluations.add_parser(name, help=text, description=text, allow_abbrev=False)

    _add_alignment(add("alignment", "share of images that show what their prompts specify"))
    _add_edges(add("edges", "super-resolution: edge sharpness and crop seams"))
    evaluate_features.add_fid(add("fid", "FID, KID, precision and recall against real images"))
    evaluate_features.add_fid30k(add("fid30k", "FID on COCO captions, from data to card"))
    evaluate_features.add_clip_score(add("clip_score", "mean cosine of images and prompts"))
    evaluate_retrieval.add(add("retrieval", "share of images nearest to the real one they name"))
    evaluate_sweep.add(add("sweep", "curves over guidance and other settings, for checkpoints"))
    _add_drawbench(add("drawbench", "sample prompts in categories, with a sheet of each"))
    _add_rate_build(add("rate_build", "make a page for blind comparison of two folders by raters"))
    _add_rate_score(add("rate_score", "turn raters' result files into rates with intervals"))
    _add_report(add("report", "tables of a run's cards beside the paper's results"))


def run(flags: argparse.Namespace) -> None:
    """Runs the evaluation."""
    {
        "alignment": _alignment,
        "clip_score": evaluate_features.run_clip_score,
        "drawbench": _drawbench,
        "edges": _edges,
        "fid": evaluate_features.run_fid,
        "fid30k": evaluate_features.run_fid30k,
        "rate_build": _rate_build,
        "rate_score": _rate_score,
        "report": _report,
        "retrieval": evaluate_retrieval.run,
        "sweep": evaluate_sweep.run,
    }[flags.what](flags)


def _add_alignment(parser: argparse.ArgumentParser) -> None:
    path_flags.required(parser, "--samples", "folder written by `imagen sample`", bucket="read")
    scorer_flag.add(parser)
    path_flags.required(parser, "--out", "JSON report to write", bucket="write")


def _alignment(flags: argparse.Namespace) -> None:
    scorer = scorers.find(flags.scorer)
    card = scorer.evaluate(flags.samples)
    atomic.write_json(flags.out, card)
    print(scorer.format_table(card))


def _add_edges(parser: argparse.ArgumentParser) -> None:
    path_flags.required(parser, "--samples", "folder written by `imagen sample`", bucket="read")
    path_flags.required(
        parser, "--lowres", "the same prompts and seed without the last stage", bucket="read"
    )
    parser.add_argument("--crop", type=int, default=64, help="side of its training crops, pixels")
    scorer_flag.add(parser)
    path_flags.required(parser, "--out", "JSON report to write", bucket="write")


def _edges(flags: argparse.Namespace) -> None:
    scorer = scorer_flag.find(flags)
    card = edges.evaluate(flags.samples, flags.lowres, flags.crop, scorer=scorer)
    atomic.write_json(flags.out, card)
    print(edges.format_table(card))


def _add_drawbench(parser: argparse.ArgumentParser) -> None:
    path_flags.required(
        parser,
        "--prompts",
        ".csv with the columns Prompts and Category, or .jsonl with prompt and category; "
        "rows that --scorer can score, as those of configs/drawbench_shapes.jsonl, are also scored",
        metavar="FILE",
        bucket="read",
    )
    scorer_flag.add(parser)
    sample_verb.add_sampling(parser, samples_per_prompt=8)


def _drawbench(flags: argparse.Namespace) -> None:
    rows = drawbench.read_prompts(flags.prompts)
    scorer = scorer_flag.find(flags, rows)
    sample_verb.sample_rows(flags, rows)
    if distributed.is_first():
        for path in drawbench.write_sheets(flags.out):
            print(path)
        if scorer is not None:
            card = scorer.evaluate(flags.out, by="category")
            atomic.write_json(pathlib.Path(flags.out) / "alignment.json", card)
            print(scorer.format_table(card))


def _add_rate_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--study", required=True, choices=list(STUDIES), help="the questions")
    path_flags.required(parser, "--samples_a", "folder of samples", metavar="DIR", bucket="read")
    parser.add_argument(
        "--samples_b",
        required=True,
        type=path_flags.input_list,
        metavar="DIR[,DIR...]",
        help="the other folder, or real images; several models with --study=drawbench",
    )
    parser.add_argument(
        "--names", default="", help="names of all folders, hidden from raters; default: A,B,..."
    )
    path_flags.required(parser, "--out", "folder to write: page/ and key.json", bucket="write")
    parser.add_argument("--seed", type=int, default=0, help="seed of orders, sides and controls")
    parser.add_argument(
        "--controls", type=float, default=0.1, help="control items per item, 0 to 1"
    )


def _rate_build(flags: argparse.Namespace) -> None:
    count = 1 + len(flags.samples_b)
    names = flags.names.split(",") if flags.names else letters(count)
    if len(names) != count or len({name.casefold() for name in names}) != count:
        raise samples.EvaluationError(
            f"--names={flags.names} must be {count} names, all different, as in mine,theirs: "
            "that of --samples_a, then those of --samples_b"
        )
    key = build.build(
        flags.samples_a,
        flags.samples_b,
        flags.out,
        study=flags.study,
        names=names,
        seed=flags.seed,
        controls=flags.controls,
    )
    controls = sum(bool(item["control"]) for item in key["items"])
    page = pathlib.Path(flags.out) / "page"
    print(f"study {key['id']}: {len(key['items'])} items, {controls} of them controls")
    print(f"give raters {page} (index.html and pictures/); keep {page.parent / 'key.json'}")


def _add_rate_score(parser: argparse.ArgumentParser) -> None:
    path_flags.required(parser, "--key", "key.json of rate_build", metavar="FILE", bucket="read")
    parser.add_argument(
        "--results",
        required=True,
        type=path_flags.input_list,
        metavar="PATH[,PATH...]",
        help="result files or folders of them",
    )
    path_flags.required(
        parser, "--out", "folder to write: ratings.json, .md, charts", bucket="write"
    )


def _rate_score(flags: argparse.Namespace) -> None:
    card = score.score(flags.key, flags.results)
    tables.write(card, flags.out)
    print(tables.format_card(card), end="")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cards",
        required=True,
        type=path_flags.input_list,
        metavar="FILE[,FILE...]",
        help="JSON cards of evaluations",
    )
    parser.add_argument("--name", required=True, help="name of the run in the tables")
    path_flags.optional(
        parser, "--samples", "folder of images to show", metavar="DIR", bucket="read"
    )
    path_flags.required(parser, "--out", "folder to write: report.md, report.html", bucket="write")


def _report(flags: argparse.Namespace) -> None:
    text = report.write(flags.cards, flags.out, name=flags.name, samples_dir=flags.samples)
    print(text, end="")
