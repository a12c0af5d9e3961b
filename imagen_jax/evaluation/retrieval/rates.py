"""Rates of `evaluate retrieval` from marks: by group, with ceiling and chance, and in pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from imagen_jax.evaluation import intervals
from imagen_jax.evaluation.samples import EvaluationError

ALL = "all"
LABELS = {"exact": "top-1", "top5": "top-5"}  # Attributes that the table prints otherwise.


class Marks(NamedTuple):
    """Whether n images are right for the prompts of n rows, by one attribute.

    Attributes:
      table: for each image and each of k distinct answers, whether it would be right.
      columns: the answer of each row; -1: the row does not specify the attribute.
    """

    table: Bool[np.ndarray, "n k"]
    columns: Int[np.ndarray, " n"]

    def own(self) -> Bool[np.ndarray, " n"]:
        """Each image by its own row; False where the row does not specify the attribute."""
        return self.table[np.arange(len(self.columns)), self.columns] & (self.columns >= 0)


class Comparison(NamedTuple):
    """A folder of n samples compared with the gallery.

    Attributes:
      prompts: what identifies the prompt of each row.
      generated: marks of the samples by attribute.
      ceiling: marks of the degraded real images of the same rows.
      results: fields of the card for each row.
    """

    prompts: np.ndarray
    generated: Mapping[str, Marks]
    ceiling: Mapping[str, Marks]
    results: list[dict[str, Any]]


def group(rows: Sequence[Mapping[str, Any]], by: str) -> dict[str, Int[np.ndarray, " k"]]:
    """Indices of the rows of each group; several groups are followed by `all`.

    Args:
      rows: of samples.jsonl.
      by: the field that groups them; rows without it are the group "-". If no row has it, all rows
        are one group.
    """
    names = [str(row[by]) if row.get(by) is not None else "-" for row in rows]
    groups = {name: np.flatnonzero(np.array(names) == name) for name in sorted(set(names))}
    every = {ALL: np.arange(len(rows))}
    if set(groups) == {"-"}:
        return every
    return {**groups, **every} if len(groups) > 1 else groups


def tally(comparison: Comparison, index: Int[np.ndarray, " k"]) -> dict[str, Any]:
    """`n`, `scores`, `ceiling` and `chance` of a group of rows, as `Scorer.evaluate`."""
    prompts = comparison.prompts[index]
    parts: dict[str, dict[str, Any]] = {"scores": {}, "ceiling": {}, "chance": {}}
    for attribute, marks in comparison.generated.items():
        there = marks.columns[index] >= 0
        if not there.any():
            continue
        rows, named = index[there], prompts[there]
        parts["scores"][attribute] = rate(marks.own()[rows], named)
        parts["ceiling"][attribute] = rate(comparison.ceiling[attribute].own()[rows], named)
        table = marks.table[rows][:, marks.columns[rows]]
        others = named[:, None] != named
        some = others.any(1)
        if some.any():
            expected = (table & others).sum(1)[some] / others.sum(1)[some]
            parts["chance"][attribute] = rate(expected, named[some])
    return {"n": len(index), **parts}


def rate(marks: Float[np.ndarray, " n"] | Bool[np.ndarray, " n"], prompts: np.ndarray) -> dict:
    """Mean, 95% Wilson interval over prompts, and number of marks in 0..1."""
    mean = float(np.mean(marks))
    n = intervals.effective_sample_size(list(zip(prompts.tolist(), marks.tolist(), strict=True)))
    low, high = intervals.wilson(mean * n, n)
    return {"mean": mean, "low": low, "high": high, "n": len(marks)}


def differences(
    first: Comparison, second: Comparison, index: Int[np.ndarray, " k"]
) -> dict[str, dict[str, float]]:
    """Rates of a group of rows of the first comparison minus those of the second.

    Args:
      first, second: the rows of both name the same prompts in the same order.
      index: the rows.

    Returns:
      Attribute -> `mean`, `low`, `high` (`intervals.paired_difference`) and `n` prompts.
    """
    found = {}
    for attribute, marks in first.generated.items():
        rows = index[marks.columns[index] >= 0]
        if len(rows):
            own, other = (m.own()[rows].astype(float) for m in (marks, second.generated[attribute]))
            prompts = first.prompts[rows]
            mean, low, high = intervals.paired_difference(own - other, prompts)
            n = len(set(prompts.tolist()))
            found[attribute] = {"mean": mean, "low": low, "high": high, "n": n}
    return found


def pair(
    rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], *, match: str
) -> list[int]:
    """Index of the row of `others` with the same prompt, for each row; the k-th with the k-th.

    Args:
      rows, others: of the samples.jsonl of two folders.
      match: field that must also be equal; "": the prompt alone.

    Raises:
      EvaluationError: the prompts differ.
    """

    def keys(of: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, int]]:
        seen: Counter[tuple[str, str]] = Counter()
        found = []
        for row in of:
            key = (row["prompt"], str(row.get(match)))
            found.append((*key, seen[key]))
            seen[key] += 1
        return found

    own, place = keys(rows), {key: index for index, key in enumerate(keys(others))}
    lacking = [key for key in own if key not in place] or list(set(place) - set(own))
    if lacking:
        raise EvaluationError(
            f"--against: {len(rows)} and {len(others)} samples; sample {lacking[0][2] + 1} of "
            f"{lacking[0][0]!r} is in one folder only; sample the same prompts for both"
        )
    return [place[key] for key in own]


def format_table(report: Mapping[str, Any]) -> str:
    """A report of `Retrieval.evaluate` as plain text."""
    about = report["gallery"]
    wide = max(len("group"), *map(len, report["kinds"])) + 2
    labels = [_label(a) for tally in report["kinds"].values() for a in tally["scores"]]
    across = max(map(len, ["attribute", *labels])) + 2
    lines = [
        f"nearest of {about['images']} real images ({about['answers']} answers, "
        f"{about['size']} pixels)",
        f"{'group':{wide}}{'attribute':{across}} score  95%              n  ceiling  chance",
    ]
    for name, tally in report["kinds"].items():
        for attribute, own in tally["scores"].items():
            yardsticks = (tally[part].get(attribute) for part in ("ceiling", "chance"))
            ceiling, chance = (f"{part['mean']:.3f}" if part else "-" for part in yardsticks)
            lines.append(
                f"{name:{wide}}{_label(attribute):{across}}{own['mean']:6.3f}  {_interval(own)}"
                f"{own['n']:6}{ceiling:>9}{chance:>8}"
            )
    if "differences" in report:
        lines += [f"minus {report['against']}, paired"]
    for name, found in report.get("differences", {}).items():
        for attribute, own in found.items():
            lines.append(
                f"{name:{wide}}{_label(attribute):{across}}{own['mean']:+6.3f}  "
                f"{_interval(own, '+')}{own['n']:4}"
            )
    return "\n".join(lines)


def _label(attribute: str) -> str:
    """The printed name: exact is top-1; a feature network's name stays behind it."""
    name, separator, suffix = attribute.partition("_")
    return LABELS.get(name, name) + separator + suffix


def _interval(own: Mapping[str, float], sign: str = "") -> str:
    return f"[{own['low']:{sign}.3f}, {own['high']:{sign}.3f}]"
