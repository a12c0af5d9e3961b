"""The shapes world as a `Scorer` of imagen_jax.evaluation.scorers; entry point `shapes`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from imagen_jax.evaluation.scorers import Row
from imagen_jax.worlds.shapes import alignment, scenes


@dataclasses.dataclass(frozen=True)
class ShapesScorer:
    """Scores rows that have `kind`, `objects` and `relation` (`scenes.prompt_row`)."""

    def can_score(self, row: Row) -> bool:
        """Whether the row lists objects."""
        return bool(row.get("objects")) and "kind" in row

    def real_image(
        self, row: Row, *, index: int, size: int | None = None
    ) -> UInt8[np.ndarray, "h w 3"]:
        """A rendered scene of the row; (alignment.SEED, index) seeds unnamed sizes and places."""
        rng = np.random.default_rng((alignment.SEED, index))
        return scenes.render(scenes.scene_from_row(row, rng), size or scenes.IMAGE_SIZE)

    def evaluate(self, samples_dir: str | os.PathLike[str], by: str = "kind") -> dict[str, Any]:
        """See `alignment.evaluate`."""
        return alignment.evaluate(samples_dir, by)

    def score_folder(
        self, samples_dir: str | os.PathLike[str]
    ) -> dict[str, dict[str, dict[str, float]]]:
        """See `alignment.score_folder`."""
        return alignment.score_folder(samples_dir)

    def format_table(self, report: Mapping[str, Any]) -> str:
        """See `alignment.format_table`."""
        return alignment.format_table(report)


SCORER = ShapesScorer()
