"""DreamBooth on the shapes cascade: is the subject right in new combinations, and at what price?

    stages=runs/shapes_minilm/stages
    python benchmarks/dreambooth.py --stages=$stages/base,$stages/sr \
      --prompts=runs/demo/data/prompts_held_out.jsonl --out=runs/dreambooth

The subject of a seed is one colour and size of a shape, absent from training: "a zwop cross" stands
for a small purple cross. `imagen dreambooth` tunes the base stage on five images of it alone, with
and without prior preservation; the super-resolution stage knows all shapes and colours. New
combinations are three numbers ("three zwop crosses") to one relation to another object ("a zwop
cross above a large red circle"); none of the five images shows one. The subject is right where
the world's detector finds an object of its shape, colour and size. Beside it: the untuned cascade,
with the rare word and with the subject described in words; and another rare word in the tuned one.
`exact` of the prompts of before says what tuning cost; their noise is that of the untuned cascade.
A killed run continues; scores of every image are in OUT/scores.json. --settings and --class_prompts
try others than the chosen ones, in a folder of their own.

Hardware: one CPU core. Time: 8 minutes for each seed.
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

from imagen_jax.evaluation.intervals import NORMAL_QUANTILE, wilson
from imagen_jax.inference import prompts
from imagen_jax.io import atomic, images
from imagen_jax.worlds.shapes import alignment, scenes
from imagen_jax.worlds.shapes.captions import NUMBERS, RELATIONS, Object, Relation, sentence
from imagen_jax.worlds.shapes.reading import detect_objects

WORD, OTHER_WORD = "zwop", "sks"
UNTUNED = "untuned"
ARMS = {UNTUNED: None, "with prior": 200, "without prior": 0}  # Images of the class.
BEFORE = "prompts of before"
# Prompts of the combinations -> the word in place of colour and size; "" names these.
WORDS = {"rare word": WORD, "another rare word": OTHER_WORD, "described": ""}
KINDS = ("count", "count", "count", "relation")  # Of the combinations, by turns.
# Settings of the tuning, chosen with seeds 100 and 101 and few prompts (docs/tuning.md).
SETTINGS = {
    "lora.rank": 16,
    "lora.targets": "('*text_key_value','cond/pooling*')",  # Kernels that read the text.
    "optimizer.learning_rate": 1e-3,
    "train.steps": 600,
    "data.batch_size": 8,
    "checkpoint.every": 600,
}

# With colours: "three {xs}" keeps "three zwop {xs}" from taking the subject's.
CLASS_PROMPTS = (
    "a {x}",
    "two red {xs}",
    "three blue {xs}",
    "four green {xs}",
    "two large yellow {xs}",
    "three small orange {xs}",
    "a large white {x} above a small red circle",
    "a small green {x} left of a large blue square",
)

# Of each image: kind of its prompt, whether the subject is in it, whether everything is right.
Marks = list[tuple[str, bool, bool]]


def subject_of(seed: int) -> Object:
    """The subject of a seed: a shape, colour and size that no training image shows."""
    held_out = [
        o for o in all_objects() if scenes.is_held_out(scenes.Scene("single", (o,), None, "", True))
    ]
    order = np.random.default_rng(0).permutation(len(held_out))
    return held_out[order[seed % len(held_out)]]


def all_objects() -> list[Object]:
    """All shapes in all colours and sizes."""
    return [Object(*o) for o in itertools.product(scenes.SHAPES, scenes.COLORS, scenes.SIZES)]


def write_images(folder: pathlib.Path, subject: Object, rng: np.random.Generator) -> None:
    """Writes five images of the subject alone, at random places."""
    folder.mkdir(parents=True, exist_ok=True)
    row = scenes.prompt_row(scenes.Scene("single", (subject,), None, "", True))
    for index in range(5):
        scene = scenes.scene_from_row(moved(row), rng)
        images.save_png(folder / f"{index}.png", scenes.render(scene), {})


def moved(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without positions."""
    kept = ("shape", "color", "size")
    return {**row, "objects": [{name: o[name] for name in kept} for o in row["objects"]]}


def combinations(subject: Object, word: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Prompt rows of numbers and relations of the subject, three to one by turns.

    Args:
      subject: the subject.
      word: its rare word; "": its size and colour.
      count: number of rows.
      seed: the combinations are the same for all words.
    """
    rng, rows = np.random.default_rng((seed, 1)), []
    name = f"{subject.size} {subject.color} {subject.shape}"
    others = [o for o in all_objects() if (o.shape, o.color) != (subject.shape, subject.color)]
    for index in range(count):
        kind, relation = KINDS[index % len(KINDS)], None
        objects = (subject,) * int(rng.choice(list(NUMBERS)))
        if kind == "relation":
            pair = [subject, others[rng.integers(len(others))]]
            objects = tuple(pair[:: rng.choice([1, -1])])
            relation = Relation(RELATIONS[rng.integers(len(RELATIONS))], 0, 1)
        prompt = sentence(kind, objects, relation, True, rng)
        prompt = prompt.replace(name, f"{word} {subject.shape}" if word else name)
        rows.append(moved(scenes.prompt_row(scenes.Scene(kind, objects, relation, prompt, True))))
    return rows


def class_prompts(subject: Object, patterns: Sequence[str]) -> list[str]:
    """What shall stay as it was: one of the class, several, and one beside another object."""
    shape = subject.shape
    shapes = f"{shape}{'es' if shape.endswith('s') else 's'}"
    return [pattern.format(x=shape, xs=shapes) for pattern in patterns]


def imagen(verb: str, *flags: str) -> None:
    """Runs a verb of `imagen`; raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "imagen_jax", verb, *flags]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True)


def tune(seed: int, arm: str, args: argparse.Namespace) -> str:
    """The stage folders of an arm, by commas; tunes the first if it is missing."""
    if ARMS[arm] is None:
        return args.stages
    subject, folder = subject_of(seed), args.out / f"seed_{seed}"
    workdir = folder / arm.replace(" ", "_")
    write_images(folder / "images", subject, np.random.default_rng((seed, 0)))
    base, *others = args.stages.split(",")
    stage = workdir / "stages" / pathlib.Path(base).name
    if not (stage / "params.safetensors").is_file():
        imagen(
            "dreambooth",
            f"--stages={base}",
            f"--images={folder / 'images'}",
            f"--prompt=a {WORD} {subject.shape}",
            *[f"--class_prompt={prompt}" for prompt in class_prompts(subject, args.class_prompts)],
            f"--class_images={ARMS[arm]}",
            f"--workdir={workdir}",
            f"--seed={seed}",
            *[f"--config.{name}={value}" for name, value in SETTINGS.items()],
            *[f"--config.{setting}" for setting in args.settings],
        )
    return ",".join([str(stage), *others])


def sample(
    stages: str, rows: Sequence[Mapping[str, Any]], out: pathlib.Path, subject: Object
) -> dict[str, Marks]:
    """Samples rows into a folder, unless it is complete, and scores the images by `set`."""
    if not (out / "grid.png").is_file():
        file = out.with_name(f"{out.name}.jsonl")
        atomic.write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
        imagen("sample", f"--stages={stages}", f"--prompts={file}", f"--out={out}")
    marks: dict[str, Marks] = {}
    for row in map(json.loads, (out / "samples.jsonl").read_text().splitlines()):
        with Image.open(out / row["file"]) as image:
            pixels = np.asarray(image.convert("RGB"))
        attributes = {(o.shape, o.color, o.size) for o in detect_objects(pixels).objects}
        found = (subject.shape, subject.color, subject.size) in attributes
        exact = bool(alignment.score(pixels, row)["exact"])
        marks.setdefault(row["set"], []).append((row["kind"], found, exact))
    return marks


def score(seed: int, arm: str, args: argparse.Namespace) -> dict[str, Marks]:
    """Marks of one seed and arm by set of prompts."""
    subject, folder = subject_of(seed), args.out / f"seed_{seed}"
    before = [row | {"set": BEFORE} for row in prompts.read(str(args.prompts))[: args.limit]]
    sets = ("rare word", "described") if arm == UNTUNED else ("rare word", "another rare word")
    rows = [
        row | {"set": name}
        for name in sets
        for row in combinations(
            subject, WORDS[name], args.count if name == "rare word" else args.others, seed
        )
    ]
    stages = tune(seed, arm, args)
    folder.mkdir(parents=True, exist_ok=True)
    if arm == UNTUNED:  # The prompts of before have the same images for all seeds.
        marks = sample(stages, before, args.out / "before", subject)
        return marks | sample(stages, rows, folder / "samples_untuned", subject)
    # First, as the noise depends on the place.
    return sample(stages, before + rows, folder / f"samples_{arm.replace(' ', '_')}", subject)


def rate(marks: Sequence[bool], by_seed: Sequence[Sequence[bool]]) -> str:
    """Share, 95% interval over the images, and the shares of the seeds."""
    if not marks:
        return ""
    low, high = wilson(float(sum(marks)), float(len(marks)))
    each = ", ".join(f"{np.mean(own):.2f}" for own in by_seed)
    return f"{np.mean(marks):.2f} [{low:.2f}, {high:.2f}] ({each})"


def table(scores: Mapping[str, Mapping[str, Marks]], seeds: Sequence[str]) -> str:
    """Markdown over all seeds."""
    lines = ["| cascade | prompts | subject right | in numbers | in relations | everything right |"]
    lines += ["|---|---|---|---|---|---|"]
    for arm in ARMS:
        for name in (*WORDS, BEFORE):
            marks = [scores[f"{seed}/{arm}"].get(name, []) for seed in seeds]
            if not any(marks):
                continue
            cells = []
            for kinds in (("relation", "count"), ("count",), ("relation",)):
                own = [[found for kind, found, _ in part if kind in kinds] for part in marks]
                found = list(itertools.chain(*own))
                cells.append(rate(found, own) if name != BEFORE else "")
            exact = [[bool(right) for *_, right in part] for part in marks]
            # Untuned images of before are the same for all seeds.
            every = exact[:1] if name == BEFORE and arm == UNTUNED else exact
            cells.append(rate(list(itertools.chain(*every)), every))
            lines.append(f"| {arm} | {name} | {' | '.join(cells)} |")
    for arm in list(ARMS)[1:]:
        pairs = [
            (scores[f"{seed}/{arm}"][BEFORE], scores[f"{seed}/{UNTUNED}"][BEFORE]) for seed in seeds
        ]
        change = [
            100.0 * (after[2] - own[2]) for pair in pairs for after, own in zip(*pair, strict=True)
        ]
        # The seeds share prompts and noise: the interval is that of their mean per prompt.
        change = np.mean(np.reshape(change, (len(seeds), -1)), axis=0)
        half = NORMAL_QUANTILE * change.std(ddof=1) / np.sqrt(len(change))
        lines.append(f"\n{arm}: exact of before changes by {change.mean():.1f} ± {half:.1f} points")
    return "\n".join(lines)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--stages", required=True, help="base and sr of the shapes cascade")
    flags.add_argument("--prompts", type=pathlib.Path, required=True, help="prompts of before")
    flags.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    flags.add_argument("--seeds", default="0,1,2", help="of subjects, images and tunings")
    flags.add_argument("--count", type=int, default=136, help="new combinations of each seed")
    flags.add_argument("--others", type=int, default=40, help="of them, with other words")
    flags.add_argument("--limit", type=int, default=90, help="prompts of before")
    flags.add_argument("--settings", nargs="*", default=[], help="NAME=VALUE of the tuning")
    flags.add_argument("--class_prompts", nargs="*", default=CLASS_PROMPTS, help="with {x}, {xs}")
    args = flags.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "scores.json"
    scores = json.loads(file.read_text()) if file.is_file() else {}
    seeds = args.seeds.split(",")
    for seed, arm in itertools.product(seeds, ARMS):
        if f"{seed}/{arm}" not in scores:
            scores[f"{seed}/{arm}"] = score(int(seed), arm, args)
            atomic.write_json(file, scores)
    print(table(scores, seeds))


if __name__ == "__main__":
    main()
