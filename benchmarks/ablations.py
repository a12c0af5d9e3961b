"""Ablations of the paper on the shapes cascade (Imagen, Sec. 4.4-4.5, App. B, D).

    .venv/bin/python benchmarks/ablations.py --name=thresholding --seeds=0,1,2 \
        --demo=runs/demo --out=runs/ablations --docs=docs

Trains missing stages (`ablation_runs`), samples and scores held-out prompts like `evaluate sweep`,
and writes OUT/NAME.json: every measure of every arm for each seed of the diffusion model, its mean
with Student's 95% interval over the seeds, and the same for the paired differences from the
reference arm. --docs updates the table of docs/ablations.md. A killed run resumes.

Arms that differ before the super-resolution stage are base stages. The demo's super-resolution
stage upsamples their samples without text, so the scores depend on the base stage alone.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import reporting
from ablation_runs import STEPS, Runs, Training
from scipy import stats

from imagen_jax.config.fields import unknown_name
from imagen_jax.evaluation import sweep
from imagen_jax.evaluation.intervals import CONFIDENCE
from imagen_jax.evaluation.sweep import StageSet, Sweep
from imagen_jax.inference import prompts
from imagen_jax.worlds.shapes.scorer import SCORER

BASE, SR = Training("base"), Training("sr")


class Arm(NamedTuple):
    """Trainings and sampling settings that are compared.

    Attributes:
      stages: trainings of seed 0, base first; a base alone is upsampled by the demo's SR stage.
      grid: sampling settings.
    """

    stages: tuple[Training, ...]
    grid: sweep.Grid = {}


class Ablation(NamedTuple):
    """Arms, prompts and measures of one ablation.

    Attributes:
      arms: arms by name.
      against: settings of the reference arm; a row is compared with the row that has them.
      kinds: kinds of prompts.
      count: number of prompts.
      measures: title -> KIND.ATTRIBUTE of the alignment, distance, or cost.FIELD or
        gigaflops.FIELD of the last stage.
    """

    arms: dict[str, Arm]
    against: dict[str, Any]
    kinds: tuple[str, ...]
    count: int
    measures: dict[str, str]


UNIFORM_KINDS = ("single", "count")
ALL_KINDS = ("single", "count", "relation")
TEXT_MEASURES = {
    "one object": "single.exact",
    "counted": "count.exact",
    "number": "count.count",
    "two objects": "relation.exact",
    "binding": "relation.binding",
    "order": "relation.order",
    "distance": "distance",
}
COSTS = {
    "parameters": "cost.parameters",
    "steps/s": "cost.steps_per_second",
    "MiB": "cost.mebibytes",
}
# Of a training image: the U-Net forward and backward, and the encoder of its caption.
GIGAFLOPS = {"U-Net, GFLOP": "gigaflops.network", "encoder, GFLOP": "gigaflops.caption"}
FORMS = {
    "distance": ".3f",
    "parameters": ",.0f",
    "steps/s": ".1f",
    "MiB": ".0f",
    "U-Net, GFLOP": ".3f",
    "encoder, GFLOP": ".3f",
}
CHOICES = {
    "guidance_weight": [1.5, 4.0, 8.0],
    "guidance_interval": [(), (-100.0, 1.0)],
    "thresholding": ["none", "static", "dynamic"],
}
ABLATIONS = {
    "encoder_size": Ablation(
        {
            name: Arm((BASE._replace(encoder=name),))
            for name in ("none", "small", "larger", "minilm", "oracle")
        },
        {"arm": "none"},
        ALL_KINDS,
        224,
        GIGAFLOPS | TEXT_MEASURES,
    ),
    # Whether the network's output matters: x0, whose error does not vanish with the noise, or v.
    **{
        name: Ablation(
            {"small": Arm((BASE._replace(variant=variant),), {"base": CHOICES})},
            {"base.thresholding": "none"},
            UNIFORM_KINDS,
            64,
            {"all right": "all.exact", "colours right": "all.colour", "distance": "distance"},
        )
        for name, variant in (("thresholding", ""), ("thresholding_v", "v"))
    },
    # The claim is about errors of the base stage, so two of them.
    **{
        name: Ablation(
            {
                "off": Arm(
                    (base, SR._replace(variant="not_augmented")), {"sr": {"aug_level": [0.0]}}
                ),
                "on": Arm(
                    (base, SR._replace(variant="augmented")),
                    {"sr": {"aug_level": [0.0, 0.05, 0.1, 0.2]}},
                ),
            },
            {"arm": "off", "sr.aug_level": 0.0},
            UNIFORM_KINDS,
            96,
            {"all right": "all.exact", "shapes right": "all.shape", "distance": "distance"},
        )
        for name, base in (
            ("noise_conditioning", BASE),
            ("noise_conditioning_worse_base", BASE._replace(variant="third")),
        )
    },
    "unet_size": Ablation(
        {
            "half": Arm((BASE._replace(variant="half"),)),
            "demo": Arm((BASE,)),
            "double": Arm((BASE._replace(variant="double"),)),
        },
        {"arm": "demo"},
        ALL_KINDS,
        224,
        COSTS | GIGAFLOPS | TEXT_MEASURES,
    ),
    "conditioning": Ablation(
        {
            "cross": Arm((BASE,)),
            "concat": Arm((BASE._replace(variant="concat"),)),
            "pooled": Arm((BASE._replace(variant="pooled"),)),
            "mean": Arm((BASE._replace(variant="mean"),)),
            "no LayerNorm": Arm((BASE._replace(variant="unnormed"),)),
        },
        {"arm": "cross"},
        ALL_KINDS,
        224,
        TEXT_MEASURES,
    ),
    "efficient_unet": Ablation(
        {
            "efficient": Arm((BASE, SR)),
            "plain": Arm((BASE, SR._replace(variant="plain"))),
            "plain, equal parameters": Arm((BASE, SR._replace(variant="plain_parameters"))),
            "plain, equal FLOPs": Arm((BASE, SR._replace(variant="plain_flops"))),
        },
        {"arm": "efficient"},
        UNIFORM_KINDS,
        96,
        COSTS | {"all right": "all.exact", "shapes right": "all.shape", "distance": "distance"},
    ),
    "text_objective": Ablation(
        {
            "paraphrases": Arm((BASE,)),
            "contrastive": Arm((BASE._replace(encoder="contrastive"),)),
        },
        {"arm": "paraphrases"},
        ALL_KINDS,
        224,
        {"its colour": "single.colour", "its shape": "single.shape"} | TEXT_MEASURES,
    ),
}


def measure(
    ablation: Ablation, runs: Runs, seeds: Sequence[int], enlarge: str
) -> list[dict[str, Any]]:
    """All cells of an ablation, each with `arm`, `seed` and, if a measure needs them, costs.

    Args:
      ablation: the ablation.
      runs: trains missing stages.
      seeds: seeds of the diffusion model.
      enlarge: SR stage folder that upsamples the samples of arms with a base stage only.
    """
    cells = []
    rows = prompts.read(f"{runs.data}/prompts_held_out.jsonl")
    rows = [row for row in rows if row["kind"] in ablation.kinds]
    # Ablations with the same prompts share their samples.
    out = f"{runs.folder}/sweeps/{'_'.join(ablation.kinds)}_{ablation.count}"
    needed = {path.split(".")[0] for path in ablation.measures.values()} & {"cost", "gigaflops"}
    for seed in seeds:
        for name, arm in ablation.arms.items():
            trainings = [training._replace(seed=seed) for training in arm.stages]
            stages = tuple(map(runs.stage, trainings))
            found = sweep.run(
                Sweep(
                    (StageSet("-".join(map(runs.name, trainings)), stages),),
                    arm.grid,
                    rows,
                    ablation.count,
                    enlarge=enlarge if len(stages) == 1 else "",
                    scorer=SCORER,
                ),
                out,
            )
            costs = {kind: getattr(runs, kind)(trainings[-1]) for kind in needed}
            cells += [{**cell, "arm": name, "seed": seed, **costs} for cell in found]
    return cells


def value_of(cell: Mapping[str, Any], path: str) -> float | None:
    """A measure of a cell; None without applicable images, as for order without right colours."""
    if path == "distance":
        return cell["numbers"]["distance"]
    kind, attribute = path.split(".")
    if kind in ("cost", "gigaflops"):
        return cell[kind][attribute]
    rate = cell["numbers"]["alignment"][kind].get(attribute)
    return None if rate is None else rate["mean"]


def summary(values: Sequence[float | None]) -> dict[str, Any]:
    """Values by seed, their mean, and half the width of its Student 95% interval."""
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
    """A row per arm and choice: `choice`, and the summary and difference of each measure."""
    seeds = sorted({cell["seed"] for cell in cells})
    found = {_key({"arm": cell["arm"], **cell["values"]}, cell["seed"]): cell for cell in cells}
    rows = []
    for cell in cells:
        if cell["seed"] != seeds[0]:
            continue
        choice = {"arm": cell["arm"], **cell["values"]}
        # The row to compare with: the same settings except those of the reference arm.
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
    """Markdown table: mean ± half of the interval; in brackets the paired difference."""
    fields = [
        field
        for field in rows[0]["choice"]
        if len({sweep.format_value(row["choice"][field]) for row in rows}) > 1
    ]
    titles = list(rows[0]["measures"])
    lines = ["| " + " | ".join([*fields, *titles]) + " |"]
    lines.append("|---" * (len(fields) + len(titles)) + "|")
    for row in rows:
        cells = [_choice(row["choice"][field]) for field in fields]
        for title in titles:
            form = FORMS.get(title, ".2f")
            found = row["measures"][title]
            text = format_summary(
                found if title not in GIGAFLOPS else {**found, "half": None}, form
            )
            if title in row["differences"] and title not in {*COSTS, *GIGAFLOPS}:
                text += f" ({format_summary(row['differences'][title], '+' + form)})"
            cells.append(text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _choice(value: Any) -> str:
    return "all" if value in ((), []) else sweep.format_value(value)


def format_summary(found: Mapping[str, Any], form: str) -> str:
    """Mean ± half of the interval of a `summary`; "-" where it has no mean."""
    if found["mean"] is None:
        return "-"
    half = "" if found["half"] is None else f" ± {found['half']:{form.lstrip('+')}}"
    return f"{found['mean']:{form}}{half}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, choices=list(ABLATIONS))
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the diffusion model")
    parser.add_argument("--arms", default="", help="arms to run, such as none,small; empty: all")
    parser.add_argument(
        "--prompts", type=int, default=0, help="number of prompts; 0: that of the ablation"
    )
    parser.add_argument("--demo", required=True, help="run folder of launch/demo.sh")
    parser.add_argument("--out", required=True, help="folder of trainings, samples and numbers")
    parser.add_argument("--docs", default="", help="folder of ablations.md to update")
    for stage, steps in STEPS.items():
        parser.add_argument(
            f"--{stage}_steps", type=int, default=steps, help=f"steps of a training: {steps}"
        )
    flags = parser.parse_args()
    steps = {stage: getattr(flags, f"{stage}_steps") for stage in STEPS}
    seeds = [int(seed) for seed in flags.seeds.split(",")]
    ablation = ABLATIONS[flags.name]
    arms = flags.arms.split(",") if flags.arms else list(ablation.arms)
    for arm in arms:
        if arm not in ablation.arms:
            parser.error(unknown_name("--arms", arm, list(ablation.arms)))
    ablation = ablation._replace(
        arms={arm: ablation.arms[arm] for arm in arms}, count=flags.prompts or ablation.count
    )
    runs = Runs(flags.out, f"{flags.demo}/data", steps)
    jax.config.update("jax_compilation_cache_dir", str(runs.compiled))
    cells = measure(ablation, runs, seeds, f"{flags.demo}/stages/sr")
    rows = tabulate(ablation, cells)
    trained = {
        training._replace(seed=seed)
        for arm in ablation.arms.values()
        for training in arm.stages
        for seed in seeds
    }
    minutes = sum(map(runs.minutes, trained))
    record = {
        "trainings": len(trained),
        "core_minutes": round(minutes, 1),
        "ablation": flags.name,
        "seeds": seeds,
        "steps": steps,
        "prompts": ablation.count,
        "rows": rows,
    }
    text = json.dumps(record, indent=1) + "\n"
    (pathlib.Path(flags.out) / f"{flags.name}.json").write_text(text)
    number = f"{len(trained)} training" + "s" * (len(trained) != 1)
    table = f"{format_table(rows)}\n\n{number}, {minutes:.0f} minutes of a core."
    print(table)
    if flags.docs:
        docs = pathlib.Path(flags.docs)
        (docs / f"ablation_{flags.name}.json").write_text(text)
        reporting.write_between(str(docs / "ablations.md"), flags.name, table)


if __name__ == "__main__":
    main()
