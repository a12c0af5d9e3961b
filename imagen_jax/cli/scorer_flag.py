"""The flag --scorer of the evaluations that check images against their prompts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from imagen_jax.config import plugins
from imagen_jax.config.fields import ConfigError
from imagen_jax.evaluation import scorers
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.evaluation.scorers import Scorer

DEFAULT = "shapes"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds --scorer."""
    parser.add_argument(
        "--scorer",
        default=DEFAULT,
        metavar="NAME",
        help="checks images against their prompt rows: an installed entry point "
        f"({', '.join(plugins.names(plugins.SCORERS))}) or package.module:name of your own; "
        f"default {DEFAULT}",
    )


def find(
    flags: argparse.Namespace, rows: Sequence[Mapping[str, Any]] | None = None
) -> Scorer | None:
    """The scorer of an evaluation that can do without one.

    Args:
      flags: parsed flags with `scorer`.
      rows: prompt rows that have to be scored; None: any.

    Returns:
      None if the default scorer is not installed (with a notice) or cannot score every row.

    Raises:
      ConfigError, EvaluationError: the same for a scorer that the user chose.
    """
    chosen = flags.scorer != DEFAULT
    try:
        scorer = scorers.find(flags.scorer)
    except ConfigError as error:
        if chosen:
            raise
        print(f"without a scorer: {error}", file=sys.stderr)
        return None
    for number, row in enumerate(rows or (), 1):
        if not scorer.can_score(row):
            if chosen:
                raise EvaluationError(
                    f"--scorer={flags.scorer} cannot score row {number} of --prompts "
                    f"({row.get('prompt')!r}); give another scorer or other prompts"
                )
            return None
    return scorer
