"""Score against distance over guidance weights, as in the paper's Figure 4 (docs/ablations.md).

    python benchmarks/guidance_curves.py --demo=runs/demo --out=runs/ablations --docs=docs

Three panels, one line per arm with a point per guidance weight of the base stage: text encoders,
U-Nets, and thresholding, of the trainings of ablations.py (missing ones are trained). Score: share
of images in which all is right, of prompts of one to four equal objects; distance: Frechet distance
of random convolutions to real images. Both are means over the seeds. Writes
docs/images/guidance_curves.png, its numbers as docs/guidance_curves.json and the best weight of
each arm as a table. Samples for about ten minutes per seed on one CPU core; a killed run resumes.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ablations
import jax
import matplotlib.pyplot as plt
import numpy as np
import reporting
from ablation_runs import Runs
from ablations import Ablation, Arm

WEIGHTS = [1.0, 1.5, 2.0, 3.0, 5.0, 8.0]
CHOICES = {"guidance_weight": WEIGHTS}
MEASURES = {"score": "all.exact", "distance": "distance"}


def _curves(name: str) -> Ablation:
    arms = {
        arm: Arm(own.stages, {"base": CHOICES})
        for arm, own in ablations.ABLATIONS[name].arms.items()
    }
    return Ablation(arms, ablations.ABLATIONS[name].against, ablations.UNIFORM_KINDS, 64, MEASURES)


THRESHOLDING = {
    mode: Arm((ablations.BASE,), {"base": {**CHOICES, "thresholding": [mode]}})
    for mode in ("none", "static", "dynamic")
}
PANELS: dict[str, Ablation] = {
    "text encoder": _curves("encoder_size"),
    "U-Net": _curves("unet_size"),
    "thresholding": Ablation(THRESHOLDING, {}, ablations.UNIFORM_KINDS, 64, MEASURES),
}
Curve = list[dict[str, float]]


def curves(cells: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Arm -> a point per weight: `weight`, and the means over the seeds of `score`, `distance`."""
    found: dict[str, Curve] = {}
    for arm in dict.fromkeys(cell["arm"] for cell in cells):
        own = [cell for cell in cells if cell["arm"] == arm]
        for weight in WEIGHTS:
            same = [cell for cell in own if cell["values"]["base.guidance_weight"] == weight]
            point = {
                title: float(np.mean([ablations.value_of(cell, path) for cell in same]))
                for title, path in MEASURES.items()
            }
            found.setdefault(arm, []).append({"weight": weight, **point})
    return found


def plot(panels: Mapping[str, Mapping[str, Curve]], file: pathlib.Path) -> None:
    """One panel per comparison; distance on a logarithmic axis."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 4.0))
    for axis, (name, lines) in zip(axes, panels.items(), strict=True):
        for arm, points in lines.items():
            x, y = ([point[key] for point in points] for key in ("score", "distance"))
            axis.plot(x, y, marker="o", markersize=4, label=arm)
            for point in (points[0], points[-1]):
                where = (point["score"], point["distance"])
                text = f"w={point['weight']:g}"
                axis.annotate(text, where, (4, 4), textcoords="offset points", size=7)
        axis.set(title=name, xlabel="share of images in which all is right", yscale="log")
        axis.legend(fontsize=8)
    axes[0].set_ylabel("distance to real images")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def table(panels: Mapping[str, Mapping[str, Curve]]) -> str:
    """Markdown: of every arm, score and distance at the weight with the best score."""
    lines = ["| compared | arm | best weight | score | distance | distance, weight 1 |"]
    lines.append("|---|---|---|---|---|---|")
    for name, arms in panels.items():
        for arm, points in arms.items():
            best = max(points, key=lambda point: point["score"])
            numbers = f"{best['weight']:g} | {best['score']:.2f} | {best['distance']:.3f}"
            lines.append(f"| {name} | {arm} | {numbers} | {points[0]['distance']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the diffusion model")
    parser.add_argument("--demo", required=True, help="run folder of launch/demo.sh")
    parser.add_argument("--out", required=True, help="folder of the ablations")
    parser.add_argument("--docs", default="docs", help="folder of ablations.md")
    flags = parser.parse_args()
    runs, docs = Runs(flags.out, f"{flags.demo}/data"), pathlib.Path(flags.docs)
    jax.config.update("jax_compilation_cache_dir", str(runs.compiled))
    seeds = [int(seed) for seed in flags.seeds.split(",")]
    panels = {
        name: curves(ablations.measure(ablation, runs, seeds, f"{flags.demo}/stages/sr"))
        for name, ablation in PANELS.items()
    }
    record = {"seeds": seeds, "prompts": 64, "panels": panels}
    (docs / "guidance_curves.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(panels, docs / "images" / "guidance_curves.png")
    print(table(panels))
    reporting.write_between(str(docs / "ablations.md"), "guidance_curves", table(panels))


if __name__ == "__main__":
    main()
