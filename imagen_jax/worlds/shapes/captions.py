"""Captions of the shapes world: objects, relations, templates and the sentence of a scene."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

AXIS = {"left of": 0, "right of": 0, "above": 1, "below": 1}
RELATIONS = tuple(AXIS)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

NUMBERS = {2: "two", 3: "three", 4: "four"}
DIGIT_SHARE = 0.2
PERIOD_SHARE = 0.25
SIZE_NAMED_SHARE = {"single": 0.7, "count": 0.7, "relation": 0.5}
# {a}, {b}: with article; {x}, {y}: without; {xs}: plural; {word}: left of; {to}: to the left of;
# {w}: letters as one word, {l[0]}: the first of them; {c}: their colour.
TEMPLATES = {
    "single": (
        "{a}",
        "one {x}",
        "a single {x}",
        "there is {a}",
        "a picture of {a}",
        "an image showing {a}",
        "this picture shows {a}",
        "{a} and nothing else",
    ),
    "count": (
        "{n} {xs}",
        "there are {n} {xs}",
        "exactly {n} {xs}",
        "a group of {n} {xs}",
        "a picture of {n} {xs}",
        "an image showing {n} {xs}",
        "this picture shows {n} {xs}",
        "{n} {xs} and nothing else",
    ),
    "relation": (
        "{a} {word} {b}",
        "{a} {to} {b}",
        "{a} is {to} {b}",
        "the {x} is {to} the {y}",
        "there is {a} {to} {b}",
        "a picture of {a} {word} {b}",
        "an image showing {a} {to} {b}",
        "{to} {b} there is {a}",
        "{to} {b} is {a}",
        "{b} with {a} {to} it",
        "{b} has {a} {to} it",
        "there is {b} and {to} it is {a}",
    ),
    "word": (
        'the word "{w}" in {c}',
        'the {c} word "{w}"',
        '"{w}" in {c}',
        '"{w}" in {c} letters',
        '{c} letters that spell "{w}"',
        'the word "{w}" written in {c}',
        'a picture of the {c} word "{w}"',
        'this picture says "{w}" in {c}',
    ),
}
# Templates of the text corpus only, never of image captions: the singular of a counted object.
SINGULAR_TEMPLATES = ("{n} things, each {a}", "{a}, {n} times", "each of {n} things is {a}")

# Text corpus only: the positions of a relation's objects.
POSITION_TEMPLATES = (
    "{x} {p} and then {y} {q}",
    "{y} {q} and then {x} {p}",
    "{p} {x} and then {q} {y}",
    "{q} {y} and then {p} {x}",
)
# Text corpus only: the letters of a word by position.
SPELLING_TEMPLATES = (
    'first "{l[0]}", second "{l[1]}", third "{l[2]}", all {c}',
    'third "{l[2]}", second "{l[1]}", first "{l[0]}", all {c}',
    'a {c} first "{l[0]}", a {c} second "{l[1]}", a {c} third "{l[2]}"',
)
SIDE = {"left of": "left", "right of": "right", "above": "above", "below": "below"}


@dataclasses.dataclass(frozen=True)
class Object:
    """One coloured shape; x, y in pixels."""

    shape: str
    color: str
    size: str
    x: float = 0.0
    y: float = 0.0


@dataclasses.dataclass(frozen=True)
class Relation:
    """`objects[first]` is `word` (above, below, left of, right of) `objects[second]`."""

    word: str
    first: int
    second: int


def sentence(
    kind: str,
    objects: Sequence[Object],
    relation: Relation | None,
    sizes_named: bool,
    rng: np.random.Generator,
    templates: Sequence[str] = (),
) -> str:
    """A random template of the kind with the objects filled in.

    Args:
      kind: single, count, relation or word.
      objects: the objects; equal ones for a count, letters for a word.
      relation: `objects[first]` is `word` `objects[second]`.
      sizes_named: whether the sentence names sizes.
      rng: samples the template, digits or words, and the full stop.
      templates: candidates; empty: those of the kind.
    """
    templates = templates or TEMPLATES[kind]
    template = templates[int(rng.integers(len(templates)))]
    things = [objects[relation.first], objects[relation.second]] if relation else objects
    x, y = (_named(thing, sizes_named) for thing in (things[0], things[-1]))
    a, b = (f"an {name}" if name[0] in "aeiou" else f"a {name}" for name in (x, y))
    words: dict[str, str | list[str]] = {"a": a, "b": b, "x": x, "y": y}
    if relation:
        words["word"] = relation.word
        words["p"], words["q"] = SIDE[relation.word], SIDE[OPPOSITE[relation.word]]
        words["to"] = relation.word if AXIS[relation.word] else f"to the {relation.word}"
    elif kind == "count":
        words["n"] = str(len(objects)) if rng.random() < DIGIT_SHARE else NUMBERS[len(objects)]
        words["xs"] = x + ("es" if x.endswith("s") else "s")
    elif kind == "word":
        spelled = [thing.shape.lower() for thing in objects]
        words |= {"w": "".join(spelled), "l": spelled, "c": objects[0].color}
    return template.format(**words) + "." * int(rng.random() < PERIOD_SHARE)


def _named(thing: Object, size_named: bool) -> str:
    words = (thing.size, thing.color, thing.shape)
    return " ".join(words if size_named else words[1:])
