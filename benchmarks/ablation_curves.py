"""Scores of text encoders and U-Nets over the FLOPs that each adds to a training image.

    .venv/bin/python benchmarks/ablation_curves.py --docs=docs

Reads `ablation_encoder_size.json` and `ablation_unet_size.json`, whose arms share the default
(small encoder, the demo's U-Net), and writes docs/images/ablation_curves.png: for each measure the
difference from the default, with Student's 95% interval of the paired differences over the seeds,
and the table of the same numbers.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import reporting
from ablations import GIGAFLOPS, summary

# Ablation -> arm with the default encoder and U-Net.
DEFAULTS = {"encoder_size": "small", "unet_size": "demo"}
LABELS = {"encoder_size": "text encoder", "unet_size": "U-Net"}
TICKS = (-0.1, -0.03, 0, 0.03, 0.1, 0.5)
MEASURES = ("one object", "counted", "order")


class Point(NamedTuple):
    """An arm: added GFLOP per training image, and the difference of a measure from the default."""

    arm: str
    added: float
    mean: float
    half: float | None


def points(record: Mapping[str, Any], default: str, measure: str) -> list[Point]:
    """All arms of an ablation, by added FLOPs."""
    rows = {row["choice"]["arm"]: row["measures"] for row in record["rows"]}

    def cost(arm: str) -> float:
        return sum(rows[arm][title]["mean"] for title in GIGAFLOPS)

    found = []
    for arm, measures in rows.items():
        pairs = zip(measures[measure]["seeds"], rows[default][measure]["seeds"], strict=True)
        change = summary([None if a is None or b is None else a - b for a, b in pairs])
        found.append(Point(arm, cost(arm) - cost(default), change["mean"], change["half"]))
    return sorted(found, key=lambda point: point.added)


def plot(curves: Mapping[str, Mapping[str, list[Point]]], file: pathlib.Path) -> None:
    """One panel per measure, one line per ablation."""
    figure, panels = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.6), sharex=True)
    for panel, (measure, lines) in zip(panels, curves.items(), strict=True):
        for name, line in lines.items():
            halves = [point.half or 0.0 for point in line]
            x, y = [point.added for point in line], [point.mean for point in line]
            panel.errorbar(x, y, halves, marker="o", capsize=3, label=LABELS[name])
            for point in line:
                if point.arm not in DEFAULTS.values():
                    where = (point.added, point.mean)
                    panel.annotate(point.arm, where, (4, 4), textcoords="offset points", size=8)
        panel.axhline(0.0, color="grey", linewidth=0.5)
        panel.set_xscale("symlog", linthresh=0.05)
        panel.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        panel.margins(x=0.2)  # Room for names.
        panel.set_title(measure)
        panel.set_xlabel("added GFLOP per training image")
    panels[0].set_ylabel("difference from the default, 95%")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def table(curves: Mapping[str, Mapping[str, list[Point]]]) -> str:
    """Markdown: an arm per row, by ablation and added FLOPs."""
    lines = ["| scaled | arm | added GFLOP | " + " | ".join(curves) + " |"]
    lines.append("|---" * (3 + len(curves)) + "|")
    for name, label in LABELS.items():
        for rows in zip(*(lines_of[name] for lines_of in curves.values()), strict=True):
            cells = [
                f"{row.mean:+.2f}" + ("" if row.half is None else f" ± {row.half:.2f}")
                for row in rows
            ]
            arm, added = rows[0].arm, rows[0].added
            lines.append(f"| {label} | {arm} | {added:+.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--docs", default="docs", help="folder of ablations.md and its JSON files")
    docs = pathlib.Path(parser.parse_args().docs)
    records = {name: json.loads((docs / f"ablation_{name}.json").read_text()) for name in DEFAULTS}
    curves = {
        measure: {name: points(records[name], DEFAULTS[name], measure) for name in DEFAULTS}
        for measure in MEASURES
    }
    plot(curves, docs / "images" / "ablation_curves.png")
    print(table(curves))
    reporting.write_between(str(docs / "ablations.md"), "curves", table(curves))


if __name__ == "__main__":
    main()
