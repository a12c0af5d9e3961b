"""Oracle text encoder of the shapes world: the attributes of the objects that a caption names.

For ablations only. One token per object of one-hot groups: colour, shape, size (or none), count and
position in the relation. It parses the captions of the shapes world by their grammar, and gives an
upper bound for text encoders: the alignment of a model that understands every caption.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.text import TextConfig
from imagen_jax.text.vocabulary import TokenBatch

GROUPS: dict[str, tuple[str, ...]] = {
    "color": ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white"),
    "shape": ("circle", "square", "triangle", "cross"),
    "size": ("", "small", "medium", "large"),
    "number": ("1", "2", "3", "4"),
    "place": ("", "left of", "right of", "above", "below"),
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = {"two": "2", "three": "3", "four": "4"}
MAX_OBJECTS = 2
DIM = 32  # 25 channels of GROUPS, one for the end token, the others zero.
# Every token has the norm of a T5 vector of this width: root mean square 1.
SCALE = (DIM / len(GROUPS)) ** 0.5

_OBJECT = re.compile(
    rf"(?:({'|'.join(GROUPS['size'][1:])}) )?({'|'.join(GROUPS['color'])}) "
    rf"({'|'.join(GROUPS['shape'])})"
)
_RELATION = re.compile(rf"({'|'.join(OPPOSITE)})(?: (it))?\b")
_NUMBER = re.compile(rf"\b({'|'.join(NUMBERS)}|[234])\b")


def read(caption: str) -> list[dict[str, str]]:
    """The objects of a caption in order of mention, with one value per group.

    In a relation, "A above B", "above B is A" and "B has A above it" all place A above.
    """
    text = caption.lower()
    mentions = list(_OBJECT.finditer(text))[:MAX_OBJECTS]
    number = _NUMBER.search(text)
    count = NUMBERS.get(number[1], number[1]) if number else "1"
    objects = [
        {"size": m[1] or "", "color": m[2], "shape": m[3], "number": count, "place": ""}
        for m in mentions
    ]
    relation = _RELATION.search(text)
    if relation and len(objects) == MAX_OBJECTS:
        word, opposite = relation[1], OPPOSITE[relation[1]]
        describes_second = relation[2] or relation.start() < mentions[0].start()
        places = (opposite, word) if describes_second else (word, opposite)
        for thing, place in zip(objects, places, strict=True):
            thing["place"] = place
    return objects


class OracleEncoder:
    """One vector per object of the caption, and one for the end of the caption."""

    dim = DIM

    def __init__(self, config: TextConfig):
        """Reads `max_len` of the configuration; there are no weights."""
        if config.max_len <= MAX_OBJECTS:
            raise ConfigError(f"config.text.max_len={config.max_len} must be at least 3")
        self.max_len = config.max_len

    def fingerprint(self) -> dict[str, str | int]:
        """Name, groups and length."""
        return {"encoder": "shapes_oracle", "groups": str(GROUPS), "max_len": self.max_len}

    def token_count(self, caption: str) -> int:
        """Number of objects plus the end token."""
        return len(read(caption)) + 1

    def tokenize(self, captions: Sequence[str]) -> TokenBatch:
        """Ids of B captions padded to max_len: 1 is the end, others index kinds of objects."""
        ids = np.zeros((len(captions), self.max_len), np.int32)
        for row, caption in enumerate(captions):
            for place, thing in enumerate(read(caption)):
                index = 0
                for group, names in GROUPS.items():
                    index = index * len(names) + names.index(thing[group])
                ids[row, place] = index + 2
            ids[row, np.count_nonzero(ids[row])] = 1
        return TokenBatch(ids, ids > 0, ())

    def encode(
        self, ids: Int[Array | np.ndarray, "b l"], mask: Bool[Array | np.ndarray, "b l"]
    ) -> Float[Array, "b l d"]:
        """Concatenated one-hot groups with the norm of a T5 vector; the end has its own channel."""
        left, parts = jnp.maximum(jnp.asarray(ids) - 2, 0), []
        for names in reversed(GROUPS.values()):
            parts.insert(0, jax.nn.one_hot(left % len(names), len(names)))
            left = left // len(names)
        known = jnp.concatenate(parts, axis=-1)
        known = jnp.pad(known, ((0, 0), (0, 0), (0, DIM - known.shape[-1])))
        end = jax.nn.one_hot(jnp.full(ids.shape, DIM - 1), DIM)
        vectors = jnp.where((jnp.asarray(ids) == 1)[..., None], end, known)
        return SCALE * vectors * jnp.asarray(mask)[..., None]

    def flops(self, length: int) -> float:
        """Zero: negligible."""
        return 0.0


def load(config: TextConfig, mesh: Mesh | None = None) -> OracleEncoder:
    """The encoder; config.path is not used."""
    return OracleEncoder(config)
