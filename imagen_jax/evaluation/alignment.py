"""Text alignment on the shapes world: a picture is read without any learned model and compared.

`read` finds the objects of a picture (components by distance from the background, colour by vote,
shape and size by overlap with drawn templates); `score` compares what was read with a prompt row;
`evaluate` does so for a folder of samples and puts two yardsticks beside every number: the
`ceiling` (real pictures of the same rows) and the `chance` (the same pictures, rows shuffled).
It stands for the paper's human alignment ratings (section 4.3), as `fid` does for fidelity.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from imagen_jax.config import unknown_name
from imagen_jax.data import shapes

# Distance in RGB from which a pixel is not background; grain of 6/255 stays below a quarter of it.
PRESENCE = 48.0
MIN_STRAY_AREA = 2
MIN_OBJECT_AREA = 40
# An interior pixel votes for the nearest colour unless that is farther than this.
MAX_COLOR_DISTANCE = 75.0
MIN_PURITY = 0.9
# Mean distance of the outline from the template's, pixels, the same for all shapes and sizes: an
# IoU would forgive a large ragged shape, and ask more of a cross, all outline, than of a circle.
MAX_ROUGHNESS = 0.28
MIN_IOU_LEAD = 0.03
# Equivalent radii beyond the range of sizes by more than this factor have no size.
MAX_SIZE_RATIO = 1.25

ATTRIBUTES = ("exact", "colour", "shape", "size", "count", "binding", "relation", "order")
SEED = 0
Score = dict[str, bool | None]
_PARTS = ("scores", "ceiling", "chance")
_BACKGROUND = np.array(shapes.BACKGROUND, np.float32)
_PALETTE = np.array(list(shapes.COLORS.values()), np.float32)
# Area of a shape in squared radii, and how far its centroid lies below its centre, in radii.
_UNIT_AREA = {
    "circle": math.pi,
    "square": 4 * shapes.SQUARE_HALF**2,
    "triangle": 2 * shapes.TRIANGLE_HALF**2,
    "cross": 8 * shapes.CROSS_ARM * shapes.CROSS_HALF_WIDTH - 4 * shapes.CROSS_HALF_WIDTH**2,
}
# Length of the outline in radii.
_UNIT_OUTLINE = {
    "circle": 2 * math.pi,
    "square": 8 * shapes.SQUARE_HALF,
    "triangle": 2 * shapes.TRIANGLE_HALF * (1 + math.sqrt(5)),
    "cross": 8 * shapes.CROSS_ARM,
}
_CENTROID_BELOW = {"circle": 0.0, "square": 0.0, "triangle": shapes.TRIANGLE_HALF / 3, "cross": 0.0}
# Templates are tried off by so much: right and down in pixels, radius as a factor.
_NUDGES = ((-0.5, 0.0, 0.5), (-0.5, 0.0, 0.5), (0.94, 0.96, 0.98, 1.0, 1.02, 1.04, 1.06))


class AlignmentError(ValueError):
    """The samples cannot be scored; the message says which file and what to do."""


@dataclasses.dataclass(frozen=True)
class Found:
    """An object that was read; None where the picture is not clear. x, y in pixels of 64."""

    shape: str | None
    color: str | None
    size: str | None
    x: float
    y: float
    iou: float
    purity: float


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is in a picture: its objects and the number of specks that are none."""

    objects: tuple[Found, ...]
    strays: int


def read(image: UInt8[np.ndarray, "size size 3"]) -> Reading:
    """Reads the objects of a picture; pictures that are not 64x64 are resized (box filter)."""
    side = shapes.PICTURE
    if image.shape[:2] != (side, side):
        image = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX))
    pixels = image.astype(np.float32)
    present = np.linalg.norm(pixels - _BACKGROUND, axis=-1) > PRESENCE
    objects, strays = [], 0
    for component in components(present):
        area = np.count_nonzero(component)
        if area >= MIN_OBJECT_AREA:
            objects.append(_read_object(pixels, component))
        elif area >= MIN_STRAY_AREA:
            strays += 1
    return Reading(tuple(objects), strays)


def components(mask: Bool[np.ndarray, "height width"]) -> list[Bool[np.ndarray, "height width"]]:
    """The connected parts of a mask, each as a mask of its own; diagonal neighbours connect."""
    # A pixel takes the largest label around it, then that label's own: labels travel in leaps.
    height, width = mask.shape
    labels = np.arange(1, mask.size + 1).reshape(mask.shape) * mask
    while True:
        padded = np.pad(labels, 1)
        around = [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]
        spread = np.maximum.reduce(around) * mask
        spread = np.append(0, spread)[spread]
        if np.array_equal(spread, labels):
            return [labels == label for label in np.unique(labels[mask])]
        labels = spread


def _read_object(pixels: np.ndarray, component: np.ndarray) -> Found:
    # The outline lies half-way between the background and the object's own colour.
    away = np.median(pixels[_interior(component)], axis=0) - _BACKGROUND
    mask = component & ((pixels - _BACKGROUND) @ away > 0.5 * (away @ away))
    shape, radius, iou = _fit(mask)
    color, purity = _vote(pixels[_interior(mask)])
    rows, columns = np.nonzero(mask)
    x, y = (float(axis.min() + axis.max() + 1) / 2 for axis in (columns, rows))
    return Found(shape, color, _size(radius), x, y, iou, purity)


def _interior(mask: np.ndarray) -> np.ndarray:
    """Pixels whose four neighbours belong to the mask too; the mask itself if there are none."""
    padded = np.pad(mask, 1)
    sides = padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    return mask & sides if (mask & sides).any() else mask


def _vote(pixels: np.ndarray) -> tuple[str | None, float]:
    """Name of the colour most of the pixels [n, 3] have (None if impure), and their share."""
    distance = np.linalg.norm(pixels[:, None] - _PALETTE, axis=-1)
    nearest = np.where(distance.min(1) <= MAX_COLOR_DISTANCE, distance.argmin(1), len(_PALETTE))
    counts = np.bincount(nearest, minlength=len(_PALETTE) + 1)
    winner = int(counts[:-1].argmax())
    purity = float(counts[winner] / len(pixels))
    return (tuple(shapes.COLORS)[winner] if purity >= MIN_PURITY else None), purity


def _fit(mask: np.ndarray) -> tuple[str | None, float, float]:
    """Shape (None if no template fits clearly), radius in pixels, overlap with the best template.

    Templates get the area and centroid of the mask, give or take half a pixel and 6%.
    """
    rows, columns = np.nonzero(mask)
    top, left = rows.min() - 1, columns.min() - 1
    window = np.pad(mask, 2)[top + 2 : rows.max() + 4, left + 2 : columns.max() + 4]
    shift_x, shift_y, scale = (n.reshape(-1, 1, 1) for n in np.meshgrid(*_NUDGES))
    overlap, radii = {}, {}
    for shape, area in _UNIT_AREA.items():
        radius = scale * math.sqrt(len(rows) / area)
        x = columns.mean() - left + shift_x
        y = rows.mean() - top + shift_y - _CENTROID_BELOW[shape] * radius
        dx, dy = np.arange(window.shape[1]) - x, np.arange(window.shape[0])[:, None] - y
        # Single precision: this line is most of the time a picture takes.
        template = shapes.coverage(shape, *map(np.float32, (radius, dx, dy))) > 0.5
        iou = (template & window).sum((1, 2)) / (template | window).sum((1, 2))
        overlap[shape], radii[shape] = float(iou.max()), float(radius.ravel()[iou.argmax()])
    second, best = sorted(overlap, key=overlap.get)[-2:]
    # What the two do not share is a strip along the outline.
    roughness = (1 - overlap[best]) * radii[best] * _UNIT_AREA[best] / _UNIT_OUTLINE[best]
    clear = roughness <= MAX_ROUGHNESS and overlap[best] - overlap[second] >= MIN_IOU_LEAD
    return (best if clear else None), radii[best], overlap[best]


def _size(radius: float) -> str | None:
    off = {name: abs(math.log(radius / usual)) for name, usual in shapes.SIZES.items()}
    name = min(off, key=off.get)
    return name if off[name] <= math.log(MAX_SIZE_RATIO) else None


def score(image: UInt8[np.ndarray, "size size 3"], row: Mapping[str, Any]) -> Score:
    """Compares a picture with a prompt row.

    Args:
      image: RGB, 0..255.
      row: `objects` (shape, color, and size unless the prompt does not name it) and `relation`.

    Returns:
      A truth value for each of ATTRIBUTES: colour, shape and size say that the kinds present are
      the ones asked for; binding that every asked object is there as one; relation that it holds
      beyond doubt; order that it holds rather than its mirror image; exact that all is right and
      nothing else is in the picture. None where the row does not ask (size, relation), and for
      order where the colours are wrong or the two objects cannot be told apart.
    """
    return compare(read(image), row)


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
    }
    if row.get("relation"):
        along, across = _distance(found, asked, row["relation"])
        marks["relation"] = along > across
        marks["order"] = along > 0 if marks["colour"] and not math.isnan(along) else None
    right = all(mark for mark in marks.values() if mark is not None)
    return {"exact": right and reading.strays == 0, **marks}


def _sizes_agree(found: Sequence[Found], asked: Sequence[Mapping[str, Any]]) -> bool | None:
    named = {thing["size"] for thing in asked if thing.get("size")}
    if not named:
        return None
    seen = {thing.size for thing in found}
    all_named = all(thing.get("size") for thing in asked)
    return seen == named if all_named else named <= seen


def _all_bound(found: Sequence[Found], asked: Sequence[Mapping[str, Any]]) -> bool:
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


def _distance(
    found: Sequence[Found], asked: Sequence[Mapping[str, Any]], relation: Mapping[str, Any]
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
    axis = shapes.AXIS[relation["word"]]
    sign = 1 if relation["word"] in ("left of", "above") else -1
    return sign * offset[axis], abs(offset[1 - axis])


def evaluate(samples_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Scores the pictures of a folder that `sample` wrote.

    Args:
      samples_dir: holds samples.jsonl, whose rows have `file` and every field of a prompt row.

    Returns:
      `pictures` and `kinds`: for each kind of prompt and for all together `n` and, under `scores`,
      `ceiling` (real pictures of the same rows) and `chance` (rows shuffled within the kind; for
      order the relation's word alone), the mean, 95% Wilson interval and n of every attribute.

    Raises:
      AlignmentError: a file is missing or a row does not say what the picture should show.
    """
    folder = pathlib.Path(samples_dir)
    rows = _read_rows(folder / "samples.jsonl")
    by_kind: dict[str, list[_Sample]] = {}
    for index, row in enumerate(rows):
        real = shapes.draw(shapes.scene_from_row(row, np.random.default_rng((SEED, index))))
        sample = _Sample(row, read(_load(folder / row["file"])), read(real))
        by_kind.setdefault(row["kind"], []).append(sample)
    report = {kind: _marks_of(by_kind[kind]) for kind in sorted(by_kind)}
    if len(report) > 1:
        report["all"] = [marks for parts in report.values() for marks in parts]
    return {"pictures": len(rows), "kinds": {kind: _tally(m) for kind, m in report.items()}}


@dataclasses.dataclass(frozen=True)
class _Sample:
    row: Mapping[str, Any]
    drawn: Reading
    real: Reading


def _marks_of(samples: Sequence[_Sample]) -> list[dict[str, Score]]:
    """Marks of pictures of one kind: their own, those of the real pictures, those by chance."""
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
        marks.append({"scores": own, "ceiling": real, "chance": by_chance})
    return marks


def _tally(marks: Sequence[Mapping[str, Score]]) -> dict[str, Any]:
    return {"n": len(marks)} | {part: _rates([mark[part] for mark in marks]) for part in _PARTS}


def _rates(marks: Sequence[Score]) -> dict[str, dict[str, float]]:
    rates = {}
    for attribute in ATTRIBUTES:
        values = [mark[attribute] for mark in marks if mark[attribute] is not None]
        if values:
            hits, n = sum(values), len(values)
            low, high = wilson(hits, n)
            rates[attribute] = {"mean": hits / n, "low": low, "high": high, "n": n}
    return rates


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson 1927) for `hits` out of `n`, both in 0..1."""
    z = 1.96
    mean, spread = hits / n, z * z / n
    centre = (mean + spread / 2) / (1 + spread)
    half = z * math.sqrt(mean * (1 - mean) / n + spread / (4 * n)) / (1 + spread)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise AlignmentError(f"no file {path}; --samples must be a folder written by `sample`")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            _check_row(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AlignmentError(
                f"{path} line {number}: {error}; sample from the prompts_*.jsonl of shapes_world"
            ) from error
        rows.append(row)
    if not rows:
        raise AlignmentError(f"{path} is empty; sample at least one picture")
    return rows


def _check_row(row: Mapping[str, Any]) -> None:
    """Raises ValueError where a row does not say what the picture should show."""
    for field in ("file", "prompt", "kind", "objects"):
        if not row.get(field):
            raise ValueError(f"no {field!r}")
    known = {"shape": shapes.SHAPES, "color": shapes.COLORS, "size": (None, *shapes.SIZES)}
    for thing in row["objects"]:
        for field, names in known.items():
            if thing.get(field) not in names:
                raise ValueError(unknown_name(field, thing.get(field), names))
    if relation := row.get("relation"):
        if relation["word"] not in shapes.AXIS:
            raise ValueError(unknown_name("relation.word", relation["word"], shapes.RELATIONS))
        if {relation["first"], relation["second"]} - set(range(len(row["objects"]))):
            raise ValueError(f"relation {relation} names an object that is not there")


def _load(path: pathlib.Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise AlignmentError(f"cannot read picture {path}: {error}; sample again") from error
    if pixels.shape[0] != pixels.shape[1]:
        raise AlignmentError(f"{path} has shape {pixels.shape[:2]}; pictures must be square")
    return pixels


def write_report(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a report as JSON, whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(partial, path)


def format_table(report: Mapping[str, Any]) -> str:
    """The report of `evaluate` as a plain-text table."""
    lines = ["kind      attribute   score  95%              n  ceiling  chance"]
    for kind, tally in report["kinds"].items():
        for attribute, rate in tally["scores"].items():
            interval = f"[{rate['low']:.2f}, {rate['high']:.2f}]"
            yardsticks = (tally[part].get(attribute, {}).get("mean") for part in _PARTS[1:])
            ceiling, chance = ("-" if mean is None else f"{mean:.2f}" for mean in yardsticks)
            lines.append(
                f"{kind:10}{attribute:11}{rate['mean']:6.2f}  {interval:13}{rate['n']:5}"
                f"{ceiling:>9}{chance:>8}"
            )
    return "\n".join(lines)
