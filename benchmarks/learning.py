"""Scores of the shapes cascade over the training of its base stage.

    bash launch/demo.sh runs/demo --config.checkpoint.keep_every=2500
    .venv/bin/python benchmarks/learning.py --runs=runs/demo --out=runs/learning --docs=docs

Exports every kept checkpoint of the base stage, samples held-out prompts with it and the finished
super-resolution stage of the run, and writes OUT/learning.json: each score at each step, its mean
over the runs with Student's 95% interval. --docs updates the table and the chart of
docs/learning.md. A killed run resumes.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ablations import ALL_KINDS, TEXT_MEASURES, Ablation, format_table, tabulate
from matplotlib.figure import Figure
from reporting import write_between

from imagen_jax.config.schema import CheckpointConfig
from imagen_jax.evaluation import charts, sweep
from imagen_jax.evaluation.charts import Point
from imagen_jax.evaluation.sweep import StageSet, Sweep
from imagen_jax.inference import prompts
from imagen_jax.stages.folder import load_stage
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.worlds.shapes.scorer import SCORER

MEASURES = {title: path for title, path in TEXT_MEASURES.items() if title != "distance"}


def exported(run: pathlib.Path, step: int, out: pathlib.Path) -> str:
    """The stage folder of a checkpoint of the base stage; exported if it is missing."""
    folder = out / "stages" / f"{run.name}_{step}"
    if not (folder / "params.safetensors").is_file():
        verb = [sys.executable, "-m", "imagen_jax", "export", f"--workdir={run / 'base'}"]
        subprocess.run([*verb, f"--step={step}", f"--out={folder}"], check=True)
    return str(folder)


def measure(
    runs: Sequence[pathlib.Path], out: pathlib.Path, limit: int
) -> Iterator[dict[str, Any]]:
    """A cell, as `ablations.tabulate` reads them, for every checkpoint of every run.

    Args:
      runs: run folders of launch/demo.sh.
      out: folder to write.
      limit: number of held-out prompts, in equal parts of one object, counted, relation.
    """
    for run in runs:
        rows = prompts.read(str(run / "data" / "prompts_held_out.jsonl"))
        kept = Checkpoints(str(run / "base"), CheckpointConfig(), access="read")
        for step in kept.steps():
            stages = (exported(run, step, out), str(run / "stages" / "sr"))
            one_cell = Sweep(
                (StageSet(f"{run.name}-{step}", stages),), {}, rows, limit, scorer=SCORER
            )
            (cell,) = sweep.run(one_cell, str(out / "images"))
            yield {**cell, "arm": step, "seed": load_stage(stages[0]).config.seed}


def chart(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Chart of every score over the steps, with its interval over the runs."""
    lines: dict[str, list[Point]] = {title: [] for title in MEASURES}
    for row in rows:
        for title, found in row["measures"].items():
            mean, half = found["mean"], found["half"]
            if mean is not None:
                ends = () if half is None else (max(mean - half, 0.0), min(mean + half, 1.0))
                lines[title].append(Point(float(row["choice"]["arm"]), mean, *ends))
    return charts.line_chart(
        lines,
        title="Scores on held-out prompts over training",
        x_label="steps of the base stage",
        y_label="share of images",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", required=True, help="run folders of launch/demo.sh, A,B,...")
    parser.add_argument("--limit", type=int, default=360, help="number of held-out prompts")
    parser.add_argument("--out", required=True, help="folder of stages, samples and numbers")
    parser.add_argument("--docs", default="", help="folder of learning.md to update")
    flags = parser.parse_args()
    out = pathlib.Path(flags.out)
    runs = [pathlib.Path(run) for run in flags.runs.split(",")]
    cells = list(measure(runs, out, flags.limit))
    rows = tabulate(Ablation({}, {}, ALL_KINDS, flags.limit, MEASURES), cells)
    out.mkdir(parents=True, exist_ok=True)
    record = {"prompts": flags.limit, "runs": len(runs), "rows": rows}
    (out / "learning.json").write_text(json.dumps(record, indent=1) + "\n")
    table = format_table(rows).replace("arm", "step", 1)
    print(table)
    if flags.docs:
        docs = pathlib.Path(flags.docs)
        (docs / "images" / "learning.svg").write_text(charts.to_svg(chart(rows)))
        write_between(str(docs / "learning.md"), "learning", table)


if __name__ == "__main__":
    main()
