"""Two text encoders of the emoji world on the raters' page, in two passes (docs/ablations.md).

    python benchmarks/rated_encoders.py build --names=MiniLM,home-made --out=runs/rated_encoders \\
        --bases=runs/emoji/stages/base,runs/home/stages/base --sr=runs/emoji/stages/sr \\
        --prompts=DATA/prompts_names_test.jsonl,DATA/prompts_combinations_test.jsonl
    # Open OUT/pass_1/page/index.html and OUT/pass_2/page/index.html, save both files of answers.
    python benchmarks/rated_encoders.py table --out=runs/rated_encoders --results=FIRST,SECOND

`build` samples 60 prompts with both base stages, as many of each file at even distances, and
upsamples them without text, so that the base stages alone differ. Both passes have the same images,
in another order and on other sides. `table` prints how often either encoder's images were
preferred, over both passes; the difference of the two shares with its 95% interval over prompts;
and the share of prompts with the same answer twice. One rater says nothing of other raters.

Hardware: one CPU core. Time: about five minutes.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import reporting

from imagen_jax import Cascade
from imagen_jax.evaluation import intervals, super_resolution
from imagen_jax.evaluation.raters import build as rater_build
from imagen_jax.evaluation.raters import score as rater_score
from imagen_jax.inference import prompts
from imagen_jax.inference.sample import SampleOptions, sample

PROMPTS, SIDE = 60, 4  # Prompts, and images of each that a rater sees side by side.
PASSES = (1, 2)


def choose(files: Sequence[str], count: int = PROMPTS) -> list[dict[str, Any]]:
    """Rows of the files, as many of each, at even distances; without keywords, with a category."""
    chosen = []
    for path in files:
        rows = [row for row in prompts.read(path) if row["kind"] != "keyword"]
        share = count // len(files)
        category = "combinations" if rows[0]["kind"] == "combination" else "other names"
        for index in np.linspace(0, len(rows) - 1, share).round().astype(int):
            chosen.append({**rows[index], "category": category})
    return chosen


def build(args: argparse.Namespace) -> None:
    """Samples both encoders' images and writes a page for each pass."""
    rows, names = choose(args.prompts.split(",")), args.names.split(",")
    upsampler = super_resolution.load(args.sr)
    folders = [str(args.out / name) for name in names]
    for base, folder in zip(args.bases.split(","), folders, strict=True):
        options = SampleOptions(samples_per_prompt=SIDE, batch_size=16, checkpoint=base)
        sample(Cascade.load([base]), rows, f"{folder}_base", options, print)
        super_resolution.upsample_samples(
            upsampler, f"{folder}_base", folder, seed=0, batch_size=16
        )
    for number in PASSES:
        rater_build.build(
            folders[0],
            folders[1:],
            str(args.out / f"pass_{number}"),
            study="drawbench",
            names=names,
            seed=number,
        )


def preferences(key_file: pathlib.Path, results: str) -> dict[str, dict[tuple[str, str], float]]:
    """Question -> (category, prompt) -> 1 for the first encoder, -1 for the second, or 0."""
    rater_score.score(str(key_file), [results])  # Raises if the control items were missed.
    key = json.loads(key_file.read_text())
    found: dict[str, dict[tuple[str, str], float]] = {name: {} for name in key["questions"]}
    for answer in json.loads(pathlib.Path(results).read_text())["answers"]:
        item = key["items"][answer["item"]]
        if not item["control"]:
            preferred = dict(zip(("left", "right"), item["of"], strict=True)).get(answer["answer"])
            place = item["category"], item["prompt"]
            found[answer["question"]][place] = {"A": 1.0, "B": -1.0, None: 0.0}[preferred]
    return found


def table(names: Sequence[str], passes: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row per question and category; `passes` as from `preferences`."""
    rows = []
    for question, first in passes[0].items():
        for category in ("", *dict.fromkeys(category for category, _ in first)):
            places = [place for place in first if not category or place[0] == category]
            values = np.array([[answers[question][p] for p in places] for answers in passes])
            shares = [f"{np.mean(values == value):.0%}" for value in (1.0, 0.0, -1.0)]
            mean, low, high = intervals.paired_difference(
                values.mean(0), [prompt for _, prompt in places]
            )
            same = np.mean((values == values[0]).all(0))
            difference = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
            label = (question, category or "all", str(len(places)))
            rows.append([*label, *shares, difference, f"{same:.0%}"])
    titles = ("question", "category", "prompts", names[0], "indifferent", names[1])
    return reporting.table((*titles, "difference, 95%", "same twice"), rows)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    flags = parts.add_parser("build", help="sample, and write both pages")
    flags.add_argument("--bases", required=True, help="two base stages, separated by a comma")
    flags.add_argument("--names", required=True, help="of the encoders, likewise")
    flags.add_argument("--sr", required=True, help="stage that upsamples the images of both")
    flags.add_argument("--prompts", required=True, help="JSONL files of the emoji world")
    flags.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    flags = parts.add_parser("table", help="print the preferences")
    flags.add_argument("--out", type=pathlib.Path, required=True, help="that of build")
    flags.add_argument("--results", required=True, help="the files of both passes")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse(sys.argv[1:])
    if args.part == "build":
        build(args)
        return
    keys = [args.out / f"pass_{number}" / "key.json" for number in PASSES]
    found = [preferences(*pair) for pair in zip(keys, args.results.split(","), strict=True)]
    print(table(json.loads(keys[0].read_text())["names"], found))


if __name__ == "__main__":
    main()
