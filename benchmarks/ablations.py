"""The paper's ablations on the shapes cascade (Imagen, Sec. 4.4-4.5), one command each.

    .venv/bin/python benchmarks/ablations.py --name=thresholding --seeds=0,1,2 \
        --data=runs/demo/data --out=runs/ablations --docs=docs

Trains what is missing (`ablation_runs`), draws and measures held-out prompts as `evaluate sweep`
does, and writes OUT/NAME.json: every measure of every arm for each seed of the picture model, its
mean with Student's 95% interval over the seeds, and the same of the paired differences from the
arm that the others are compared with. With --docs the table of docs/ablations.md is written anew.
Killed and started again it goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import reporting
from ablation_runs import ENCODERS, STEPS, Runs, Training
from scipy import stats

from imagen_jax import prompts
from imagen_jax.evaluation import sweep
from imagen_jax.evaluation.intervals import CONFIDENCE
from imagen_jax.evaluation.sweep import StageSet, Sweep

Arm = tuple[Training, Training]


class Ablation(NamedTuple):
    """What is compared.

    Attributes:
      grids: sampling settings by arm.
      against: fields of an arm that make it the one that its row is compared with.
      kinds: of the prompts.
      count: prompts.
      measures: title -> KIND.ATTRIBUTE of the alignment, or distance.
    """

    grids: dict[str, sweep.Grid]
    against: dict[str, Any]
    kinds: tuple[str, ...]
    count: int
    measures: dict[str, str]


WEIGHTS = [1.5, 4.0, 8.0]
ABLATIONS = {
    "thresholding": Ablation(
        {
            "small": {
                "base": {"guidance_weight": WEIGHTS, "thresholding": ["none", "static", "dynamic"]}
            }
        },
        {"base.thresholding": "none"},
        ("single", "count"),
        100,
        {"all right": "all.exact", "colours right": "all.colour", "distance": "distance"},
    ),
    "noise_conditioning": Ablation(
        {"off": {"sr": {"aug_level": [0.0]}}, "on": {"sr": {"aug_level": [0.0, 0.05, 0.1, 0.2]}}},
        {"arm": "off", "sr.aug_level": 0.0},
        ("single", "count"),
        100,
        {"all right": "all.exact", "shapes right": "all.shape", "distance": "distance"},
    ),
    "encoder_size": Ablation(
        dict.fromkeys(ENCODERS, {}),
        {"arm": "none"},
        ("single", "count", "relation"),
        240,
        {
            "one object": "single.exact",
            "counted": "count.exact",
            "number": "count.count",
            "two objects": "relation.exact",
            "binding": "relation.binding",
            "order": "relation.order",
            "distance": "distance",
        },
    ),
}


def arm_of(name: str, arm: str, seed: int) -> Arm:
    """The two trainings of an arm for a seed; encoders share the seed of their SR stage."""
    if name == "encoder_size":
        return Training("base", arm, seed), Training("sr", arm, 0)
    return Training("base", "small", seed), Training("sr", "small", seed, arm != "off")


def measure(name: str, runs: Runs, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """All cells of an ablation, each with `arm` and `seed`."""
    ablation, cells = ABLATIONS[name], []
    rows = prompts.read(f"{runs.data}/prompts_held_out.jsonl")
    rows = [row for row in rows if row["kind"] in ablation.kinds]
    for seed in seeds:
        for arm, grid in ablation.grids.items():
            stages = tuple(map(runs.stage, arm_of(name, arm, seed)))
            asked = Sweep((StageSet(f"{arm}_{seed}", stages),), grid, rows, ablation.count)
            found = sweep.run(asked, str(runs.out / "sweeps" / name))
            cells += [{**cell, "arm": arm, "seed": seed} for cell in found]
    return cells


def value_of(cell: Mapping[str, Any], path: str) -> float | None:
    """A measure of a cell; None where no picture was asked, as for order without right colours."""
    if path == "distance":
        return cell["numbers"]["distance"]
    kind, attribute = path.split(".")
    rate = cell["numbers"]["alignment"][kind].get(attribute)
    return None if rate is None else rate["mean"]


def summary(values: Sequence[float | None]) -> dict[str, Any]:
    """Values by seed, their mean, and half the width of Student's 95% interval of it."""
    known = [value for value in values if value is not None]
    half = math.nan
    if len(known) > 1:
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(known) - 1)
        half = float(quantile * np.std(known, ddof=1) / len(known) ** 0.5)
    mean = float(np.mean(known)) if known else math.nan
    return {
        "seeds": list(values),
        "mean": None if math.isnan(mean) else mean,
        "half": None if math.isnan(half) else half,
    }


def tabulate(ablation: Ablation, cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per arm and choice: `choice`, and for each measure its summary and difference."""
    seeds = sorted({cell["seed"] for cell in cells})
    found = {_key({"arm": cell["arm"], **cell["values"]}, cell["seed"]): cell for cell in cells}
    rows = []
    for cell in cells:
        if cell["seed"] != seeds[0]:
            continue
        choice = {"arm": cell["arm"], **cell["values"]}
        # A setting that the other arm does not have does not tell its cells apart.
        other = {**choice, **ablation.against}
        row: dict[str, Any] = {"choice": choice, "measures": {}, "differences": {}}
        for title, path in ablation.measures.items():
            own = [value_of(found[_key(choice, seed)], path) for seed in seeds]
            row["measures"][title] = summary(own)
            if other != choice:
                base = [value_of(found[_key(other, seed)], path) for seed in seeds]
                pairs = zip(own, base, strict=True)
                row["differences"][title] = summary(
                    [None if a is None or b is None else a - b for a, b in pairs]
                )
        rows.append(row)
    return rows


def _key(choice: Mapping[str, Any], seed: int) -> str:
    return json.dumps({**choice, "seed": seed}, sort_keys=True)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: mean ± half of the interval, and in brackets the paired difference."""
    fields = [field for field in rows[0]["choice"] if len({r["choice"][field] for r in rows}) > 1]
    titles = list(rows[0]["measures"])
    lines = ["| " + " | ".join([*fields, *titles]) + " |"]
    lines.append("|---" * (len(fields) + len(titles)) + "|")
    for row in rows:
        cells = [sweep.format_value(row["choice"][field]) for field in fields]
        for title in titles:
            digits = 3 if title == "distance" else 2
            text = _format(row["measures"][title], f".{digits}f")
            if title in row["differences"]:
                text += f" ({_format(row['differences'][title], f'+.{digits}f')})"
            cells.append(text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _format(found: Mapping[str, Any], form: str) -> str:
    if found["mean"] is None:
        return "-"
    half = "" if found["half"] is None else f" ± {found['half']:{form.lstrip('+')}}"
    return f"{found['mean']:{form}}{half}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, choices=list(ABLATIONS))
    parser.add_argument("--seeds", default="0,1,2", help="of the picture model")
    parser.add_argument("--data", required=True, help="folder of the shapes world")
    parser.add_argument("--out", required=True, help="folder of trainings, pictures and numbers")
    parser.add_argument("--docs", default="", help="folder of ablations.md to update")
    for stage, steps in STEPS.items():
        parser.add_argument(
            f"--{stage}_steps", type=int, default=steps, help="length of a training"
        )
    flags = parser.parse_args()
    steps = {stage: getattr(flags, f"{stage}_steps") for stage in STEPS}
    seeds = [int(seed) for seed in flags.seeds.split(",")]
    cells = measure(flags.name, Runs(flags.out, flags.data, steps), seeds)
    rows = tabulate(ABLATIONS[flags.name], cells)
    record = {
        "ablation": flags.name,
        "seeds": seeds,
        "steps": steps,
        "prompts": ABLATIONS[flags.name].count,
        "rows": rows,
    }
    text = json.dumps(record, indent=1) + "\n"
    (pathlib.Path(flags.out) / f"{flags.name}.json").write_text(text)
    table = format_table(rows)
    print(table)
    if flags.docs:
        docs = pathlib.Path(flags.docs)
        (docs / f"ablation_{flags.name}.json").write_text(text)
        reporting.write_between(str(docs / "ablations.md"), flags.name, table)


if __name__ == "__main__":
    main()
