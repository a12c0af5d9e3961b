"""Scorers: programs that check whether an image shows what its prompt row specifies.

A scorer belongs to a data set whose captions it can parse. `sweep`, `edges` and `drawbench` use it
through the protocol below and find it by name: the entry points of the group `imagen_jax.scorers`,
or `package.module:name` of a user's own (docs/extending.md).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from imagen_jax.config import plugins
from imagen_jax.config.fields import ConfigError

Row = Mapping[str, Any]


@runtime_checkable
class Scorer(Protocol):
    """Scores images against prompt rows, the lines of a samples.jsonl or of a prompt file."""

    def can_score(self, row: Row) -> bool:
        """Whether the row specifies what its image should show."""
        ...

    def real_image(
        self, row: Row, *, index: int, size: int | None = None
    ) -> UInt8[np.ndarray, "h w 3"]:
        """An image that matches a row of `can_score`, the same one at every call.

        Args:
          row: prompt row.
          index: position of the row in its file; seeds what the row leaves open.
          size: side in pixels; None: that of the data set.
        """
        ...

    def evaluate(self, samples_dir: str | os.PathLike[str], by: str = "kind") -> dict[str, Any]:
        """Scores a folder of samples, with yardsticks.

        Args:
          samples_dir: folder written by `imagen sample`.
          by: row field that groups the prompts.

        Returns:
          `title`, `pictures` (number of images) and `kinds`: group -> `n`, and under `scores`,
          `ceiling` (real images of the same rows) and `chance` (rows shuffled within the group)
          attribute -> `mean`, `low`, `high` in 0..1 and `n`. The attribute `exact` is required:
          everything is right. `ceiling` and `chance` may be empty. Several groups are followed by
          `all`.

        Raises:
          EvaluationError: a file is missing, or a row cannot be scored.
        """
        ...

    def score_folder(
        self, samples_dir: str | os.PathLike[str]
    ) -> dict[str, dict[str, dict[str, float]]]:
        """Group -> attribute -> rate: the `scores` of `evaluate` by kind, without yardsticks."""
        ...

    def format_table(self, report: Mapping[str, Any]) -> str:
        """A report of `evaluate` as plain text."""
        ...


_METHODS = ("can_score", "real_image", "evaluate", "score_folder", "format_table")


def find(name: str) -> Scorer:
    """The scorer of a name.

    Args:
      name: an entry point of the group `imagen_jax.scorers`, or `package.module:name`.

    Raises:
      ConfigError: unknown name, failing import, or an object without the methods of `Scorer`.
    """
    scorer = plugins.find("--scorer", name, plugins.SCORERS, {})
    missing = [method for method in _METHODS if not callable(getattr(scorer, method, None))]
    if missing or isinstance(scorer, type):
        problem = "is a class; name an instance" if not missing else f"has no {', '.join(missing)}"
        raise ConfigError(f"--scorer={name!r} {problem}; see imagen_jax.evaluation.scorers.Scorer")
    return scorer
