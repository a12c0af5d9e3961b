"""Table and figure of a sweep: score against distance, as in the paper's Figure 4.

A cell is on the Pareto front if no other cell is at least as good in score and distance and better
in one. Lines follow the grid's first field; there is one line per choice of the other fields.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from imagen_jax.evaluation import charts
from imagen_jax.evaluation.charts import Point
from imagen_jax.evaluation.sweep import format_value
from imagen_jax.io import atomic, images

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Measurement(NamedTuple):
    """A measured number with its 95% interval; None: unknown."""

    value: float
    low: float | None
    high: float | None


def write(cells: Sequence[dict[str, Any]], out: str, title: str = "") -> str:
    """Writes OUT/sweep.json, sweep.md, pareto.svg and pareto.png.

    Args:
      cells: result of `sweep.run`.
      out: folder.
      title: title of the figure; "": names the score and the distance.

    Returns:
      The table.
    """
    folder = pathlib.Path(out)
    card = {"card": "sweep", "score": score_name(cells), "cells": with_front(cells)}
    table = format_table(card["cells"])
    atomic.write_json(folder / "sweep.json", card)
    atomic.write_text(folder / "sweep.md", table)
    chart = plot(cells, title)
    atomic.write_text(folder / "pareto.svg", charts.to_svg(chart))
    images.save_png(folder / "pareto.png", charts.to_pixels(chart), {})
    return table


def score_name(cells: Sequence[dict[str, Any]]) -> str:
    """The score of the cells: the CLIP score if present, else alignment."""
    return "clip_score" if "clip_score" in cells[0]["numbers"] else "alignment"


def score(cell: dict[str, Any]) -> Measurement:
    """A cell's CLIP score, or the share of its images in which everything is right."""
    numbers = cell["numbers"]
    if "clip_score" in numbers:
        return Measurement(*(numbers[f"clip_score{end}"] for end in ("", "_low", "_high")))
    kinds = numbers["alignment"]
    exact = kinds["all" if "all" in kinds else next(iter(kinds))]["exact"]
    return Measurement(exact["mean"], exact["low"], exact["high"])


def distance(cell: dict[str, Any]) -> Measurement:
    """A cell's Frechet distance to the real images."""
    return Measurement(*(cell["numbers"][f"distance{end}"] for end in ("", "_low", "_high")))


def with_front(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells, each with `front`: whether it is on the Pareto front."""
    points = [(score(cell).value, -distance(cell).value) for cell in cells]

    def dominated(own: tuple[float, float]) -> bool:
        return any(p != own and all(a >= b for a, b in zip(p, own, strict=True)) for p in points)

    return [{**cell, "front": not dominated(own)} for cell, own in zip(cells, points, strict=True)]


def format_table(cells: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of the cells of `with_front`."""
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
    legend = (
        f"{about['prompts']} prompts, {about['samples_per_prompt']} images each; Frechet distance "
        f"of features {about['features']}; * on the front."
    )
    return "\n".join([*lines, "", legend]) + "\n"


def _interval(mark: Measurement) -> str:
    return "" if mark.low is None or mark.high is None else f"{mark.low:.3g}-{mark.high:.3g}"


def plot(cells: Sequence[dict[str, Any]], title: str = "") -> Figure:
    """Distance over score, one line per set and choice of the fields after the first."""
    along = next(iter(cells[0]["values"]), "")
    labels = {
        "clip_score": "CLIP score: mean cosine",
        "alignment": "alignment: share of images in which all is right",
    }
    lines: dict[str, list[Point]] = {}
    for cell in cells:
        values = {k: v for k, v in cell["values"].items() if k != along}
        varied = [f"{k}={format_value(v)}" for k, v in values.items()]
        found, far = score(cell), distance(cell)
        label = format_value(cell["values"][along]) if along else ""
        point = Point(found.value, far.value, far.low, far.high, label, found.low, found.high)
        lines.setdefault(" ".join([cell["set"], *varied]), []).append(point)
    return charts.line_chart(
        lines,
        title=title
        or f"{labels[score_name(cells)].partition(':')[0]} against distance"
        + (f", along {along}" if along else ""),
        x_label=labels[score_name(cells)],
        y_label=f"Frechet distance, {cells[0]['asked']['features'].replace('_', ' ')}",
    )
