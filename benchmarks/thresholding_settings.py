"""Whether dynamic thresholding beats static with the best guidance of each (docs/ablations.md).

    python benchmarks/thresholding_settings.py --stages=runs/demo/stages/base,runs/demo/stages/sr \
        --first_scene=1000 --test_scene=2000 --out=runs/thresholding/demo.json
    data=runs/emoji/data
    python benchmarks/thresholding_settings.py --stages=runs/emoji/stages/base \
        --prompts=$data/prompts_combinations_dev.jsonl --gallery=$data/gallery --match=key \
        --test_prompts=$data/prompts_combinations_test.jsonl --out=runs/thresholding/emoji.json

Samples development prompts with every thresholding at several guidance weights of the first stage,
guided at all noise levels and at logsnr < 1 only; other fields are the stage's own. The best
setting of each thresholding (where several are equal, the lowest weight) then samples test prompts
with other noise, and so do the stage's own settings: score, and paired difference from the best
static setting, 95% over prompts. The meaning of right is that of sampler_grids.py. A killed run
continues from --out.

Takes ten to twenty minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import sampler_grids

from imagen_jax import Cascade
from imagen_jax.evaluation import intervals
from imagen_jax.inference import prompts
from imagen_jax.io import atomic

THRESHOLDINGS = ("none", "static", "dynamic")
WEIGHTS = (1.5, 3.0, 5.0, 8.0)
INTERVALS: dict[str, tuple[float, ...]] = {"all levels": (), "logsnr < 1": (-100.0, 1.0)}
SETTINGS = [
    (thresholding, guided, weight)
    for thresholding, guided, weight in itertools.product(THRESHOLDINGS, INTERVALS, WEIGHTS)
]


class Split(NamedTuple):
    """Prompts, the meaning of right for each, and the seeds of the noise."""

    rows: Sequence[Mapping[str, Any]]
    right: sampler_grids.Right
    seeds: Sequence[int]


def split_of(args: argparse.Namespace, test: bool) -> Split:
    """The development or the test prompts."""
    file = args.test_prompts if test else args.prompts
    seeds = range(1, 1 + args.test_seeds) if test else [0]
    if not file:
        args = argparse.Namespace(**vars(args))
        args.first_scene = args.test_scene if test else args.first_scene
        rows = sampler_grids.held_out(args)
        return Split(rows, sampler_grids.right_by_alignment(rows), seeds)
    rows = prompts.read(file)[: args.count]
    return Split(rows, sampler_grids.right_by_gallery(rows, args.gallery, args.match), seeds)


def name_of(setting: tuple[str, str, float]) -> str:
    """Name of a setting, for people and as a key."""
    thresholding, guided, weight = setting
    return f"{thresholding}, {guided}, weight {weight:g}"


def best(scores: Mapping[str, Sequence[bool]], thresholding: str) -> tuple[str, str, float]:
    """The setting of a thresholding with most right development images, the lowest weight first."""
    own = [setting for setting in SETTINGS if setting[0] == thresholding]
    return max(own, key=lambda setting: (np.mean(scores[name_of(setting)]), -setting[2]))


def development_table(scores: Mapping[str, Sequence[bool]]) -> str:
    """Markdown: a row per interval and weight, a column per thresholding."""
    lines = ["| guided | weight | " + " | ".join(THRESHOLDINGS) + " |", "|---|---|" + "---|" * 3]
    for guided, weight in itertools.product(INTERVALS, WEIGHTS):
        cells = [f"{np.mean(scores[name_of((t, guided, weight))]):.2f}" for t in THRESHOLDINGS]
        lines.append(f"| {guided} | {weight:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_table(
    scores: Mapping[str, Sequence[bool]], chosen: Sequence[tuple[str, str, float]]
) -> str:
    """Markdown: a row per chosen setting, with its paired difference from the static one."""
    static = next(setting for setting in chosen if setting[0] == "static")  # Default comes last.
    base = np.asarray(scores[name_of(static)], float)
    lines = ["| chosen setting | right | difference from static, 95% |", "|---|---|---|"]
    for setting in chosen:
        own = np.asarray(scores[name_of(setting)], float)
        number = np.tile(np.arange(own.shape[1]), (len(own), 1))
        mean, low, high = intervals.paired_difference((own - base).ravel(), number.ravel())
        change = "" if setting == static else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append(f"| {name_of(setting)} | {own.mean():.3f} | {change} |")
    return "\n".join(lines)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--stages", required=True, help="stage folders, separated by commas")
    flags.add_argument("--prompts", default="", help="development prompts; '': shapes scenes")
    flags.add_argument("--test_prompts", default="", help="test prompts, with --prompts")
    flags.add_argument("--gallery", default="", help="with --prompts: folder of real images")
    flags.add_argument("--match", default="key", help="field that names the right image")
    flags.add_argument("--first_scene", type=int, default=1000, help="without --prompts")
    flags.add_argument("--test_scene", type=int, default=2000, help="first one of the test")
    flags.add_argument("--count", type=int, default=120, help="prompts of a split, at most")
    flags.add_argument("--test_seeds", type=int, default=3, help="images of a test prompt")
    flags.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    args = flags.parse_args()
    if bool(args.prompts) != bool(args.test_prompts):
        flags.error("--prompts and --test_prompts go together")
    cascade = Cascade.load(args.stages.split(","))
    first = cascade.configs[0].name
    own = cascade.configs[0].sampling
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(args.out.read_text()) if args.out.is_file() else {"dev": {}, "test": {}}

    def measure(part: str, split: Split, setting: tuple[str, str, float]) -> None:
        thresholding, guided, weight = setting
        name = name_of(setting)
        if name in found[part]:
            return
        fields = {
            "thresholding": thresholding,
            "guidance_interval": INTERVALS[guided],
            "guidance_weight": weight,
        }
        each = []
        for seed in split.seeds:
            texts = [row["prompt"] for row in split.rows]
            images = cascade.sample(texts, seed=seed, stage_settings={first: fields})
            each.append(split.right(images).tolist())
        found[part][name] = each if part == "test" else each[0]
        atomic.write_json(args.out, found)
        print(f"{part}: {name}: {np.mean(each):.3f}", file=sys.stderr, flush=True)

    development = split_of(args, test=False)
    for setting in SETTINGS:
        measure("dev", development, setting)
    chosen = [best(found["dev"], thresholding) for thresholding in THRESHOLDINGS]
    default = (own.thresholding, "all levels", own.guidance_weight)
    chosen += [default] if default not in chosen else []
    test = split_of(args, test=True)
    for setting in chosen:
        measure("test", test, setting)
    print(development_table(found["dev"]), "\n")
    print(test_table(found["test"], chosen))
    print(f"\n{len(development.rows)} development prompts, {len(test.rows)} test prompts")


if __name__ == "__main__":
    main()
