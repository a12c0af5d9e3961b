"""Score against network evaluations, by sampler, grid and guidance interval (docs/sampling.md).

    python benchmarks/sampler_grids.py --stages=runs/demo/stages/base,runs/demo/stages/sr \
        --first_scene=1000 --out=runs/grids/shapes
    python benchmarks/sampler_grids.py --stages=runs/emoji/stages/base \
        --prompts=runs/emoji/data/prompts_combinations_dev.jsonl --gallery=runs/emoji/data/gallery \
        --match=key --out=runs/grids/emoji

Without --prompts they are of the shapes world's held-out scenes, from --first_scene on; tests of
other pages end before 1,000. The settings are of the first stage; later stages sample as they are.
An image is right if the alignment checker finds everything right or, with a gallery, if the nearest
real image has the prompt's value of the field `match`. The same prompts and noise are sampled with
every setting, so differences to the stage's own settings are paired. A killed run continues from
OUT/scores.json.

Hardware: one CPU core. Time: about 20 minutes for each world.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from imagen_jax import Cascade
from imagen_jax.evaluation import charts, intervals
from imagen_jax.evaluation.retrieval import gallery as gallery_lib
from imagen_jax.inference import prompts
from imagen_jax.io import atomic, images
from imagen_jax.worlds.shapes import alignment, scenes

# Lines of the chart: name -> fields of `sampling`.
SETTINGS: dict[str, dict[str, Any]] = {
    f"{sampler}, {spacing}": {"sampler": sampler, "spacing": spacing}
    for sampler in ("ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "heun")
    for spacing in ("time", "logsnr", "karras", "trailing")
}
INTERVALS: dict[str, dict[str, Any]] = {
    f"logsnr < {high:g}": {"guidance_interval": (-100.0, high)} for high in (-2.0, 1.0)
}
EVALUATIONS = (4, 8, 16, 32, 64)
OWN = "own settings"
Right = Callable[[np.ndarray], np.ndarray]


def right_by_alignment(rows: Sequence[Mapping[str, Any]]) -> Right:
    """Images of the rows' prompts -> whether each is exact."""
    return lambda found: np.array(
        [bool(alignment.score(i, r)["exact"]) for i, r in zip(found, rows, strict=True)]
    )


def right_by_gallery(rows: Sequence[Mapping[str, Any]], folder: str, match: str) -> Right:
    """Images of the rows' prompts -> whether the nearest real image has the row's `match`."""
    real = gallery_lib.read(folder, size=0, at_most=None, fit="center_crop")
    right = gallery_lib.answers(rows, real, match)

    def score(found: np.ndarray) -> np.ndarray:
        size = min(found.shape[1], real.pixels.shape[1])
        both = (np.stack([images.resize_host(i, size) for i in s]) for s in (found, real.pixels))
        own, others = (s.reshape(len(s), -1).astype(np.float32) for s in both)
        distances = (others**2).sum(1) - 2.0 * own @ others.T
        return np.array([n in r for n, r in zip(distances.argmin(1), right, strict=True)])

    return score


def held_out(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Prompts of scenes of the shapes world."""
    numbers = range(args.first_scene, args.first_scene + args.count)
    return [scenes.prompt_row(scenes.scene("held_out", number)) for number in numbers]


def table(scores: Mapping[str, Any], own: Sequence[bool]) -> str:
    """Markdown: a row per setting, a column per number of evaluations."""
    settings = dict.fromkeys(key.rsplit("/", 1)[0] for key in scores if key != OWN)
    counts = sorted({int(key.rsplit("/", 1)[1]) for key in scores if key != OWN})
    lines = ["| setting | " + " | ".join(map(str, counts)) + " |", "|---|" + "---|" * len(counts)]
    for name in settings:
        cells = []
        for count in counts:
            right = scores.get(f"{name}/{count}")
            if right is None:
                cells.append("")
                continue
            difference = np.asarray(right, float) - np.asarray(own, float)
            mean, low, high = intervals.paired_difference(difference, np.arange(len(own)))
            mark = "" if low <= 0.0 <= high else ("+" if mean > 0 else "-")
            cells.append(f"{np.mean(right):.2f}{mark}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def chart(scores: Mapping[str, Any]) -> str:
    """SVG: the share of right images over the number of evaluations, the best grid of a sampler."""
    lines: dict[str, list[charts.Point]] = {}
    for sampler in dict.fromkeys(name.split(",")[0] for name in SETTINGS):
        names = [name for name in SETTINGS if name.startswith(sampler + ",")]
        known = {
            name: {n: scores[f"{name}/{n}"] for n in EVALUATIONS if f"{name}/{n}" in scores}
            for name in names
        }
        best = max(names, key=lambda name: sum(map(np.mean, known[name].values())))
        points = []
        for count, right in known[best].items():
            low, high = intervals.wilson(float(np.sum(right)), float(len(right)))
            points.append(charts.Point(float(count), float(np.mean(right)), low, high))
        if points:
            lines[best] = points
    labels = {"x_label": "evaluations of the network", "y_label": "share of right images"}
    return charts.to_svg(charts.line_chart(lines, title="Score by evaluations", **labels))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--stages", required=True, help="stage folders, separated by commas")
    flags.add_argument("--prompts", default="", help="prompts of a development split")
    flags.add_argument("--first_scene", type=int, default=1000, help="without --prompts")
    flags.add_argument("--gallery", default="", help="folder of real images; '': alignment")
    flags.add_argument("--match", default="key", help="field that names the right image")
    flags.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    flags.add_argument("--count", type=int, default=300, help="prompts")
    flags.add_argument("--seed", type=int, default=0, help="of the noise")
    args = flags.parse_args()
    charts.check_installed()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = prompts.read(args.prompts)[: args.count] if args.prompts else held_out(args)
    right = (
        right_by_gallery(rows, args.gallery, args.match)
        if args.gallery
        else right_by_alignment(rows)
    )
    cascade = Cascade.load(args.stages.split(","))
    first = cascade.configs[0]
    file = args.out / "scores.json"
    scores = json.loads(file.read_text()) if file.is_file() else {}

    def measure(name: str, settings: Mapping[str, Any]) -> None:
        if name in scores:
            return
        found = cascade.sample(
            [row["prompt"] for row in rows],
            seed=args.seed,
            stage_settings={first.name: settings} if settings else {},
        )
        scores[name] = right(found).tolist()
        atomic.write_json(file, scores)
        print(f"{name}: {np.mean(scores[name]):.3f}", file=sys.stderr, flush=True)

    measure(OWN, {})
    for name, settings in SETTINGS.items():
        for count in EVALUATIONS:
            steps = count // 2 if settings["sampler"] == "heun" else count
            measure(f"{name}/{count}", {**settings, "steps": steps})
    for name, settings in INTERVALS.items():
        for weight in (1.5, 3.0, 5.0):
            own_steps = first.sampling.steps
            weighted = {**settings, "guidance_weight": weight}
            measure(f"weight {weight:g}, {name}/{own_steps}", weighted)
    print(f"{OWN}: {np.mean(scores[OWN]):.3f} of {len(rows)}; + and -: differs from it (95%)\n")
    print(table(scores, scores[OWN]))
    (args.out / "evaluations.svg").write_text(chart(scores))


if __name__ == "__main__":
    main()
