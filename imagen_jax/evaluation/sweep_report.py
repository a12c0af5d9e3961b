"""The table and the figure of a sweep: score against distance, as in the paper's Figure 4.

A cell is on the front (Pareto) if no other has as good a score and as small a distance, one of them
better. Lines lead along the grid's first field and are told apart by all the others.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from imagen_jax.evaluation import line_chart
from imagen_jax.evaluation.canvas import Canvas
from imagen_jax.evaluation.line_chart import Point
from imagen_jax.evaluation.sweep import format_value
from imagen_jax.io import atomic, images


class Measurement(NamedTuple):
    """A measured number with its 95% interval; None: it has none."""

    value: float
    low: float | None
    high: float | None


def write(cells: Sequence[dict[str, Any]], out: str, title: str = "") -> str:
    """Writes OUT/sweep.json, sweep.md, pareto.svg and pareto.png.

    Args:
      cells: what `sweep.run` returned.
      out: folder.
      title: above the figure; "": what is measured.

    Returns:
      The table.
    """
    folder = pathlib.Path(out)
    card = {"card": "sweep", "score": score_name(cells), "cells": with_front(cells)}
    table = format_table(card["cells"])
    atomic.write_json(folder / "sweep.json", card)
    atomic.write_text(folder / "sweep.md", table)
    chart = plot(cells, title)
    atomic.write_text(folder / "pareto.svg", chart.svg())
    images.save_png(folder / "pareto.png", chart.pixels(), {})
    return table


def score_name(cells: Sequence[dict[str, Any]]) -> str:
    """What the cells are scored by: the CLIP score where there is one, else alignment."""
    return "clip_score" if "clip_score" in cells[0]["numbers"] else "alignment"


def score(cell: dict[str, Any]) -> Measurement:
    """A cell's CLIP score, or the share of its pictures in which everything is right."""
    numbers = cell["numbers"]
    if "clip_score" in numbers:
        return Measurement(*(numbers[f"clip_score{end}"] for end in ("", "_low", "_high")))
    kinds = numbers["alignment"]
    exact = kinds["all" if "all" in kinds else next(iter(kinds))]["exact"]
    return Measurement(exact["mean"], exact["low"], exact["high"])


def distance(cell: dict[str, Any]) -> Measurement:
    """A cell's Frechet distance to the real pictures."""
    return Measurement(*(cell["numbers"][f"distance{end}"] for end in ("", "_low", "_high")))


def with_front(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells, each with `front`: whether no other is better in one and as good in both."""
    places = [(score(cell).value, -distance(cell).value) for cell in cells]

    def beaten(own: tuple[float, float]) -> bool:
        return any(p != own and all(a >= b for a, b in zip(p, own, strict=True)) for p in places)

    return [{**cell, "front": not beaten(own)} for cell, own in zip(cells, places, strict=True)]


def format_table(cells: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of cells that know whether they are on the front."""
    name, about = score_name(cells), cells[0]["asked"]
    fields = list(cells[0]["values"])
    kinds = [k for k in cells[0]["numbers"].get("alignment", {}) if k != "all"]
    kinds = kinds if len(kinds) > 1 else []
    head = ["stages", *fields, name, "95%", *kinds, "distance", "95%", "front"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for cell in cells:
        found, far = score(cell), distance(cell)
        row = [cell["set"], *(format_value(cell["values"][field]) for field in fields)]
        row += [f"{found.value:.4g}", _interval(found)]
        row += [f"{cell['numbers']['alignment'][kind]['exact']['mean']:.2f}" for kind in kinds]
        row += [f"{far.value:.4g}", _interval(far), "*" if cell["front"] else ""]
        lines.append("| " + " | ".join(row) + " |")
    said = (
        f"{about['prompts']} prompts, {about['samples_per_prompt']} of each; distance: Frechet's, "
        f"of features {about['features']}; * on the front."
    )
    return "\n".join([*lines, "", said]) + "\n"


def _interval(mark: Measurement) -> str:
    return "" if mark.low is None or mark.high is None else f"{mark.low:.3g}-{mark.high:.3g}"


def plot(cells: Sequence[dict[str, Any]], title: str = "") -> Canvas:
    """Distance over score, a line for every set and choice of the fields after the first."""
    along = next(iter(cells[0]["values"]), "")
    labels = {
        "clip_score": "CLIP score: mean cosine",
        "alignment": "alignment: share of pictures in which all is right",
    }
    lines: dict[str, list[Point]] = {}
    for cell in cells:
        values = {k: v for k, v in cell["values"].items() if k != along}
        varied = [f"{k}={format_value(v)}" for k, v in values.items()]
        found, far = score(cell), distance(cell)
        label = format_value(cell["values"][along]) if along else ""
        point = Point(found.value, far.value, far.low, far.high, label, found.low, found.high)
        lines.setdefault(" ".join([cell["set"], *varied]), []).append(point)
    return line_chart.plot(
        lines,
        title=title
        or f"{labels[score_name(cells)].partition(':')[0]} against distance"
        + (f", along {along}" if along else ""),
        x_label=labels[score_name(cells)],
        y_label=f"Frechet distance, {cells[0]['asked']['features'].replace('_', ' ')}",
    )
