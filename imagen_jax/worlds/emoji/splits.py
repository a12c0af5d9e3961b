"""Splits: by a hash of the emoji's key, so that nothing depends on order or a random state.

- `train`: every emoji that is not held out. All untoned emoji and those of two tones are in it.
- `combinations_dev`, `combinations_test`: combinations of a person (or hand) and a skin tone; the
  person is in `train` with other tones and without one, the tone with other persons.
- Other names are split by the hash of the emoji's key as well: all names of an emoji are in one of
  `names_dev` and `names_test`.
"""

from __future__ import annotations

import hashlib

COMBINATIONS = {"combinations_test": 0.12, "combinations_dev": 0.06}  # Of one-tone emoji.
SPLITS = ("train", "combinations_dev", "combinations_test")
NAMES_SPLITS = ("names_dev", "names_test")
NAMES_TEST = 2 / 3  # Of the emoji that have other names.


def share(purpose: str, key: str) -> float:
    """A number in [0, 1) that depends on its arguments alone: their SHA-256."""
    digest = hashlib.sha256(f"{purpose}|{key}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split(key: str, tone: str) -> str:
    """The split of an emoji's image.

    Args:
      key: OpenMoji's hex code, "1F469-1F3FE-200D-1F680".
      tone: as of `captions.tone`.
    """
    if not tone or "+" in tone:
        return "train"
    position = share("combinations", key)
    for name, size in COMBINATIONS.items():
        if position < size:
            return name
        position -= size
    return "train"


def names_split(key: str) -> str:
    """The split of all other names of an untoned emoji."""
    return "names_test" if share("names", key) < NAMES_TEST else "names_dev"
