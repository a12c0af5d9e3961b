"""Shorter captions: fewer words of a caption that still name one emoji alone.

As further captions in training they teach that a part of a caption means the same image, as a
text encoder alone does not: its vectors of "Japan" and "flag of Japan" are far apart. The rules:

- The words stand in the caption's order; a comma at the end is left out.
- No other emoji's caption holds all these words. "of Japan" names one emoji, "flag" does not.
- At least one is a content word (see `other_names.stems`).
- The result is none of `other_names.read`, which are kept for scoring.
- Captions with a skin tone are not shortened: without its tone a caption fits several images.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from imagen_jax.worlds.emoji import other_names, splits

MOST = 8  # Of a caption, the first in the order of a hash.


def shorter(captions: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The shorter captions of emoji without tone.

    Args:
      captions: caption by OpenMoji's hex code.

    Returns:
      At most MOST for each of those that have any.
    """
    kept = {other_names.normalise(name) for _, name, _ in other_names.read()}
    words = {key: _words(text) for key, text in captions.items()}
    holders: dict[str, set[str]] = {}
    for key, found in words.items():
        for word in found:
            holders.setdefault(word, set()).add(key)
    result = {}
    for key, text in captions.items():
        texts = {
            part
            for part in _parts(text)
            if other_names.normalise(part) not in kept
            and other_names.stems(part)
            and set.intersection(*(holders[word] for word in _words(part))) == {key}
        }
        chosen = sorted(texts, key=lambda part: splits.share("shorter", f"{key}|{part}"))[:MOST]
        if chosen:
            result[key] = tuple(chosen)
    return result


def _words(text: str) -> frozenset[str]:
    return frozenset(other_names.normalise(text).split())


def _parts(text: str) -> set[str]:
    """The texts of some, not all, words of a caption."""
    words = text.split()
    picks = (itertools.combinations(words, count) for count in range(1, len(words)))
    return {" ".join(pick).strip(",") for pick in itertools.chain.from_iterable(picks)}
