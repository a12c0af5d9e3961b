"""Object detection in images of the shapes world, without a learned model.

Objects are the connected components of non-background pixels. Their colour is a majority vote of
the interior pixels; their shape and size are those of the rendered template with the largest
overlap. `alignment` compares the detections with a prompt row.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from imagen_jax.worlds.shapes import outlines, scenes
from imagen_jax.worlds.shapes.letters import LETTERS

# RGB distance above which a pixel is not background; noise of 6/255 is below a quarter of it.
PRESENCE = 48.0
MIN_STRAY_AREA = 2
MIN_OBJECT_AREA = 40
# An interior pixel votes for the nearest colour within this RGB distance.
MAX_COLOR_DISTANCE = 75.0
MIN_PURITY = 0.9
# Mean distance of the outline from the template's, pixels. Unlike an IoU threshold it is equally
# strict for all shapes and sizes: IoU tolerates large ragged shapes and penalises long outlines.
MAX_ROUGHNESS = 0.28
# Smaller for letters: they are thin, and O is similar to D.
MIN_IOU_LEAD = {scenes.SHAPES: 0.03, LETTERS: 0.01}
# Largest factor between an equivalent radius and the nearest size.
MAX_SIZE_RATIO = 1.25

_BACKGROUND = np.array(scenes.BACKGROUND, np.float32)
_PALETTE = np.array(list(scenes.COLORS.values()), np.float32)


class _Form(NamedTuple):
    """Area in squared radii; outline length and centroid offset in radii."""

    area: float
    outline: float
    right: float = 0.0
    below: float = 0.0


_FORMS = {
    "circle": _Form(math.pi, 2 * math.pi),
    "square": _Form(4 * outlines.SQUARE_HALF**2, 8 * outlines.SQUARE_HALF),
    "triangle": _Form(
        2 * outlines.TRIANGLE_HALF**2,
        2 * outlines.TRIANGLE_HALF * (1 + math.sqrt(5)),
        below=outlines.TRIANGLE_HALF / 3,
    ),
    "cross": _Form(
        8 * outlines.CROSS_ARM * outlines.CROSS_HALF_WIDTH - 4 * outlines.CROSS_HALF_WIDTH**2,
        8 * outlines.CROSS_ARM,
    ),
}
# Search grid of the template fit: offsets right and down in pixels, factor of the radius.
_NUDGES = ((-0.5, 0.0, 0.5), (-0.5, 0.0, 0.5), (0.94, 0.96, 0.98, 1.0, 1.02, 1.04, 1.06))


@dataclasses.dataclass(frozen=True)
class Detection:
    """A detected object; None for ambiguous attributes. x, y in pixels of a 64-pixel image."""

    shape: str | None
    color: str | None
    size: str | None
    x: float
    y: float
    iou: float
    purity: float


@dataclasses.dataclass(frozen=True)
class Detections:
    """Objects of an image, and the number of components too small to be one."""

    objects: tuple[Detection, ...]
    strays: int


def detect_objects(
    image: UInt8[np.ndarray, "size size 3"], names: tuple[str, ...] = scenes.SHAPES
) -> Detections:
    """Detects the objects of an image.

    All thresholds refer to 64 pixels. Images of another size are resized to it (box filter), so one
    detector serves all stages of a cascade; `evaluation.edges` measures finer detail.

    Args:
      image: RGB, 0..255.
      names: candidate shapes: `scenes.SHAPES` or `letters.LETTERS`.
    """
    side = scenes.IMAGE_SIZE
    if image.shape[:2] != (side, side):
        image = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX))
    pixels = image.astype(np.float32)
    present = np.linalg.norm(pixels - _BACKGROUND, axis=-1) > PRESENCE
    objects, strays = [], 0
    for component in components(present):
        area = np.count_nonzero(component)
        if area >= MIN_OBJECT_AREA:
            objects.append(_detect(pixels, component, names))
        elif area >= MIN_STRAY_AREA:
            strays += 1
    return Detections(tuple(objects), strays)


def components(mask: Bool[np.ndarray, "height width"]) -> list[Bool[np.ndarray, "height width"]]:
    """The connected components of a mask (8-connectivity), each as a mask."""
    # Each pixel takes the largest label around it, then that label's label (pointer jumping).
    height, width = mask.shape
    labels = np.arange(1, mask.size + 1).reshape(mask.shape) * mask
    while True:
        padded = np.pad(labels, 1)
        around = [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]
        updated = np.maximum.reduce(around) * mask
        updated = np.append(0, updated)[updated]
        if np.array_equal(updated, labels):
            return [labels == label for label in np.unique(labels[mask])]
        labels = updated


def _detect(pixels: np.ndarray, component: np.ndarray, names: tuple[str, ...]) -> Detection:
    # The outline is half-way between the background and the object's colour.
    away = np.median(pixels[_interior(component)], axis=0) - _BACKGROUND
    mask = component & ((pixels - _BACKGROUND) @ away > 0.5 * (away @ away))
    shape, radius, iou = _fit(mask, names)
    color, purity = _vote(pixels[_interior(mask)])
    rows, columns = np.nonzero(mask)
    x, y = (float(axis.min() + axis.max() + 1) / 2 for axis in (columns, rows))
    return Detection(shape, color, _size(radius), x, y, iou, purity)


def _interior(mask: np.ndarray) -> np.ndarray:
    """Pixels whose four neighbours are in the mask; the mask itself if there are none."""
    padded = np.pad(mask, 1)
    sides = padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    return mask & sides if (mask & sides).any() else mask


def _vote(pixels: np.ndarray) -> tuple[str | None, float]:
    """Majority colour of the pixels [n, 3] (None below MIN_PURITY), and its share."""
    distance = np.linalg.norm(pixels[:, None] - _PALETTE, axis=-1)
    nearest = np.where(distance.min(1) <= MAX_COLOR_DISTANCE, distance.argmin(1), len(_PALETTE))
    counts = np.bincount(nearest, minlength=len(_PALETTE) + 1)
    winner = int(counts[:-1].argmax())
    purity = float(counts[winner] / len(pixels))
    return (tuple(scenes.COLORS)[winner] if purity >= MIN_PURITY else None), purity


def _fit(mask: np.ndarray, names: tuple[str, ...]) -> tuple[str | None, float, float]:
    """Shape (None without a clear fit), radius in pixels, overlap with the best template.

    Templates have the area and centroid of the mask, varied by _NUDGES.
    """
    rows, columns = np.nonzero(mask)
    top, left = rows.min() - 1, columns.min() - 1
    window = np.pad(mask, 2)[top + 2 : rows.max() + 4, left + 2 : columns.max() + 4]
    shift_x, shift_y, scale = (n.reshape(-1, 1, 1) for n in np.meshgrid(*_NUDGES))
    overlap, radii = {}, {}
    forms = {shape: _form(shape) for shape in names}
    for shape, form in forms.items():
        radius = scale * math.sqrt(len(rows) / form.area)
        x = columns.mean() - left + shift_x - form.right * radius
        y = rows.mean() - top + shift_y - form.below * radius
        dx, dy = np.arange(window.shape[1]) - x, np.arange(window.shape[0])[:, None] - y
        # Single precision: this line takes most of the time per image.
        template = (
            outlines.coverage(shape, *(np.asarray(v, np.float32) for v in (radius, dx, dy))) > 0.5
        )
        iou = (template & window).sum((1, 2)) / (template | window).sum((1, 2))
        overlap[shape], radii[shape] = float(iou.max()), float(radius.ravel()[iou.argmax()])
    second, best = sorted(overlap, key=lambda shape: overlap[shape])[-2:]
    # The symmetric difference is a strip along the outline.
    roughness = (1 - overlap[best]) * radii[best] * forms[best].area / forms[best].outline
    clear = roughness <= MAX_ROUGHNESS and overlap[best] - overlap[second] >= MIN_IOU_LEAD[names]
    return (best if clear else None), radii[best], overlap[best]


@functools.cache
def _form(shape: str) -> _Form:
    """Geometry of a shape; that of a letter is measured on a large rendering."""
    if shape in _FORMS:
        return _FORMS[shape]
    radius = 100.0
    across = np.arange(-1.5 * radius, 1.5 * radius) + 0.5
    alpha = outlines.coverage(shape, radius, across[None, :], across[:, None])
    area = alpha.sum()
    # Coverage rises from 0 to 1 across the outline, in any direction.
    outline = np.hypot(*np.gradient(alpha)).sum()
    right, below = ((alpha.sum(axis) * across).sum() / area / radius for axis in (0, 1))
    return _Form(area / radius**2, outline / radius, right, below)


def _size(radius: float) -> str | None:
    off = {name: abs(math.log(radius / usual)) for name, usual in scenes.SIZES.items()}
    name = min(off, key=lambda size: off[size])
    return name if off[name] <= math.log(MAX_SIZE_RATIO) else None
