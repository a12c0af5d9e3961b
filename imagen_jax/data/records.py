"""What an index pass finds: usable records, and a quarantine that names all the others.

Shared by the readers of the kinds of source (folder.py, tfrecord.py) and by index.py, which makes
random access of them.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from imagen_jax.config import ConfigError

SMALLEST_SIDE = 8  # Pixels; smaller pictures are placeholders and tracking pixels, not content.


class Record(NamedTuple):
    """One picture (pixels, RGB) with all its captions."""

    key: str
    image: UInt8[np.ndarray, "h w 3"]
    captions: tuple[str, ...]


class Entry(NamedTuple):
    """Where a usable record lies, without its pixels.

    Attributes:
      key: stable name of the record.
      captions: at least one, none empty.
      size: bytes of the encoded picture.
      place: what the reader needs to find it again; empty where the key says it all.
    """

    key: str
    captions: tuple[str, ...]
    size: int
    place: tuple[int, ...] = ()


@dataclasses.dataclass
class Quarantine:
    """The records that are not used, each by name with the reason; nothing is dropped silently."""

    rejected: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    total: int = 0

    def add(self, key: str, reason: str) -> None:
        """Names a record that is not used; `reason` is a kind with details in brackets."""
        self.rejected.append((key, reason))

    @property
    def share(self) -> float:
        """Share of all records that are not used, 0..1."""
        return len(self.rejected) / max(self.total, 1)

    def counts(self) -> dict[str, int]:
        """Number of records per kind of reason, most frequent first."""
        kinds = (reason.split(" (")[0] for _, reason in self.rejected)
        return dict(collections.Counter(kinds).most_common())

    def names(self, limit: int) -> str:
        """The first names with their reasons, in one line."""
        shown = ", ".join(f"{key}: {reason}" for key, reason in self.rejected[:limit])
        return shown + (", ..." if len(self.rejected) > limit else "")

    def summary(self) -> str:
        """A line for people: how many, why, and the first of them."""
        if not self.rejected:
            return f"all {self.total} records usable"
        counts = ", ".join(f"{number} {kind}" for kind, number in self.counts().items())
        return (
            f"{len(self.rejected)} of {self.total} records quarantined ({counts}): {self.names(5)}"
        )

    def check(self, limit: float) -> None:
        """Stops a run that would train on too small a rest.

        Raises:
          ConfigError: the share is above `limit`, or nothing is left.
        """
        if self.total == 0:
            raise ConfigError("config.data.path holds no pictures; check the path and the kind")
        if self.share > limit or len(self.rejected) == self.total:
            raise ConfigError(
                f"config.data.max_quarantined={limit:g} but {self.share:.1%} of the records "
                f"({len(self.rejected)} of {self.total}) are unusable: {self.names(3)}; repair or "
                "remove them, or raise --config.data.max_quarantined"
            )


def caption_fault(captions: tuple[str, ...]) -> str | None:
    """Why these captions cannot be used, or None."""
    if not captions:
        return "no caption"
    return None if any(c.strip() for c in captions) else "empty caption"


def size_fault(side: int, min_size: int) -> str | None:
    """Why a picture whose shorter side is `side` pixels cannot be used, or None."""
    limit = max(min_size, SMALLEST_SIDE)
    return f"too small ({side} px, at least {limit} wanted)" if side < limit else None


def clean(captions: tuple[str, ...]) -> tuple[str, ...]:
    """The captions without surrounding white space, without the empty ones."""
    return tuple(c.strip() for c in captions if c.strip())
