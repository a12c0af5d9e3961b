"""What a super-resolution stage makes of edges: how sharp they are, and whether seams cross them.

A stage that learned from crops draws the whole picture at once (Imagen, App. F.3). It could draw
edges no sharper than an interpolation of the picture it was given, or leave lines where the crops
of training began and ended. Both are measured on jumps: distances in RGB, 0..442, of two pixels
side by side.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from imagen_jax.evaluation import samples
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.io import images
from imagen_jax.worlds.shapes import scenes

# A place is flat where the small picture varies by no more than this around it, levels; a jump
# that is no larger is grain.
FLAT = 8
RESAMPLES, SEED = 1000, 0
_SUMS = ("at", "beside", "flat_at", "flat_beside", "all", "places", "flat_places", "jumps")


def jumps(image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w-1"]:
    """Distance in RGB of every pixel from its right neighbour, levels."""
    return np.linalg.norm(np.diff(image.astype(np.float32), axis=1), axis=-1)


def sharpness(image: UInt8[np.ndarray, "h w 3"]) -> float:
    """The mean jump along edges, levels: sum(jump^2) / sum(jump) over both directions.

    An edge of contrast C that one pixel shares counts between C / 2 and C, one spread evenly over n
    pixels C / n. Jumps of at most FLAT are no edges, else faint grain over the whole picture would
    outweigh them. 0 for a plain picture.
    """
    both = np.concatenate([jumps(image).ravel(), jumps(image.swapaxes(0, 1)).ravel()])
    edges = both[both > FLAT]
    return float((edges**2).sum() / max(edges.sum(), 1e-9))


def seam_sums(
    large: UInt8[np.ndarray, "size size 3"], small: UInt8[np.ndarray, "n n 3"], period: int
) -> dict[str, float]:
    """Jumps at the borders of a lattice and beside them, summed over rows and columns.

    Args:
      large: the drawn picture.
      small: the picture it was drawn from; tells where nothing is to be seen (FLAT).
      period: pixels between borders, a multiple of size / n.

    Returns:
      Sums `at` and `beside` over `places`, the same over the `flat_places`, and `all` the `jumps`.
      Beside are the places at most half a pixel of the small picture away, their mean.
    """
    scale = len(large) // len(small)
    borders = np.arange(period, len(large), period)
    offsets = [o for n in range(1, scale // 2 + 1) for o in (-n, n)]
    sums: dict[str, float] = dict.fromkeys(_SUMS, 0.0)
    for big, little in ((large, small), (large.swapaxes(0, 1), small.swapaxes(0, 1))):
        jump = jumps(big)  # Column i lies between the pixels i and i + 1.
        at = jump[:, borders - 1]
        beside = np.mean([jump[:, borders - 1 + offset] for offset in offsets], axis=0)
        flat = _flat(little, borders // scale).repeat(scale, axis=0)
        values = (at.sum(), beside.sum(), at[flat].sum(), beside[flat].sum(), jump.sum())
        for name, value in zip(_SUMS, (*values, at.size, flat.sum(), jump.size), strict=True):
            sums[name] += float(value)
    return sums


def _flat(small: np.ndarray, columns: np.ndarray) -> Bool[np.ndarray, "n borders"]:
    """Where two pixels to each side of the left end of `columns` hardly differ."""
    padded = np.pad(small.astype(np.int16), ((0, 0), (2, 2), (0, 0)), mode="edge")
    around = np.stack([padded[:, columns + offset] for offset in range(4)])
    return (np.ptp(around, axis=0) <= FLAT).all(-1)


def seams(sums: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Edge energy at the borders, as a share of that elsewhere, with 95% bootstrap intervals.

    Args:
      sums: of `seam_sums`, one per picture.

    Returns:
      `all`: mean jump at the borders over that beside them. Which outlines happen to run along a
      border makes it uncertain. `flat`: the same without outlines, 1 + (at - beside) / mean, where
      at and beside are mean jumps at flat places, and mean that of whole pictures. 1: no seams.
    """
    table = np.array([[row[name] for name in _SUMS] for row in sums])
    chosen = np.random.default_rng(SEED).integers(len(table), size=(RESAMPLES, len(table)))
    resampled = np.stack([table[rows].sum(0) for rows in chosen])
    total: dict[str, Any] = dict(zip(_SUMS, table.sum(0), strict=True))
    spread: dict[str, Any] = dict(zip(_SUMS, resampled.T, strict=True))
    result = {}
    for name, ratio in (("all", _ratio), ("flat", _flat_ratio)):
        low, high = np.percentile(ratio(spread), (2.5, 97.5))
        result[name] = {"mean": float(ratio(total)), "low": float(low), "high": float(high)}
    return result


def _ratio(sums: Mapping[str, Any]) -> Any:
    return sums["at"] / np.maximum(sums["beside"], 1e-9)


def _flat_ratio(sums: Mapping[str, Any]) -> Any:
    excess = (sums["flat_at"] - sums["flat_beside"]) / np.maximum(sums["flat_places"], 1)
    return 1 + excess / np.maximum(sums["all"] / sums["jumps"], 1e-9)


def evaluate(
    samples_dir: str | os.PathLike[str], lowres_dir: str | os.PathLike[str], crop: int
) -> dict[str, Any]:
    """Measures pictures beside those they were drawn from, and real ones of the shapes world.

    Args:
      samples_dir: folder that `sample` wrote with all stages.
      lowres_dir: the same prompts and seed without the last stage.
      crop: side of the crops that the last stage learned from, pixels.

    Returns:
      `sharpness` of the `drawn` pictures, of the `bicubic` interpolation of the small ones and of
      the `real` ones, means of `pictures`; `sharper`, the share of pictures sharper than their
      interpolation; `seams` by the distance of the borders: every place where a crop could begin,
      and a tiling by crops. `real` is there where the rows have `objects`.

    Raises:
      EvaluationError: the folders do not hold pictures of the same prompts, or of fitting sizes.
    """
    rows, given = samples.read_rows(samples_dir), samples.read_rows(lowres_dir)
    files = {row["file"]: row["prompt"] for row in given}
    sharp: dict[str, list[float]] = {}
    sums: dict[str, dict[str, list[dict[str, float]]]] = {}
    for index, row in enumerate(rows):
        if files.get(row["file"]) != row["prompt"]:
            raise EvaluationError(
                f"{lowres_dir} has no {row['file']} of the prompt {row['prompt']!r}, as "
                f"{samples_dir} has; draw the same prompts with the same seed"
            )
        large, small = (samples.load(at, row["file"]) for at in (samples_dir, lowres_dir))
        scale = _scale(large, small, crop, row["file"])
        pairs = {"drawn": (large, small)}
        if row.get("objects"):
            scene = scenes.scene_from_row(row, np.random.default_rng((SEED, index)))
            pairs["real"] = scenes.draw(scene, len(large)), scenes.draw(scene, len(small))
        bicubic = images.resize_host(small, len(large), "bicubic")
        sharp.setdefault("bicubic", []).append(sharpness(bicubic))
        for name, (picture, below) in pairs.items():
            sharp.setdefault(name, []).append(sharpness(picture))
            for period in (scale, crop):
                found = sums.setdefault(str(period), {}).setdefault(name, [])
                found.append(seam_sums(picture, below, period))
    sharper = np.array(sharp["drawn"]) > np.array(sharp["bicubic"])
    return {
        "pictures": len(rows),
        "sharpness": {name: float(np.mean(values)) for name, values in sharp.items()},
        "sharper": float(sharper.mean()),
        "seams": {
            period: {name: seams(found) for name, found in by_name.items()}
            for period, by_name in sums.items()
        },
    }


def _scale(large: np.ndarray, small: np.ndarray, crop: int, file: str) -> int:
    """How many times larger the large picture is."""
    sizes = [picture.shape[:2] for picture in (large, small)]
    square = all(height == width for height, width in sizes)
    scale, rest = divmod(len(large), len(small))
    if not square or rest or scale < 2 or crop % scale or len(large) % crop:
        raise EvaluationError(
            f"{file}: pictures of {sizes[0]} and {sizes[1]} pixels and --crop={crop} do not fit; "
            "they must be squares, the larger one a whole number of crops and of smaller pixels"
        )
    return scale


def format_table(card: Mapping[str, Any]) -> str:
    """The card of `evaluate` as plain text."""
    sharp = "  ".join(f"{name} {value:.1f}" for name, value in card["sharpness"].items())
    lines = [
        f"sharpness, levels: {sharp}",
        f"sharper than bicubic: {card['sharper']:.3f} of {card['pictures']} pictures",
        "seams every   pictures   all   95%               flat   95%",
    ]
    for period, by_name in card["seams"].items():
        for name, ratios in by_name.items():
            cells = [
                f"{rate['mean']:.4f} [{rate['low']:.4f}, {rate['high']:.4f}]"
                for rate in (ratios["all"], ratios["flat"])
            ]
            lines.append(f"{period:>4} pixels   {name:8}  {'  '.join(cells)}")
    return "\n".join(lines)
