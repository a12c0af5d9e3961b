"""The arms of an ablation of the base stage on the shapes world's DrawBench, by category.

    .venv/bin/python benchmarks/drawbench_arms.py --name=text_objective --demo=runs/demo \
        --out=runs/ablations --docs=docs

Samples configs/drawbench_shapes.jsonl with the trainings of ablations.py (missing ones are
trained), and prints the share of images in which all is right by category: means over the seeds
with Student's 95% interval, and the paired difference from the first arm. Takes about two minutes
per arm and seed on one CPU core; a killed run resumes.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ablations
import jax
import reporting
from ablation_runs import Runs

from imagen_jax.evaluation import drawbench, sweep
from imagen_jax.evaluation.sweep import StageSet, Sweep
from imagen_jax.worlds.shapes.scorer import SCORER

PROMPTS = "configs/drawbench_shapes.jsonl"
Scores = Mapping[str, Mapping[str, Sequence[float]]]  # Arm -> category -> score of each seed.


def measure(name: str, runs: Runs, seeds: Sequence[int], enlarge: str) -> dict[str, Any]:
    """`Scores` of all arms."""
    rows = drawbench.read_prompts(PROMPTS)
    out = f"{runs.folder}/sweeps/drawbench"
    found: dict[str, dict[str, list[float]]] = {}
    for arm, (trainings, _) in ablations.ABLATIONS[name].arms.items():
        for seed in seeds:
            own = trainings[0]._replace(seed=seed)
            stage_set = StageSet(runs.name(own), (runs.stage(own),))
            sweep.run(Sweep((stage_set,), {}, rows, enlarge=enlarge, scorer=SCORER), out)
            (folder,) = pathlib.Path(out, stage_set.name).glob("*/enlarged")
            report = SCORER.evaluate(folder, by="category")["kinds"]
            for category, tally in report.items():
                scores = found.setdefault(arm, {}).setdefault(category, [])
                scores.append(tally["scores"]["exact"]["mean"])
    return found


def table(scores: Scores) -> str:
    """Markdown: a row per category; the first arm, and each other one with its difference."""
    first, *others = scores
    lines = ["| category | " + " | ".join(scores) + " |", "|---" * (1 + len(scores)) + "|"]
    for category, base in scores[first].items():
        cells = [ablations.format_summary(ablations.summary(base), ".2f")]
        for arm in others:
            own = scores[arm][category]
            change = ablations.summary([a - b for a, b in zip(own, base, strict=True)])
            cells.append(
                f"{ablations.format_summary(ablations.summary(own), '.2f')} "
                f"({ablations.format_summary(change, '+.2f')})"
            )
        lines.append(f"| {category} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", required=True, choices=list(ablations.ABLATIONS))
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the diffusion model")
    parser.add_argument("--demo", required=True, help="run folder of launch/demo.sh")
    parser.add_argument("--out", required=True, help="folder of the ablations")
    parser.add_argument("--docs", default="docs", help="folder of ablations.md")
    flags = parser.parse_args()
    runs, docs = Runs(flags.out, f"{flags.demo}/data"), pathlib.Path(flags.docs)
    jax.config.update("jax_compilation_cache_dir", str(runs.compiled))
    seeds = [int(seed) for seed in flags.seeds.split(",")]
    scores = measure(flags.name, runs, seeds, f"{flags.demo}/stages/sr")
    record = {"seeds": seeds, "scores": scores}
    (docs / f"drawbench_{flags.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(scores))
    reporting.write_between(str(docs / "ablations.md"), f"drawbench_{flags.name}", table(scores))


if __name__ == "__main__":
    main()
