"""Scores and times of several runs of `launch/emoji.sh`: means over seeds, Student's intervals.

    python benchmarks/emoji_seeds.py --runs=runs/emoji,runs/emoji_1,runs/emoji_2

Reads RUN/retrieval_SPLIT.json of each run and prints the table of docs/emoji.md; then, from
RUN/STAGE/metrics.jsonl, the images/s of a stage's log lines (median) and the minutes of its last
process, which are those of the training unless it was interrupted. --times alone needs no scores.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import numpy as np
import reporting
from scipy import stats

# Split, group, name in the table.
ROWS = (
    ("train", "all", "training captions"),
    ("combinations_test", "all", "test combinations"),
    ("names_test", "all", "other names, all"),
    ("names_test", "alias", "aliases with another word"),
    ("names_test", "short", "in fewer words"),
    ("names_test", "flag", "countries of flags"),
    ("names_test", "keyword", "keywords of CLDR"),
    ("new_words", "True", "with a new word"),
    ("new_words", "False", "without a new word"),
)


def mean_of(values: list[float]) -> str:
    """Mean and half of Student's 95% interval over the runs."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{np.mean(values):.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", required=True, help="run folders, separated by commas")
    parser.add_argument("--times", action="store_true", help="print times alone")
    flags = parser.parse_args()
    runs = [pathlib.Path(run) for run in flags.runs.split(",")]
    if not flags.times:
        print(scores(runs), "\n")
    print(times(runs))


def times(runs: list[pathlib.Path]) -> str:
    """Steps, images/s and minutes of every stage."""
    lines = []
    for run in runs:
        for stage in ("base", "sr"):
            rows = (run / stage / "metrics.jsonl").read_text().splitlines()
            logged = [row for row in map(json.loads, rows) if "images_per_second" in row]
            rate = float(np.median([row["images_per_second"] for row in logged]))
            lines.append((run.name, stage, logged[-1]["step"], rate, logged[-1]["seconds"] / 60))
    return reporting.table(("run", "stage", "steps", "images/s", "minutes"), lines)


def scores(runs: list[pathlib.Path]) -> str:
    """The table of docs/emoji.md."""
    lines = []
    for split, group, name in ROWS:
        kinds = [json.loads((run / f"retrieval_{split}.json").read_text())["kinds"] for run in runs]
        found = [kind[group] for kind in kinds]
        cells = []
        for score in ("exact", "top5"):
            values = [one["scores"][score]["mean"] for one in found]
            ceiling = found[0]["ceiling"][score]["mean"]
            cells += [mean_of(values), f"{ceiling:.3f}"]
            cells.append(", ".join(f"{value:.3f}" for value in values))
        chance = found[0]["chance"]["top5"]["mean"]
        lines.append((name, found[0]["n"], *cells, f"{chance:.3f}"))
    titles = ("prompts", "n", "top-1", "ceiling", "top-1 of each run")
    titles += ("top-5", "ceiling", "top-5 of each run", "chance top-5")
    return reporting.table(titles, lines)


if __name__ == "__main__":
    main()
