"""DreamBooth on the shapes cascade: is the subject right in new combinations, and at what price?

    python benchmarks/dreambooth.py --stages=runs/demo/stages/base,runs/demo/stages/sr \
      --prompts=runs/demo/data/prompts_held_out.jsonl --out=runs/dreambooth

The subject of a seed is one colour and size of a shape, absent from training: "a sks cross" stands
for a small purple cross. `imagen dreambooth` reads five images of it alone, with and without prior
preservation. New combinations are relations to another object ("a sks cross above a large red
circle"), which none of the five shows. The subject is right where the world's detector finds an
object of its shape, colour and size. Beside it: the same prompts from the untuned cascade, and with
another rare word from the tuned one. `exact` of the prompts of before says what tuning cost.
A killed run continues; scores are in OUT/scores.json.

Hardware: one CPU core. Time: 20 minutes for each seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from imagen_jax.evaluation.intervals import wilson
from imagen_jax.io import atomic, images
from imagen_jax.worlds.shapes import alignment, scenes
from imagen_jax.worlds.shapes.captions import RELATIONS, Object
from imagen_jax.worlds.shapes.reading import detect_objects

WORD, OTHER_WORD = "sks", "zwop"
ARMS = {"untuned": None, "with prior": 100, "without prior": 0}  # Images of the class.
# Settings of the tuning, chosen with seed 100.
SETTINGS = {
    "lora.rank": 16,
    "lora.targets": "('*',)",
    "optimizer.learning_rate": 1e-3,
    "train.steps": 400,
    "data.batch_size": 8,
    "checkpoint.every": 400,
}


def subject_of(seed: int) -> Object:
    """The subject of a seed: a shape, colour and size that no training image shows."""
    triples = itertools.product(scenes.SHAPES, scenes.COLORS, scenes.SIZES)
    objects = [Object(*triple, 0.0, 0.0) for triple in triples]
    held_out = [
        o for o in objects if scenes.is_held_out(scenes.Scene("single", (o,), None, "", True))
    ]
    order = np.random.default_rng(0).permutation(len(held_out))
    return held_out[order[seed % len(held_out)]]


def row_of(prompt: str, objects: Sequence[Mapping[str, str]], word: str | None = None) -> dict:
    """A row of `prompts.jsonl`, of a single object or of a relation."""
    relation = {"word": word, "first": 0, "second": 1} if word else None
    return {
        "prompt": prompt,
        "kind": "relation" if word else "single",
        "objects": list(objects),
        "relation": relation,
    }


def named(thing: Object) -> dict[str, str]:
    """The attributes of an object that a prompt specifies."""
    return {"shape": thing.shape, "color": thing.color, "size": thing.size}


def write_images(folder: pathlib.Path, subject: Object, rng: np.random.Generator) -> None:
    """Writes five images of the subject alone, at random places."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(5):
        scene = scenes.scene_from_row(row_of("", [named(subject)]), rng)
        images.save_png(folder / f"{index}.png", scenes.render(scene), {})


def combinations(subject: Object, word: str, count: int, rng: np.random.Generator) -> list[dict]:
    """Prompt rows in which the subject stands in a relation to another object, first or second."""
    others = itertools.product(scenes.SHAPES, scenes.COLORS, scenes.SIZES)
    objects = [Object(*triple, 0.0, 0.0) for triple in others]
    objects = [o for o in objects if (o.shape, o.color) != (subject.shape, subject.color)]
    cases = list(itertools.product(objects, RELATIONS, (True, False)))
    rows, own = [], f"a {word} {subject.shape}"
    for case in rng.choice(len(cases), count, replace=False):
        other, relation, first = cases[case]
        phrases = [own, f"a {other.size} {other.color} {other.shape}"]
        things = [named(subject), named(other)]
        if not first:
            phrases, things = phrases[::-1], things[::-1]
        rows.append(row_of(f"{phrases[0]} {relation} {phrases[1]}", things, relation))
    return rows


def imagen(verb: str, *flags: str) -> None:
    """Runs a verb of `imagen`; raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "imagen_jax", verb, *flags]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True)


def tune(seed: int, arm: str, folder: pathlib.Path, args: argparse.Namespace) -> str:
    """The stage folders of an arm, by commas; tunes them if they are missing."""
    if ARMS[arm] is None:
        return args.stages
    subject, workdir = subject_of(seed), folder / arm.replace(" ", "_")
    flags = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    imagen(
        "dreambooth",
        f"--stages={args.stages}",
        f"--images={folder / 'images'}",
        f"--prompt=a {WORD} {subject.shape}",
        f"--class_prompt=a {subject.shape}",
        f"--class_images={ARMS[arm]}",
        f"--workdir={workdir}",
        f"--seed={seed}",
        *flags,
    )
    return ",".join(str(path) for path in (workdir / "stages" / "base", workdir / "stages" / "sr"))


def sample(stages: str, prompts: pathlib.Path, out: pathlib.Path, seed: int, limit: int) -> None:
    """Samples prompts into a folder, unless it is complete."""
    if not (out / "grid.png").is_file():
        flags = [f"--stages={stages}", f"--prompts={prompts}", f"--out={out}", f"--seed={seed}"]
        imagen("sample", *flags, f"--limit={limit}")


def subject_hits(out: pathlib.Path, subject: Object) -> int:
    """Number of images in which the subject is found."""
    lines = (out / "samples.jsonl").read_text().splitlines()
    hits = 0
    for row in map(json.loads, lines):
        with Image.open(out / row["file"]) as image:
            found = detect_objects(np.asarray(image.convert("RGB"))).objects
        hits += any(named(subject) == named(thing) for thing in found)  # pyright: ignore[reportArgumentType]
    return hits


def score(seed: int, arm: str, args: argparse.Namespace) -> dict[str, Any]:
    """Counts of one seed and arm: [hits, images] of the subject, of the other word, and exact."""
    folder, subject = args.out / f"seed_{seed}", subject_of(seed)
    write_images(folder / "images", subject, np.random.default_rng((seed, 0)))
    stages = tune(seed, arm, folder, args)
    found: dict[str, Any] = {}
    for name, word in (("subject", WORD), ("other word", OTHER_WORD)):
        rows = combinations(subject, word, args.count, np.random.default_rng((seed, 1)))
        prompts = folder / f"prompts_{word}.jsonl"
        atomic.write_text(prompts, "".join(json.dumps(row) + "\n" for row in rows))
        out = folder / f"{arm.replace(' ', '_')}_{word}"
        sample(stages, prompts, out, seed, args.count)
        found[name] = [subject_hits(out, subject), args.count]
    out = folder / f"{arm.replace(' ', '_')}_before"
    sample(stages, args.prompts, out, seed, args.limit)
    exact = alignment.score_folder(out)["all"]["exact"]
    found["before"] = [round(exact["mean"] * exact["n"]), exact["n"]]
    return found


def table(scores: Mapping[str, Mapping[str, list[int]]], seeds: Sequence[str]) -> str:
    """Markdown over all seeds, with 95% intervals over the prompts."""
    lines = ["| cascade | subject right | other rare word | prompts of before, exact |"]
    lines += ["|---|---|---|---|"]
    for arm in ARMS:
        cells = []
        for name in ("subject", "other word", "before"):
            counts = [scores[f"{seed}/{arm}"][name] for seed in seeds]
            hits, n = (sum(column) for column in zip(*counts, strict=True))
            low, high = wilson(float(hits), float(n))
            each = ", ".join(f"{own / all_:.2f}" for own, all_ in counts)
            cells.append(f"{hits / n:.3f} [{low:.3f}, {high:.3f}] ({each})")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--stages", required=True, help="base and sr of the shapes cascade")
    flags.add_argument("--prompts", type=pathlib.Path, required=True, help="prompts of before")
    flags.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    flags.add_argument("--seeds", default="0,1,2", help="of subjects, tunings and samples")
    flags.add_argument("--count", type=int, default=100, help="new combinations of each seed")
    flags.add_argument("--limit", type=int, default=240, help="prompts of before")
    args = flags.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "scores.json"
    scores = json.loads(file.read_text()) if file.is_file() else {}
    seeds = args.seeds.split(",")
    for seed, arm in itertools.product(seeds, ARMS):
        if f"{seed}/{arm}" not in scores:
            scores[f"{seed}/{arm}"] = score(int(seed), arm, args)
            atomic.write_json(file, scores)
            print(f"seed {seed}, {arm}: {scores[f'{seed}/{arm}']}", flush=True)
    print(table(scores, seeds))


if __name__ == "__main__":
    main()
