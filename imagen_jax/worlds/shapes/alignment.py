"""Text alignment on the shapes world: whether an image shows what its prompt specifies.

`score` compares the objects that `reading` detects with a prompt row. `evaluate` scores a folder of
samples beside two yardsticks: the `ceiling` (real images of the same rows) and the `chance` (the
same samples, rows shuffled). It replaces the paper's human alignment ratings (Sec. 4.3).
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from imagen_jax.config.fields import unknown_name
from imagen_jax.evaluation import intervals, samples
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.worlds.shapes import scenes
from imagen_jax.worlds.shapes.letters import LETTERS
from imagen_jax.worlds.shapes.reading import Detection, Detections, detect_objects

ATTRIBUTES = (
    "exact",
    "colour",
    "shape",
    "size",
    "count",
    "binding",
    "relation",
    "order",
    "spelling",
)
# Largest vertical distance of the letter centres of a level word, pixels of a 64-pixel image.
MAX_UNEVENNESS = 3.0
SEED = 0
TITLE = "Alignment on the shapes world"
Score = dict[str, bool | None]
_PARTS = ("scores", "ceiling", "chance")


def score(image: UInt8[np.ndarray, "size size 3"], row: Mapping[str, Any]) -> Score:
    """Compares an image with a prompt row.

    Args:
      image: RGB, 0..255.
      row: `objects` (shape, color, and size if the prompt names it) and `relation`; for the kind
        "word", the objects are its letters from left to right.

    Returns:
      A truth value for each of ATTRIBUTES.
      colour, shape, size: the set of values in the image equals that of the row.
      count: the number of objects is right.
      binding: every expected object is present as one object.
      relation: it holds, and the offset along its axis exceeds the one across.
      order: the relation holds rather than its mirror image.
      spelling: the letters from left to right, on one level, are the word.
      exact: everything is right, and the image shows nothing else.
      None if the row does not specify the attribute (size, relation, spelling), and for order if
      colours are wrong or the two objects cannot be distinguished.
    """
    return compare(_detect_for(row, image), row)


def _detect_for(row: Mapping[str, Any], image: UInt8[np.ndarray, "size size 3"]) -> Detections:
    return detect_objects(image, LETTERS if row.get("kind") == "word" else scenes.SHAPES)


def compare(detections: Detections, row: Mapping[str, Any]) -> Score:
    """`score` for given detections."""
    found, expected = detections.objects, row["objects"]
    marks: Score = {
        "colour": {thing.color for thing in found} == {thing["color"] for thing in expected},
        "shape": {thing.shape for thing in found} == {thing["shape"] for thing in expected},
        "size": _sizes_agree(found, expected),
        "count": len(found) == len(expected),
        "binding": _all_bound(found, expected),
        "relation": None,
        "order": None,
        "spelling": _spells(found, expected) if row.get("kind") == "word" else None,
    }
    if row.get("relation"):
        along, across = _distance(found, expected, row["relation"])
        marks["relation"] = along > across
        marks["order"] = along > 0 if marks["colour"] and not math.isnan(along) else None
    right = all(mark for mark in marks.values() if mark is not None)
    return {"exact": right and detections.strays == 0, **marks}


def _sizes_agree(found: Sequence[Detection], expected: Sequence[Mapping[str, Any]]) -> bool | None:
    named = {thing["size"] for thing in expected if thing.get("size")}
    if not named:
        return None
    seen = {thing.size for thing in found}
    all_named = all(thing.get("size") for thing in expected)
    return seen == named if all_named else named <= seen


def _all_bound(found: Sequence[Detection], expected: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the expected objects can be matched one-to-one with detections."""
    free = list(found)
    # Objects with a named size first; the others match any remaining size.
    for thing in sorted(expected, key=lambda thing: not thing.get("size")):
        values = (thing["color"], thing["shape"], thing.get("size"))
        fitting = [
            f for f in free if values in ((f.color, f.shape, f.size), (f.color, f.shape, None))
        ]
        if not fitting:
            return False
        free.remove(fitting[0])
    return True


def _spells(found: Sequence[Detection], expected: Sequence[Mapping[str, Any]]) -> bool:
    heights = [thing.y for thing in found]
    level = bool(found) and max(heights) - min(heights) <= MAX_UNEVENNESS
    letters = [thing.shape for thing in sorted(found, key=lambda thing: thing.x)]
    return level and letters == [thing["shape"] for thing in expected]


def _distance(
    found: Sequence[Detection], expected: Sequence[Mapping[str, Any]], relation: Mapping[str, Any]
) -> tuple[float, float]:
    """Offset between the two objects along the relation's direction and across it, pixels.

    Objects are identified by colour, or by shape if the colours are equal; NaN if ambiguous.
    """
    first, second = expected[relation["first"]], expected[relation["second"]]
    key = "color" if first["color"] != second["color"] else "shape"
    firsts = [thing for thing in found if getattr(thing, key) == first[key]]
    seconds = [thing for thing in found if getattr(thing, key) == second[key]]
    if len(firsts) != 1 or len(seconds) != 1:
        return math.nan, math.nan
    offset = (seconds[0].x - firsts[0].x, seconds[0].y - firsts[0].y)
    axis = scenes.AXIS[relation["word"]]
    sign = 1 if relation["word"] in ("left of", "above") else -1
    return sign * offset[axis], abs(offset[1 - axis])


def evaluate(samples_dir: str | os.PathLike[str], by: str = "kind") -> dict[str, Any]:
    """Scores the images of a folder written by `sample`.

    Args:
      samples_dir: holds samples.jsonl, whose rows have `file` and the fields of a prompt row.
      by: row field that groups the prompts: kind, or DrawBench's category.

    Returns:
      `title`, `pictures` and `kinds`: for each group and for `all` `n` and, under `scores`,
      `ceiling` (real images of the same rows and size) and `chance` (rows shuffled within the
      group; for order only the relation's word), the mean, 95% Wilson interval and n of every
      attribute. The interval is over prompts.

    Raises:
      EvaluationError: a file is missing, or a row does not specify its image.
    """
    folder = pathlib.Path(samples_dir)
    rows = _read_rows(folder, by)
    by_kind: dict[str, list[_Sample]] = {}
    for index, row in enumerate(rows):
        generated, rng = _load(folder, row["file"]), np.random.default_rng((SEED, index))
        real = scenes.render(scenes.scene_from_row(row, rng), len(generated))
        sample = _Sample(row, _detect_for(row, generated), _detect_for(row, real))
        by_kind.setdefault(row[by], []).append(sample)
    report = {kind: _marks_of(by_kind[kind]) for kind in sorted(by_kind)}
    if len(report) > 1:
        report["all"] = [marks for parts in report.values() for marks in parts]
    return {
        "title": TITLE,
        "pictures": len(rows),
        "kinds": {kind: _tally(m) for kind, m in report.items()},
    }


def score_folder(samples_dir: str | os.PathLike[str]) -> dict[str, dict[str, dict[str, float]]]:
    """The `scores` of `evaluate` by kind of prompt, without yardsticks, in half the time.

    Raises:
      EvaluationError: as `evaluate`.
    """
    folder = pathlib.Path(samples_dir)
    marks: dict[str, list[tuple[str, Score]]] = {}
    for row in _read_rows(folder, "kind"):
        own = score(_load(folder, row["file"]), row)
        marks.setdefault(row["kind"], []).append((row["prompt"], own))
    marks = dict(sorted(marks.items()))
    if len(marks) > 1:
        marks["all"] = [mark for kind in list(marks) for mark in marks[kind]]
    return {kind: _rates(scores) for kind, scores in marks.items()}


@dataclasses.dataclass(frozen=True)
class _Sample:
    row: Mapping[str, Any]
    generated: Detections
    real: Detections


def _marks_of(samples: Sequence[_Sample]) -> list[tuple[str, dict[str, Score]]]:
    """Prompt and marks of the samples of one group: their own, of real images, by chance."""
    others = [sample.row for sample in samples]
    random.Random(SEED).shuffle(others)
    marks = []
    for sample, other in zip(samples, others, strict=True):
        by_chance = compare(sample.generated, other)
        if sample.row.get("relation") and other.get("relation"):
            # The colours of another row are hardly ever right; only its word tests order.
            word = other["relation"]["word"]
            reworded = {**sample.row, "relation": {**sample.row["relation"], "word": word}}
            by_chance["order"] = compare(sample.generated, reworded)["order"]
        own, real = compare(sample.generated, sample.row), compare(sample.real, sample.row)
        prompt = str(sample.row.get("prompt_index", sample.row["prompt"]))
        marks.append((prompt, {"scores": own, "ceiling": real, "chance": by_chance}))
    return marks


def _tally(marks: Sequence[tuple[str, Mapping[str, Score]]]) -> dict[str, Any]:
    parts = {part: _rates([(prompt, mark[part]) for prompt, mark in marks]) for part in _PARTS}
    return {"n": len(marks), **parts}


def _rates(marks: Sequence[tuple[str, Score]]) -> dict[str, dict[str, float]]:
    rates = {}
    for attribute in ATTRIBUTES:
        hits = [(p, hit) for p, mark in marks if (hit := mark[attribute]) is not None]
        if hits:
            n, mean = len(hits), sum(value for _, value in hits) / len(hits)
            independent = intervals.effective_sample_size(hits)
            low, high = intervals.wilson(mean * independent, independent)
            rates[attribute] = {"mean": mean, "low": low, "high": high, "n": n}
    return rates


def _read_rows(folder: pathlib.Path, by: str) -> list[dict[str, Any]]:
    """The folder's rows, checked by `_check_row`."""
    rows = samples.read_rows(folder)
    for number, row in enumerate(rows, 1):
        try:
            _check_row(row, by)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvaluationError(
                f"{folder / 'samples.jsonl'} line {number}: {error}; sample from the "
                "prompts_*.jsonl of shapes_world"
            ) from error
    return rows


def _check_row(row: Mapping[str, Any], by: str) -> None:
    """Raises ValueError if a row does not specify its image."""
    for field in (by, "objects"):
        if not row.get(field):
            raise ValueError(f"no {field!r}")
    forms = LETTERS if row.get("kind") == "word" else scenes.SHAPES
    known = {"shape": forms, "color": scenes.COLORS, "size": (None, *scenes.SIZES)}
    for thing in row["objects"]:
        for field, names in known.items():
            if thing.get(field) not in names:
                raise ValueError(unknown_name(field, thing.get(field), names))
    if relation := row.get("relation"):
        if relation["word"] not in scenes.AXIS:
            raise ValueError(unknown_name("relation.word", relation["word"], scenes.RELATIONS))
        if {relation["first"], relation["second"]} - set(range(len(row["objects"]))):
            raise ValueError(f"relation {relation} names an object that does not exist")


def _load(folder: pathlib.Path, file: str) -> UInt8[np.ndarray, "size size 3"]:
    pixels = samples.load(folder, file)
    if pixels.shape[0] != pixels.shape[1]:
        raise EvaluationError(
            f"{folder / file} has shape {pixels.shape[:2]}; images must be square"
        )
    return pixels


def format_table(report: Mapping[str, Any]) -> str:
    """The report of `evaluate` as a plain-text table."""
    width = max(map(len, ("kind    ", *report["kinds"]))) + 2
    lines = [f"{'kind':{width}}attribute   score  95%              n  ceiling  chance"]
    for kind, tally in report["kinds"].items():
        for attribute, rate in tally["scores"].items():
            interval = f"[{rate['low']:.2f}, {rate['high']:.2f}]"
            yardsticks = (tally[part].get(attribute, {}).get("mean") for part in _PARTS[1:])
            ceiling, chance = ("-" if mean is None else f"{mean:.2f}" for mean in yardsticks)
            lines.append(
                f"{kind:{width}}{attribute:11}{rate['mean']:6.2f}  {interval:13}{rate['n']:5}"
                f"{ceiling:>9}{chance:>8}"
            )
    return "\n".join(lines)
