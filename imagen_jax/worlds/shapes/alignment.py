"""Text alignment on the shapes world: does a picture show what its prompt asks for?

`score` compares what `reading` finds in a picture with a prompt row; `evaluate` does so for a
folder of samples and puts two yardsticks beside every number: the `ceiling` (real pictures of the
same rows) and the `chance` (the same pictures, rows shuffled). It stands for the paper's human
alignment ratings (section 4.3), as `fid` does for fidelity.
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
from imagen_jax.worlds.shapes.reading import Detection, Reading, read

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
# A word is level if the middles of its letters lie within this of each other, pixels of 64.
MAX_UNEVENNESS = 3.0
SEED = 0
Score = dict[str, bool | None]
_PARTS = ("scores", "ceiling", "chance")
_NORMAL_QUANTILE = 1.96


def score(image: UInt8[np.ndarray, "size size 3"], row: Mapping[str, Any]) -> Score:
    """Compares a picture with a prompt row.

    Args:
      image: RGB, 0..255.
      row: `objects` (shape, color, and size unless the prompt does not name it) and `relation`; of
        the kind "word", the objects are its letters from left to right.

    Returns:
      A truth value for each of ATTRIBUTES: colour, shape and size say that the kinds present are
      the ones asked for; binding that every asked object is there as one; relation that it holds
      beyond doubt; order that it holds rather than its mirror image; spelling that the letters read
      from left to right, and level, are the word; exact that all is right and nothing else is in
      the picture. None where the row does not ask (size, relation, spelling), and for order where
      the colours are wrong or the two objects cannot be told apart.
    """
    return compare(_read_for(row, image), row)


def _read_for(row: Mapping[str, Any], image: UInt8[np.ndarray, "size size 3"]) -> Reading:
    return read(image, LETTERS if row.get("kind") == "word" else scenes.SHAPES)


def compare(reading: Reading, row: Mapping[str, Any]) -> Score:
    """`score` for a picture that was read already."""
    found, asked = reading.objects, row["objects"]
    marks: Score = {
        "colour": {thing.color for thing in found} == {thing["color"] for thing in asked},
        "shape": {thing.shape for thing in found} == {thing["shape"] for thing in asked},
        "size": _sizes_agree(found, asked),
        "count": len(found) == len(asked),
        "binding": _all_bound(found, asked),
        "relation": None,
        "order": None,
        "spelling": _spells(found, asked) if row.get("kind") == "word" else None,
    }
    if row.get("relation"):
        along, across = _distance(found, asked, row["relation"])
        marks["relation"] = along > across
        marks["order"] = along > 0 if marks["colour"] and not math.isnan(along) else None
    right = all(mark for mark in marks.values() if mark is not None)
    return {"exact": right and reading.strays == 0, **marks}


def _sizes_agree(found: Sequence[Detection], asked: Sequence[Mapping[str, Any]]) -> bool | None:
    named = {thing["size"] for thing in asked if thing.get("size")}
    if not named:
        return None
    seen = {thing.size for thing in found}
    all_named = all(thing.get("size") for thing in asked)
    return seen == named if all_named else named <= seen


def _all_bound(found: Sequence[Detection], asked: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every asked object is one of those found, no object serving twice."""
    free = list(found)
    # Objects with a named size first: the others can take what is left.
    for thing in sorted(asked, key=lambda thing: not thing.get("size")):
        wanted = (thing["color"], thing["shape"], thing.get("size"))
        fitting = [
            f for f in free if wanted in ((f.color, f.shape, f.size), (f.color, f.shape, None))
        ]
        if not fitting:
            return False
        free.remove(fitting[0])
    return True


def _spells(found: Sequence[Detection], asked: Sequence[Mapping[str, Any]]) -> bool:
    heights = [thing.y for thing in found]
    level = bool(found) and max(heights) - min(heights) <= MAX_UNEVENNESS
    letters = [thing.shape for thing in sorted(found, key=lambda thing: thing.x)]
    return level and letters == [thing["shape"] for thing in asked]


def _distance(
    found: Sequence[Detection], asked: Sequence[Mapping[str, Any]], relation: Mapping[str, Any]
) -> tuple[float, float]:
    """How far the first object lies in the relation's direction, and how far beside it, pixels.

    Objects are told by colour, or by shape where the colours are equal; NaN if they cannot be.
    """
    first, second = asked[relation["first"]], asked[relation["second"]]
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
    """Scores the pictures of a folder that `sample` wrote.

    Args:
      samples_dir: holds samples.jsonl, whose rows have `file` and every field of a prompt row.
      by: field of the rows that tells the kinds of prompt apart: kind, or DrawBench's category.

    Returns:
      `pictures` and `kinds`: for each kind of prompt and for all together `n` and, under `scores`,
      `ceiling` (real pictures of the same rows and size) and `chance` (rows shuffled within the
      kind; for order the relation's word alone), the mean, 95% Wilson interval and n of every
      attribute. The interval is over prompts, whose pictures belong together.

    Raises:
      EvaluationError: a file is missing or a row does not say what the picture should show.
    """
    folder = pathlib.Path(samples_dir)
    rows = _read_rows(folder, by)
    by_kind: dict[str, list[_Sample]] = {}
    for index, row in enumerate(rows):
        drawn, rng = _load(folder, row["file"]), np.random.default_rng((SEED, index))
        real = scenes.draw(scenes.scene_from_row(row, rng), len(drawn))
        sample = _Sample(row, _read_for(row, drawn), _read_for(row, real))
        by_kind.setdefault(row[by], []).append(sample)
    report = {kind: _marks_of(by_kind[kind]) for kind in sorted(by_kind)}
    if len(report) > 1:
        report["all"] = [marks for parts in report.values() for marks in parts]
    return {"pictures": len(rows), "kinds": {kind: _tally(m) for kind, m in report.items()}}


def score_folder(samples_dir: str | os.PathLike[str]) -> dict[str, dict[str, dict[str, float]]]:
    """The scores of `evaluate` alone, by kind of prompt: its yardsticks cost as much again.

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
    drawn: Reading
    real: Reading


def _marks_of(samples: Sequence[_Sample]) -> list[tuple[str, dict[str, Score]]]:
    """Prompt and marks of the pictures of one kind: own, of the real pictures, by chance."""
    others = [sample.row for sample in samples]
    random.Random(SEED).shuffle(others)
    marks = []
    for sample, other in zip(samples, others, strict=True):
        by_chance = compare(sample.drawn, other)
        if sample.row.get("relation") and other.get("relation"):
            # Another row's colours are hardly ever right; its word alone asks about order.
            word = other["relation"]["word"]
            turned = {**sample.row, "relation": {**sample.row["relation"], "word": word}}
            by_chance["order"] = compare(sample.drawn, turned)["order"]
        own, real = compare(sample.drawn, sample.row), compare(sample.real, sample.row)
        prompt = str(sample.row.get("prompt_index", sample.row["prompt"]))
        marks.append((prompt, {"scores": own, "ceiling": real, "chance": by_chance}))
    return marks


def _tally(marks: Sequence[tuple[str, Mapping[str, Score]]]) -> dict[str, Any]:
    parts = {part: _rates([(prompt, mark[part]) for prompt, mark in marks]) for part in _PARTS}
    return {"n": len(marks), **parts}


def _rates(marks: Sequence[tuple[str, Score]]) -> dict[str, dict[str, float]]:
    rates = {}
    for attribute in ATTRIBUTES:
        asked = [(p, hit) for p, mark in marks if (hit := mark[attribute]) is not None]
        if asked:
            n, mean = len(asked), sum(value for _, value in asked) / len(asked)
            independent = effective_sample_size(asked)
            low, high = wilson(mean * independent, independent)
            rates[attribute] = {"mean": mean, "low": low, "high": high, "n": n}
    return rates


def effective_sample_size(marks: Sequence[tuple[str, bool]]) -> float:
    """How many independent pictures would tell as much as these of (prompt, mark).

    From the variance of the mean over prompts; at least as many as there are prompts, at most as
    many as there are pictures, and these where every prompt has one.
    """
    n, mean = len(marks), sum(mark for _, mark in marks) / len(marks)
    sums: dict[str, float] = {}
    for prompt, mark in marks:
        sums[prompt] = sums.get(prompt, 0.0) + mark - mean
    squares = sum(total**2 for total in sums.values())
    if not 0 < mean < 1:  # No variance to go by.
        return float(len(sums))
    return float(min(max(n**2 * mean * (1 - mean) / max(squares, 1e-9), len(sums)), n))


def wilson(hits: float, n: float) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson 1927) for `hits` out of `n`, both in 0..1."""
    low, high = intervals.score_interval(hits / n, _NORMAL_QUANTILE**2 / n)
    return float(low), float(high)


def _read_rows(folder: pathlib.Path, by: str) -> list[dict[str, Any]]:
    """The folder's rows, each of which says what its picture should show."""
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
    """Raises ValueError where a row does not say what the picture should show."""
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
            raise ValueError(f"relation {relation} names an object that is not there")


def _load(folder: pathlib.Path, file: str) -> UInt8[np.ndarray, "size size 3"]:
    pixels = samples.load(folder, file)
    if pixels.shape[0] != pixels.shape[1]:
        raise EvaluationError(
            f"{folder / file} has shape {pixels.shape[:2]}; pictures must be square"
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
