"""The shapes world: images of coloured shapes with captions, a data set without a download.

A scene is a pure function of (split, index), and its image a pure function of the scene. A model
learns the world in minutes, and its samples can be scored exactly for the attributes of DrawBench
(Imagen, Sec. 4.3): colours, counts and relations, also in combinations absent from training.
`builder` writes scenes as TFRecord files; `alignment` scores images.

Coordinates: x to the right, y down, in pixels; pixel i covers [i, i + 1), so the image centre is
(32, 32). An object's x, y is the centre of its bounding box.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from imagen_jax.worlds.shapes import letters, outlines
from imagen_jax.worlds.shapes.captions import (
    AXIS,
    NUMBERS,
    OPPOSITE,
    POSITION_TEMPLATES,
    RELATIONS,
    SINGULAR_TEMPLATES,
    SIZE_NAMED_SHARE,
    Object,
    Relation,
    sentence,
)

VERSION = 1
SPLITS = {"train": 20_000, "seen_test": 1_000, "held_out": 1_000}
MIXTURE = {"single": 0.45, "count": 0.35, "relation": 0.20}
KINDS = tuple(MIXTURE)
# Split of additional training scenes: relations only, all sizes named.
MORE_RELATIONS = "relations"

IMAGE_SIZE = 64
MARGIN = 2.0
# Three visible pixels plus one: an antialiased edge extends half a pixel outwards on each side.
GAP = 4.0
BACKGROUND = (22, 22, 26)
COLORS = {
    "red": (225, 35, 35),
    "green": (35, 170, 60),
    "blue": (45, 75, 235),
    "yellow": (245, 220, 45),
    "purple": (150, 45, 190),
    "orange": (250, 135, 20),
    "cyan": (45, 215, 225),
    "white": (245, 245, 245),
}
SIZES = {"small": 7.25, "medium": 9.1, "large": 11.5}

SHAPES = ("circle", "square", "triangle", "cross")
EXTENT = {
    "circle": 1.0,
    "square": outlines.SQUARE_HALF,
    "triangle": outlines.TRIANGLE_HALF,
    "cross": outlines.CROSS_ARM,
}
EXTENT |= dict.fromkeys(letters.LETTERS, letters.EXTENT)
# Distance of adjacent letters in radii: wider than the font's cells, so that letters do not touch.
LETTER_PITCH = 1.75

# Largest offset across the axis of a relation, as a share of the distance along it.
MAX_SLANT = 0.5
PLACEMENT_TRIES = 64

PARAPHRASES = 4
POSITION_SHARE = 0.7
# Paraphrase rounds per kind: object order needs more text than object identity.
PARAPHRASE_ROUNDS = {"single": 1, "count": 1, "relation": 12}
PARAPHRASE_STREAM = 99  # Seed component; differs from the split indices used in its position.


class ShapesError(ValueError):
    """A scene that does not exist or does not fit into the image."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects of an image and its caption.

    Attributes:
      kind: single, count, relation or word.
      objects: the objects with their positions.
      relation: relation of two objects; None for other kinds.
      caption: the sentence.
      sizes_named: whether the caption names the sizes.
    """

    kind: str
    objects: tuple[Object, ...]
    relation: Relation | None
    caption: str
    sizes_named: bool


@functools.lru_cache(maxsize=1)  # `paraphrases` requests the same scene repeatedly.
def scene(split: str, index: int) -> Scene:
    """The scene at `index` of a split; deterministic.

    Args:
      split: train, seen_test (other scenes of the training combinations), held_out (combinations
        absent from the other splits, kinds in equal parts) or relations (more training scenes).
      index: 0 or more.

    Raises:
      ShapesError: unknown split or negative index.
    """
    splits = (*SPLITS, MORE_RELATIONS)
    if split not in splits:
        raise ShapesError(f"split={split!r} is not one of {', '.join(splits)}")
    if index < 0:
        raise ShapesError(f"index={index} must be 0 or more")
    rng = np.random.default_rng((VERSION, splits.index(split), index))
    novel = split == "held_out"
    kind = KINDS[index % 3 if novel else rng.choice(3, p=list(MIXTURE.values()))]
    if split == MORE_RELATIONS:
        kind = "relation"
    while True:
        objects, relation = _compose(kind, rng)
        if _is_novel(objects, relation) == novel:
            break
    # Without its size, the prompt of a held-out object would be a prompt of the training set.
    novel_by_size = novel and not (relation and _is_held_statement(objects, relation))
    sizes_named = bool(rng.random() < SIZE_NAMED_SHARE[kind]) or novel_by_size
    sizes_named |= split == MORE_RELATIONS
    caption = sentence(kind, objects, relation, sizes_named, rng)
    return Scene(kind, _place(objects, relation, rng), relation, caption, sizes_named)


def paraphrases(split: str, index: int, round_index: int = 0) -> tuple[str, ...]:
    """PARAPHRASES equivalent captions of a scene; its own caption is the first.

    For relations, most name the positions ("a above and then b below"), and half of the others are
    mirrored ("b below a" for "a above b"). For counts, half name a single object ("each of two
    things is a cross" for "two crosses").

    Args:
      split: split of the scene.
      index: index of the scene.
      round_index: other rounds give other captions.
    """
    shown = scene(split, index)
    stream = (VERSION, PARAPHRASE_STREAM, list(SPLITS).index(split), index, round_index)
    rng = np.random.default_rng(stream)
    captions = [shown.caption]
    while len(captions) < PARAPHRASES:
        relation, templates = shown.relation, ()
        if relation and rng.random() < POSITION_SHARE:
            templates = POSITION_TEMPLATES
        elif relation and rng.random() < 0.5:
            relation = Relation(OPPOSITE[relation.word], relation.second, relation.first)
        elif shown.kind == "count" and rng.random() < 0.5:
            templates = SINGULAR_TEMPLATES
        content = shown.kind, shown.objects, relation, shown.sizes_named
        captions.append(sentence(*content, rng, templates))
    return tuple(captions)


def is_held_out(scene: Scene) -> bool:
    """Whether a scene has an object, number or statement absent from training; not for words."""
    return _is_novel(scene.objects, scene.relation)


def render(scene: Scene, size: int = IMAGE_SIZE) -> UInt8[np.ndarray, "size size 3"]:
    """The antialiased image of a scene, 0..255.

    Args:
      scene: the scene; its lengths are in pixels of a 64-pixel image.
      size: side of the image, pixels; an edge is one pixel wide at any size.
    """
    image = np.empty((size, size, 3), np.float32)
    image[:] = BACKGROUND
    scale = size / IMAGE_SIZE
    for thing in scene.objects:
        x, y, radius = scale * thing.x, scale * thing.y, scale * SIZES[thing.size]
        reach = radius * EXTENT[thing.shape] + 1
        left, top = max(math.floor(x - reach), 0), max(math.floor(y - reach), 0)
        window = image[top : math.ceil(y + reach), left : math.ceil(x + reach)]
        dx = np.arange(window.shape[1], dtype=np.float32) + (left + 0.5 - x)
        dy = np.arange(window.shape[0], dtype=np.float32) + (top + 0.5 - y)
        alpha = outlines.coverage(thing.shape, radius, dx[None, :], dy[:, None])[..., None]
        window += alpha * (np.array(COLORS[thing.color], np.float32) - window)
    return np.rint(image).astype(np.uint8)


def place_word(objects: Sequence[Object], rng: np.random.Generator) -> tuple[Object, ...]:
    """Places letters, all large, in a row from left to right at a random position.

    Raises:
      ShapesError: the letters do not fit into the image.
    """
    radius = SIZES["large"]
    width = radius * (letters.CELL + LETTER_PITCH * (len(objects) - 1))
    room = IMAGE_SIZE - 2 * MARGIN - np.array([width, 2 * radius * letters.EXTENT])
    if room.min() < 0:
        raise ShapesError(f"{len(objects)} letters do not fit into the image; at most 3 do")
    x, y = MARGIN + radius * np.array([letters.CELL / 2, letters.EXTENT]) + room * rng.random(2)
    centres = np.array([(x + radius * LETTER_PITCH * i, y) for i in range(len(objects))])
    return _at([dataclasses.replace(thing, size="large") for thing in objects], centres)


def prompt_row(scene: Scene) -> dict[str, Any]:
    """The scene as a row of `prompts.jsonl`; `size` is None if the caption does not name it."""
    hidden = {} if scene.sizes_named else {"size": None}
    objects = [dataclasses.asdict(thing) | hidden for thing in scene.objects]
    relation = dataclasses.asdict(scene.relation) if scene.relation else None
    return {"prompt": scene.caption, "kind": scene.kind, "objects": objects, "relation": relation}


def scene_from_row(row: Mapping[str, Any], rng: np.random.Generator) -> Scene:
    """A scene that satisfies a prompt row.

    Uses the row's positions if all sizes and positions are given and fit; otherwise samples unnamed
    sizes (equal ones for equal objects) and new positions.

    Raises:
      ShapesError: the objects do not fit into the image.
    """
    named = all(thing.get("size") for thing in row["objects"])
    sizes: dict[tuple[str, str], str] = {}
    objects = []
    for thing in row["objects"]:
        sampled = sizes.setdefault((thing["shape"], thing["color"]), str(rng.choice(list(SIZES))))
        position = (float(thing.get("x") or 0), float(thing.get("y") or 0))
        size = thing.get("size") or sampled
        objects.append(Object(thing["shape"], thing["color"], size, *position))
    fields = row.get("relation")
    relation = Relation(fields["word"], fields["first"], fields["second"]) if fields else None
    if row["kind"] == "word":
        return Scene("word", place_word(objects, rng), None, row["prompt"], False)
    placed = tuple(objects) if named and _fits(objects) else _place(objects, relation, rng)
    return Scene(row["kind"], placed, relation, row["prompt"], named)


def _compose(kind: str, rng: np.random.Generator) -> tuple[tuple[Object, ...], Relation | None]:
    """Objects without positions, and their relation."""
    if kind == "relation":
        while True:
            pair = (_random_object(rng), _random_object(rng))
            if (pair[0].color, pair[0].shape) != (pair[1].color, pair[1].shape):
                return pair, Relation(RELATIONS[rng.integers(len(RELATIONS))], 0, 1)
    number = 1 if kind == "single" else int(rng.integers(min(NUMBERS), max(NUMBERS) + 1))
    return (_random_object(rng),) * number, None


def _random_object(rng: np.random.Generator) -> Object:
    shape, color, size = rng.integers((len(SHAPES), len(COLORS), len(SIZES)))
    return Object(SHAPES[shape], tuple(COLORS)[color], tuple(SIZES)[size])


def _indices(thing: Object) -> tuple[int, int, int]:
    return list(COLORS).index(thing.color), SHAPES.index(thing.shape), list(SIZES).index(thing.size)


def _is_novel(objects: Sequence[Object], relation: Relation | None) -> bool:
    if relation:
        combined = _is_held_statement(objects, relation)
    else:
        combined = len(objects) > 1 and _is_held_number(len(objects), objects[0])
    return combined or any(map(_is_held_object, objects))


def _is_held_object(thing: Object) -> bool:
    """One sixth of the (colour, shape, size) triples, with every colour, shape and size."""
    color, shape, size = _indices(thing)
    return (color + 2 * shape + 3 * size) % 6 == 0


def _is_held_number(number: int, thing: Object) -> bool:
    """One sixth of the (number, colour, shape, size) combinations."""
    color, shape, size = _indices(thing)
    return (color + 3 * shape + size + 2 * number) % 6 == 1


def _is_held_statement(objects: Sequence[Object], relation: Relation) -> bool:
    """One sixth of the statements; "a above b" and "b below a" are the same statement."""
    first, second = objects[relation.first], objects[relation.second]
    if relation.word in ("right of", "below"):
        first, second = second, first
    (color_1, shape_1, _), (color_2, shape_2, _) = _indices(first), _indices(second)
    axis = AXIS[relation.word]
    return (color_1 + 2 * color_2 + shape_1 + 3 * shape_2 + 2 * axis) % 6 == 0


def _place(
    objects: Sequence[Object], relation: Relation | None, rng: np.random.Generator
) -> tuple[Object, ...]:
    extents = _extents(objects)
    if relation and len(objects) == 2:
        centres = _related_centres(extents, relation, rng)
    else:
        centres = _scattered_centres(extents, rng)
    return _at(objects, centres)


def _at(objects: Sequence[Object], centres: np.ndarray) -> tuple[Object, ...]:
    # Rounded as in prompt rows, so that a row determines its scene.
    return tuple(
        dataclasses.replace(thing, x=round(float(x), 2), y=round(float(y), 2))
        for thing, (x, y) in zip(objects, centres, strict=True)
    )


def _extents(objects: Sequence[Object]) -> np.ndarray:
    """Half the sides of the (square) bounding boxes, pixels [n]."""
    return np.array([EXTENT[thing.shape] * SIZES[thing.size] for thing in objects])


def _related_centres(
    extents: np.ndarray, relation: Relation, rng: np.random.Generator
) -> np.ndarray:
    """Centres [2, 2] for which the relation holds with an offset of at most MAX_SLANT."""
    along = AXIS[relation.word]
    forward = relation.word in ("left of", "above")
    low, high = (relation.first, relation.second) if forward else (relation.second, relation.first)
    centres, lowest, highest = np.empty((2, 2)), MARGIN + extents, IMAGE_SIZE - MARGIN - extents
    distance = rng.uniform(extents.sum() + GAP, highest[high] - lowest[low])
    centres[low, along] = rng.uniform(lowest[low], highest[high] - distance)
    centres[high, along] = centres[low, along] + distance
    centres[low, 1 - along] = across = rng.uniform(lowest[low], highest[low])
    reach = MAX_SLANT * distance
    centres[high, 1 - along] = rng.uniform(
        max(lowest[high], across - reach), min(highest[high], across + reach)
    )
    return centres


def _scattered_centres(extents: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Centres [n, 2], uniform among those that keep the gap; in quadrants if none is found."""
    number = len(extents)
    lowest, highest = MARGIN + extents[:, None], IMAGE_SIZE - MARGIN - extents[:, None]
    tries = rng.uniform(lowest, highest, size=(PLACEMENT_TRIES, number, 2))
    fitting = np.flatnonzero(_are_apart(tries, extents))
    if len(fitting):
        return tries[fitting[0]]
    if number > 4:
        raise ShapesError(f"{number} objects do not fit into the image; at most 4 always do")
    cells = rng.permutation(4)[:number]
    corner = np.stack([cells % 2, cells // 2], axis=1) * (IMAGE_SIZE - 2 * MARGIN + GAP) / 2
    room = (IMAGE_SIZE - 2 * MARGIN - GAP) / 2 - 2 * extents[:, None]
    return lowest + corner + rng.random((number, 2)) * room


def _are_apart(centres: np.ndarray, extents: np.ndarray) -> np.ndarray | np.bool_:
    """Whether all bounding boxes keep the gap: centres [..., n, 2], extents [n] -> [...]."""
    i, j = np.triu_indices(len(extents), 1)
    distance = np.abs(centres[..., i, :] - centres[..., j, :]).max(-1)
    return (distance >= extents[i] + extents[j] + GAP).all(-1)


def _fits(objects: Sequence[Object]) -> bool:
    extents = _extents(objects)
    centres = np.array([(thing.x, thing.y) for thing in objects])
    inside = np.abs(centres - IMAGE_SIZE / 2).max(-1) <= IMAGE_SIZE / 2 - MARGIN - extents + 0.01
    # Rounded positions may miss the gap by a hundredth.
    return bool(inside.all() and _are_apart(centres, extents - 0.01))
