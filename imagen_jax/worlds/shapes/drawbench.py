"""DrawBench for the shapes world: prompts in the paper's categories, with the expected objects.

Nine of the paper's eleven categories (Sec. 4.3, Table A.1) have a counterpart. Rows have `objects`
and `relation`, so that `alignment` can score samples. Prompts are passed to the model as they are,
with misspellings and unknown words. Without counterpart: DALL-E and Reddit, collections of
third-party prompts.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from imagen_jax.worlds.shapes import scenes, words
from imagen_jax.worlds.shapes.captions import RELATIONS, Object, Relation, sentence

PROMPTS_PER_CATEGORY = 32
SEED = 0
# Scenes from this index on are in no data set.
FIRST_SCENE = 1_000_000

# Synonyms that no caption has.
RARE = {
    "red": "crimson",
    "green": "emerald",
    "blue": "azure",
    "yellow": "lemon-coloured",
    "purple": "violet",
    "orange": "tangerine",
    "cyan": "turquoise",
    "white": "ivory",
    "circle": "disc",
    "square": "tile",
    "triangle": "pyramid",
    "cross": "plus sign",
    "small": "tiny",
    "medium": "mid-sized",
    "large": "huge",
}
# Longer than any caption; fields as in `captions.TEMPLATES`.
DESCRIPTIONS = {
    "single": (
        "in the picture there is one thing and nothing else, the thing is {a}",
        "this is a picture that shows nothing else than one thing: {a}",
        "an image with a single thing, there is {a} and there is nothing else to it",
    ),
    "count": (
        "a picture with {n} things, all {n} of the things are {xs} and nothing else",
        "in this image there are exactly {n} things and each thing is {a}",
        "a group of things, {n} of them, this picture shows {n} {xs}",
    ),
    "relation": (
        "there are two things in this picture, the {x} is {to} the {y}",
        "this image shows {b} and, {to} it, one other thing: it is {a}",
        "a picture of two things: {to} the one that is {b} there is {a}",
    ),
}
Rows = Iterator[dict[str, Any]]


def rows() -> list[dict[str, Any]]:
    """The prompts, PROMPTS_PER_CATEGORY of each category; deterministic.

    Returns:
      Rows of `scenes.prompt_row` without positions and with `category`.
    """
    found = []
    for number, (category, make) in enumerate(CATEGORIES.items()):
        seen: set[str] = set()
        for row in make(np.random.default_rng((SEED, number))):
            if row["prompt"] not in seen:
                seen.add(row["prompt"])
                found.append({"category": category, **row})
            if len(seen) == PROMPTS_PER_CATEGORY:
                break
    return found


def write(path: str) -> None:
    """Writes `rows` as a prompt file, `configs/drawbench_shapes.jsonl`."""
    lines = [json.dumps(row) + "\n" for row in rows()]
    pathlib.Path(path).write_text("".join(lines), encoding="utf-8")


def _row(
    kind: str,
    objects: Sequence[Object],
    relation: Relation | None,
    rng: np.random.Generator,
    *,
    sizes_named: bool = True,
    templates: Sequence[str] = (),
    worded_objects: Sequence[Object] = (),
) -> dict[str, Any]:
    """A prompt row; `worded_objects`: the objects in the prompt's words, if these differ."""
    prompt = sentence(kind, worded_objects or objects, relation, sizes_named, rng, templates)
    row = scenes.prompt_row(scenes.Scene(kind, tuple(objects), relation, prompt, sizes_named))
    for thing in row["objects"]:
        del thing["x"], thing["y"]  # The prompt does not name positions.
    return row


def _colors(rng: np.random.Generator) -> Rows:
    """Every colour with every shape, without size."""
    for color in scenes.COLORS:
        for shape in scenes.SHAPES:
            thing = Object(shape, color, "medium")
            yield _row("single", [thing], None, rng, sizes_named=False)


def _conflicting(rng: np.random.Generator) -> Rows:
    """Combinations of colour, size and shape absent from training."""
    while True:
        for scene in _scenes("held_out", "single"):
            yield _row("single", scene.objects, None, rng)


def _scenes(split: str, *kinds: str) -> Iterator[scenes.Scene]:
    index = FIRST_SCENE
    while True:
        scene = scenes.scene(split, index)
        index += 1
        if scene.kind in kinds:
            yield scene


def _of_scenes(kind: str) -> Callable[[np.random.Generator], Rows]:
    """Held-out combinations: a number of an object, or a statement."""

    def make(rng: np.random.Generator) -> Rows:
        for scene in _scenes("held_out", kind):
            yield _row(kind, scene.objects, scene.relation, rng, sizes_named=scene.sizes_named)

    return make


def _descriptions(rng: np.random.Generator) -> Rows:
    """Long sentences about scenes of training combinations."""
    for scene in _scenes("seen_test", *scenes.KINDS):
        templates = DESCRIPTIONS[scene.kind]
        yield _row(scene.kind, scene.objects, scene.relation, rng, templates=templates)


def _compositional(rng: np.random.Generator) -> Rows:
    """Pairs with the same words and exchanged roles of the objects."""
    for scene in _scenes("seen_test", "relation"):
        first, second = scene.objects
        word = RELATIONS[rng.integers(len(RELATIONS))]
        for things in ((first, second), (second, first)):
            pair = Relation(word, 0, 1)
            yield _row(
                "relation", things, pair, rng, sizes_named=False, templates=("{a} {word} {b}",)
            )


def _text(rng: np.random.Generator) -> Rows:
    """Words absent from training images."""
    index = FIRST_SCENE
    while True:
        scene = words.scene("held_out", index)
        yield _row("word", scene.objects, None, rng, sizes_named=False)
        index += 1


def _misspellings(rng: np.random.Generator) -> Rows:
    """A typing error in each of colour, shape and size."""
    return _reworded(rng, lambda word: _misspelt(word, rng))


def _rare_words(rng: np.random.Generator) -> Rows:
    """Synonyms absent from the language model's training text."""
    return _reworded(rng, RARE.__getitem__)


def _reworded(rng: np.random.Generator, reword: Callable[[str], str]) -> Rows:
    for scene in _scenes("seen_test", "single", "count"):
        thing = scene.objects[0]
        worded = Object(reword(thing.shape), reword(thing.color), reword(thing.size))
        count = len(scene.objects)
        yield _row(scene.kind, scene.objects, None, rng, worded_objects=[worded] * count)


def _misspelt(word: str, rng: np.random.Generator) -> str:
    """The word with two letters exchanged, one omitted or one doubled; the first is unchanged."""
    at = int(rng.integers(1, len(word) - 1))
    rest = {0: word[at + 1] + word[at] + word[at + 2 :], 1: word[at + 1 :], 2: word[at] + word[at:]}
    wrong = word[:at] + rest[int(rng.integers(3))]
    return wrong if wrong != word else _misspelt(word, rng)


CATEGORIES: Mapping[str, Callable[[np.random.Generator], Rows]] = {
    "Colors": _colors,
    "Conflicting": _conflicting,
    "Counting": _of_scenes("count"),
    "Descriptions": _descriptions,
    "Gary Marcus et al.": _compositional,
    "Misspellings": _misspellings,
    "Positional": _of_scenes("relation"),
    "Rare Words": _rare_words,
    "Text": _text,
}
