"""Distilled cascades beside their teacher: score, diversity and speed (docs/distillation.md).

    python benchmarks/students.py run --stages=runs/emoji/stages --students=runs/emoji/distilled \\
        --prompts=runs/emoji/data/prompts_names_test.jsonl --gallery=runs/emoji/data/gallery \\
        --match=key --out=runs/students/emoji_0.json
    python benchmarks/students.py run --stages=runs/demo/stages --students=runs/demo/distilled \\
        --scenes=1000 --out=runs/students/shapes_0.json
    python benchmarks/students.py table runs/students/shapes_*.json

`run` samples every prompt once with the teacher and with each pair of a base and a super-resolution
student, with the same noise, and scores the images as benchmarks/sampler_grids.py does. --scenes:
prompts of the shapes world's held-out scenes. --guidance_steps: the same of base_guidance, which
has learned guidance alone, with so many steps of --guidance_sampler; --base_steps= is none of the
others. Diversity is the distance of two samples of a prompt, the root of the mean squared
difference of their pixels, in 0..1; of the shapes world also that of two real images of the prompt.
A killed run continues from its file. `table` averages runs of several seeds; intervals are over
prompts, and the lowest and highest run is beside.

Hardware: one CPU core. Time: about 15 minutes for 1,000 prompts and nine pairs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import reporting
import sampler_grids

from imagen_jax import Cascade
from imagen_jax.evaluation import intervals
from imagen_jax.inference import prompts
from imagen_jax.io import atomic
from imagen_jax.worlds.shapes import scenes

TEACHER = "teacher"
DIVERSE, SAMPLES = 100, 4  # Prompts, and samples of each.
TIMED = 16  # Images of a timed call.
ROUNDS = 5


def distance(images: Sequence[np.ndarray]) -> list[float]:
    """Mean distance of pairs of samples, by prompt; `images` has an array of prompts per sample."""
    floats = [one.astype(np.float32) / 255.0 for one in images]
    pairs = [np.sqrt(((a - b) ** 2).mean((1, 2, 3))) for a, b in itertools.combinations(floats, 2)]
    return np.mean(pairs, 0).tolist()


def real_distance(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """`distance` of rendered scenes of the prompts."""
    rng = np.random.default_rng(0)
    shown = [
        np.stack([scenes.render(scenes.scene_from_row(without_places(row), rng)) for row in rows])
        for _ in range(SAMPLES)
    ]
    return distance(shown)


def without_places(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a scene whose objects may be anywhere."""
    objects = [{k: v for k, v in one.items() if k not in ("x", "y")} for one in row["objects"]]
    return {**row, "objects": objects}


def score(
    sample: Callable[..., np.ndarray], rows: Sequence[Mapping[str, Any]], right: Any
) -> dict[str, list]:
    """Which images are right, and the distance of the samples of the first prompts."""
    texts = [row["prompt"] for row in rows]
    found = right(sample(texts, seed=0)).tolist()
    images = [sample(texts[:DIVERSE], seed=1 + n) for n in range(SAMPLES)]
    return {"right": found, "distance": distance(images)}


def cascades_of(flags: argparse.Namespace) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """By name: the stage folders of the teacher and of all pairs, and settings by stage."""
    teacher = [f"{flags.stages}/base", f"{flags.stages}/sr"]
    found = {TEACHER: (teacher, json.loads(flags.teacher_settings))}
    for sr in flags.sr_steps.split(","):
        student = f"{flags.students}/sr_{sr}"
        for base in filter(None, flags.base_steps.split(",")):
            own = {"base": {"sampler": flags.base_sampler}} if flags.base_sampler else {}
            found[f"{base} + {sr}"] = ([f"{flags.students}/base_{base}", student], own)
        for base in filter(None, flags.guidance_steps.split(",")):
            own = {"base": {"sampler": flags.guidance_sampler, "steps": int(base)}}
            found[f"guidance, {base} + {sr}"] = ([f"{flags.students}/base_guidance", student], own)
    return found


def run(flags: argparse.Namespace) -> None:
    """Scores the teacher and all pairs of students, then times them in turns."""
    if flags.scenes:
        rows = [scenes.prompt_row(scenes.scene("held_out", i)) for i in range(flags.scenes)]
    else:
        rows = [row for path in flags.prompts.split(",") for row in prompts.read(path)]
    right = (
        sampler_grids.right_by_gallery(rows, flags.gallery, flags.match)
        if flags.gallery
        else sampler_grids.right_by_alignment(rows)
    )
    result = json.loads(flags.out.read_text()) if flags.out.is_file() else {}
    cascades = {}
    for name, (stages, settings) in cascades_of(flags).items():
        cascade = Cascade.load(stages)

        def sample(
            texts: Sequence[str], cascade=cascade, settings=settings, **fields: Any
        ) -> np.ndarray:
            return cascade.sample(texts, stage_settings=settings, **fields)

        cascades[name] = sample
        if name not in result:
            result[name] = score(sample, rows, right)
            atomic.write_json(flags.out, result)
            print(f"{name}: {np.mean(result[name]['right']):.3f}", file=sys.stderr, flush=True)
    if not flags.gallery and "real" not in result:
        result["real"] = {"distance": real_distance(rows[:DIVERSE])}
    texts = [row["prompt"] for row in rows[:TIMED]]
    calls = {name: lambda s=sample: s(texts, seed=0) for name, sample in cascades.items()}
    for name, seconds in reporting.interleaved(calls, ROUNDS).items():
        result[name]["seconds"] = seconds
    atomic.write_json(flags.out, result)
    print(table([result]))


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row per cascade, over the runs."""
    teachers = [result[TEACHER] for result in results]
    rows = []
    for name in results[0]:
        own = [result[name] for result in results]
        spread = np.mean([np.mean(o["distance"]) for o in own])
        relative = [
            np.mean(o["distance"]) / np.mean(t["distance"])
            for o, t in zip(own, teachers, strict=True)
        ]
        row = [name, "", "", "", f"{spread:.3f}", span(relative), ""]
        if "right" in own[0]:
            row[1] = f"{np.mean([o['right'] for o in own]):.3f}"
        if "right" in own[0] and name != TEACHER:
            differences = [
                np.subtract(o["right"], t["right"], dtype=float)
                for o, t in zip(own, teachers, strict=True)
            ]
            over = np.mean(differences, 0)
            mean, low, high = intervals.paired_difference(over, np.arange(len(over)))
            row[2] = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
            row[3] = span([np.mean(d) for d in differences], "+.3f")
        if "seconds" in own[0]:
            faster = [
                statistics.median(np.divide(t["seconds"], o["seconds"]))
                for o, t in zip(own, teachers, strict=True)
            ]
            row[6] = span(faster)
        rows.append(row)
    titles = ("base + SR steps", "right", "difference, 95%", "of the runs", "distance")
    titles += ("distance / teacher's", "times as fast")
    return reporting.table(titles, rows)


def span(values: Sequence[float], form: str = ".2f") -> str:
    """The mean, with the lowest and the highest of several."""
    mean = f"{np.mean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    flags = parts.add_parser("run", help="score and time one teacher and its students")
    flags.add_argument("--stages", required=True, help="folder with the teacher's base and sr")
    flags.add_argument("--students", required=True, help="folder of launch/distill.sh")
    flags.add_argument("--base_steps", default="8,4,2")
    flags.add_argument("--sr_steps", default="4,2,1")
    flags.add_argument("--base_sampler", default="", help="of the base students; '': ddim")
    flags.add_argument("--guidance_steps", default="", help="steps with the base of guidance")
    flags.add_argument("--guidance_sampler", default="ddim", help="of these steps")
    flags.add_argument("--teacher_settings", default="{}", help="JSON: fields of sampling by stage")
    flags.add_argument("--prompts", default="", help="JSONL files of a test split, by commas")
    flags.add_argument("--scenes", type=int, default=0, help="prompts of the shapes world")
    flags.add_argument("--gallery", default="", help="folder of real images; '': alignment")
    flags.add_argument("--match", default="key", help="field that names the right image")
    flags.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    parts.add_parser("table", help="average runs").add_argument("runs", nargs="+")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse(sys.argv[1:])
    if args.part == "run":
        args.out.parent.mkdir(parents=True, exist_ok=True)
        run(args)
    else:
        print(table([json.loads(pathlib.Path(path).read_text()) for path in args.runs]))


if __name__ == "__main__":
    main()
