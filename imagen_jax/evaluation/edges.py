"""Edge sharpness and crop seams in the output of a super-resolution stage.

A stage trained on crops samples the whole image at once (Imagen, App. F.3). Two faults are
possible: edges no sharper than an interpolation of the low-resolution image, and visible lines at
the borders of training crops. Both are measured on jumps: RGB distances of horizontally or
vertically adjacent pixels, 0..442.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from imagen_jax.evaluation import samples
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.evaluation.scorers import Scorer
from imagen_jax.io import images

# A location is flat if the surrounding low-resolution pixels differ by at most this, levels of 255.
# Jumps of at most this are noise, not edges.
FLAT = 8
RESAMPLES, SEED = 1000, 0
_SUMS = ("at", "beside", "flat_at", "flat_beside", "all", "places", "flat_places", "jumps")


def jumps(image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w-1"]:
    """RGB distance of every pixel from its right neighbour, levels."""
    return np.linalg.norm(np.diff(image.astype(np.float32), axis=1), axis=-1)


def sharpness(image: UInt8[np.ndarray, "h w 3"]) -> float:
    """The mean jump along edges, levels: sum(jump^2) / sum(jump) over both directions.

    An edge of contrast C with one intermediate pixel scores between C / 2 and C; one spread evenly
    over n pixels scores C / n. Jumps of at most FLAT are excluded: faint noise over the whole image
    would outweigh the edges. 0 for a constant image.
    """
    both = np.concatenate([jumps(image).ravel(), jumps(image.swapaxes(0, 1)).ravel()])
    edges = both[both > FLAT]
    return float((edges**2).sum() / max(edges.sum(), 1e-9))


def seam_sums(
    image: UInt8[np.ndarray, "size size 3"], lowres: UInt8[np.ndarray, "n n 3"], period: int
) -> dict[str, float]:
    """Jumps at the lines of a lattice and beside them, summed over rows and columns.

    Args:
      image: output of the super-resolution stage.
      lowres: its low-resolution input; defines the flat locations (FLAT).
      period: pixels between lattice lines, a multiple of size / n.

    Returns:
      Sums `at` and `beside` over `places`, the same over the `flat_places`, and `all` over the
      `jumps`. `beside` is the mean over the locations at most half a low-resolution pixel away.
    """
    scale = len(image) // len(lowres)
    borders = np.arange(period, len(image), period)
    offsets = [o for n in range(1, scale // 2 + 1) for o in (-n, n)]
    sums: dict[str, float] = dict.fromkeys(_SUMS, 0.0)
    for pixels, coarse in ((image, lowres), (image.swapaxes(0, 1), lowres.swapaxes(0, 1))):
        jump = jumps(pixels)  # Column i lies between the pixels i and i + 1.
        at = jump[:, borders - 1]
        beside = np.mean([jump[:, borders - 1 + offset] for offset in offsets], axis=0)
        flat = _flat(coarse, borders // scale).repeat(scale, axis=0)
        values = (at.sum(), beside.sum(), at[flat].sum(), beside[flat].sum(), jump.sum())
        for name, value in zip(_SUMS, (*values, at.size, flat.sum(), jump.size), strict=True):
            sums[name] += float(value)
    return sums


def _flat(lowres: np.ndarray, columns: np.ndarray) -> Bool[np.ndarray, "n borders"]:
    """Where the two pixels on each side of the left end of `columns` differ by at most FLAT."""
    padded = np.pad(lowres.astype(np.int16), ((0, 0), (2, 2), (0, 0)), mode="edge")
    around = np.stack([padded[:, columns + offset] for offset in range(4)])
    return (np.ptp(around, axis=0) <= FLAT).all(-1)


def seams(sums: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Ratio of jumps at the lattice lines to jumps beside them, with 95% bootstrap intervals.

    Args:
      sums: results of `seam_sums`, one per image.

    Returns:
      `all`: mean jump at the lines over the mean jump beside them; outlines that coincide with a
      line add variance. `flat`: without outlines, 1 + (at - beside) / mean, where `at` and `beside`
      are mean jumps at flat locations and `mean` is that of whole images. 1 means no seams.
    """
    table = np.array([[row[name] for name in _SUMS] for row in sums])
    indices = np.random.default_rng(SEED).integers(len(table), size=(RESAMPLES, len(table)))
    resampled = np.stack([table[rows].sum(0) for rows in indices])
    total: dict[str, Any] = dict(zip(_SUMS, table.sum(0), strict=True))
    bootstrap: dict[str, Any] = dict(zip(_SUMS, resampled.T, strict=True))
    result = {}
    for name, ratio in (("all", _ratio), ("flat", _flat_ratio)):
        low, high = np.percentile(ratio(bootstrap), (2.5, 97.5))
        result[name] = {"mean": float(ratio(total)), "low": float(low), "high": float(high)}
    return result


def _ratio(sums: Mapping[str, Any]) -> Any:
    return sums["at"] / np.maximum(sums["beside"], 1e-9)


def _flat_ratio(sums: Mapping[str, Any]) -> Any:
    excess = (sums["flat_at"] - sums["flat_beside"]) / np.maximum(sums["flat_places"], 1)
    return 1 + excess / np.maximum(sums["all"] / sums["jumps"], 1e-9)


def evaluate(
    samples_dir: str | os.PathLike[str],
    lowres_dir: str | os.PathLike[str],
    crop: int,
    *,
    scorer: Scorer | None = None,
) -> dict[str, Any]:
    """Compares samples with their low-resolution inputs and with real images.

    Args:
      samples_dir: folder written by `sample` with all stages.
      lowres_dir: the same prompts and seed without the last stage.
      crop: side of the last stage's training crops, pixels.
      scorer: provides real images for the rows it can score; None: no comparison with real ones.

    Returns:
      `pictures`: number of samples. `sharpness`: means of the samples (`drawn`), of the `bicubic`
      interpolations of their inputs and of `real` images. `sharper`: share of samples sharper than
      their interpolation. `seams`: by lattice period, every possible crop border and a tiling by
      crops. `real` is present if the scorer can score rows.

    Raises:
      EvaluationError: prompts or image sizes of the two folders do not match.
    """
    rows, given = samples.read_rows(samples_dir), samples.read_rows(lowres_dir)
    files = {row["file"]: row["prompt"] for row in given}
    sharp: dict[str, list[float]] = {}
    sums: dict[str, dict[str, list[dict[str, float]]]] = {}
    for index, row in enumerate(rows):
        if files.get(row["file"]) != row["prompt"]:
            raise EvaluationError(
                f"{lowres_dir} has no {row['file']} of the prompt {row['prompt']!r}, as "
                f"{samples_dir} has; sample the same prompts with the same seed"
            )
        image, lowres = (samples.load(at, row["file"]) for at in (samples_dir, lowres_dir))
        scale = _scale(image, lowres, crop, row["file"])
        pairs = {"drawn": (image, lowres)}
        if scorer is not None and scorer.can_score(row):
            sizes = len(image), len(lowres)
            real, real_lowres = (scorer.real_image(row, index=index, size=n) for n in sizes)
            pairs["real"] = real, real_lowres
        bicubic = images.resize_host(lowres, len(image), "bicubic")
        sharp.setdefault("bicubic", []).append(sharpness(bicubic))
        for name, (pixels, coarse) in pairs.items():
            sharp.setdefault(name, []).append(sharpness(pixels))
            for period in (scale, crop):
                per_image = sums.setdefault(str(period), {}).setdefault(name, [])
                per_image.append(seam_sums(pixels, coarse, period))
    sharper = np.array(sharp["drawn"]) > np.array(sharp["bicubic"])
    return {
        "pictures": len(rows),
        "sharpness": {name: float(np.mean(values)) for name, values in sharp.items()},
        "sharper": float(sharper.mean()),
        "seams": {
            period: {name: seams(per_image) for name, per_image in by_name.items()}
            for period, by_name in sums.items()
        },
    }


def _scale(image: np.ndarray, lowres: np.ndarray, crop: int, file: str) -> int:
    """Upsampling factor."""
    sizes = [pixels.shape[:2] for pixels in (image, lowres)]
    square = all(height == width for height, width in sizes)
    scale, rest = divmod(len(image), len(lowres))
    if not square or rest or scale < 2 or crop % scale or len(image) % crop:
        raise EvaluationError(
            f"{file}: images of {sizes[0]} and {sizes[1]} pixels and --crop={crop} do not fit; "
            "both must be square, and the larger side a multiple of --crop and of the smaller side"
        )
    return scale


def format_table(card: Mapping[str, Any]) -> str:
    """The card of `evaluate` as plain text."""
    sharp = "  ".join(f"{name} {value:.1f}" for name, value in card["sharpness"].items())
    lines = [
        f"sharpness, levels: {sharp}",
        f"sharper than bicubic: {card['sharper']:.3f} of {card['pictures']} images",
        "seams every   images     all   95%               flat   95%",
    ]
    for period, by_name in card["seams"].items():
        for name, ratios in by_name.items():
            cells = [
                f"{rate['mean']:.4f} [{rate['low']:.4f}, {rate['high']:.4f}]"
                for rate in (ratios["all"], ratios["flat"])
            ]
            lines.append(f"{period:>4} pixels   {name:8}  {'  '.join(cells)}")
    return "\n".join(lines)
