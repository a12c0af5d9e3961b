"""Words in the shapes world: three large letters of one colour, for DrawBench's category Text.

A word is consonant, vowel, consonant: CAT, SUN, and many without meaning. One sixth of the words is
held out and tests spelling. A scene is a `scenes.Scene` whose objects are the letters from left to
right, a pure function of (split, index).
"""

from __future__ import annotations

import numpy as np

from imagen_jax.worlds.shapes import scenes
from imagen_jax.worlds.shapes.captions import SPELLING_TEMPLATES, Object, sentence

# Letters that do not touch their neighbours at 64 pixels.
CONSONANTS = "BCDFGHLMNPST"
VOWELS = "AEIOU"
SPLITS = {"train": 12_000, "held_out": 300}
SPELLED_SHARE = 0.7
_STREAM, _PARAPHRASE_STREAM = 7, 77


def scene(split: str, index: int) -> scenes.Scene:
    """The word at `index` of a split; deterministic.

    Args:
      split: train or held_out (words absent from training).
      index: 0 or more.

    Raises:
      ShapesError: unknown split or negative index.
    """
    if split not in SPLITS or index < 0:
        raise scenes.ShapesError(
            f"split={split!r}, index={index}: must be one of {', '.join(SPLITS)} and 0 or more"
        )
    rng = np.random.default_rng((scenes.VERSION, _STREAM, list(SPLITS).index(split), index))
    while True:
        word = "".join(str(rng.choice(list(some))) for some in (CONSONANTS, VOWELS, CONSONANTS))
        if is_held_out(word) == (split == "held_out"):
            break
    color = str(rng.choice(list(scenes.COLORS)))
    objects = scenes.place_word([Object(letter, color, "large") for letter in word], rng)
    return scenes.Scene("word", objects, None, sentence("word", objects, None, False, rng), False)


def paraphrases(split: str, index: int) -> tuple[str, ...]:
    """`scenes.PARAPHRASES` equivalent captions of a word; its own caption is the first.

    Most of the others spell it: 'first "s", second "u", third "n", all red'.
    """
    shown = scene(split, index)
    stream = (scenes.VERSION, _PARAPHRASE_STREAM, list(SPLITS).index(split), index)
    rng = np.random.default_rng(stream)
    captions = [shown.caption]
    while len(captions) < scenes.PARAPHRASES:
        templates = SPELLING_TEMPLATES if rng.random() < SPELLED_SHARE else ()
        captions.append(sentence("word", shown.objects, None, False, rng, templates))
    return tuple(captions)


def is_held_out(word: str) -> bool:
    """Whether a three-letter word is absent from training: one sixth of them."""
    first, middle, last = (
        letters.index(letter)
        for letters, letter in zip((CONSONANTS, VOWELS, CONSONANTS), word, strict=True)
    )
    return (first + 2 * middle + 3 * last) % 6 == 0
