"""Splits: by a hash of the emoji's key, so that nothing depends on order or a random state.

- `train`: every emoji that is not held out. All untoned emoji and those of two tones are in it.
- `combinations_test`, `combinations_dev`: combinations of a person (or hand) and a skin tone. Of
  the five tones of a person, at most one is in each; the person is in `train` with at least three
  other tones and without one, the tone with other persons.
- Other names are split by the hash of the emoji's key as well: all names of an emoji are in one of
  `names_dev` and `names_test`.
"""

from __future__ import annotations

import hashlib

from imagen_jax.worlds.emoji.captions import TONES

# Share of the persons of which one tone is held out.
COMBINATIONS = {"combinations_test": 0.6, "combinations_dev": 0.3}
SPLITS = ("train", "combinations_dev", "combinations_test")
NAMES_SPLITS = ("names_dev", "names_test")
NAMES_TEST = 0.7  # Of the emoji that have other names.


def share(purpose: str, key: str) -> float:
    """A number in [0, 1) that depends on its arguments alone: their SHA-256."""
    digest = hashlib.sha256(f"{purpose}|{key}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split(untoned: str, tone: str) -> str:
    """The split of an emoji's image.

    Args:
      untoned: OpenMoji's hex code of the same emoji without tone, "1F469-200D-1F680".
      tone: as of `captions.tone`.
    """
    if tone not in TONES:
        return "train"
    order = sorted(TONES, key=lambda name: share("tone", f"{untoned}|{name}"))
    held_out = dict(zip(order, COMBINATIONS, strict=False)).get(tone)
    if held_out and share(held_out, untoned) < COMBINATIONS[held_out]:
        return held_out
    return "train"


def names_split(key: str) -> str:
    """The split of all other names of an untoned emoji."""
    return "names_test" if share("names", key) < NAMES_TEST else "names_dev"
