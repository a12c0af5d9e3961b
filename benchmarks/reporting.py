"""How benchmarks say what they measured: one JSON line, and tables between marks in the docs."""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Sequence


def spread(names: Sequence[str], rows: Sequence[Sequence[float]]) -> dict[str, dict[str, float]]:
    """Median, least and largest of each column of `rows`, a row per repeat."""
    return {
        name: {
            "median": round(statistics.median(values), 4),
            "min": round(min(values), 4),
            "max": round(max(values), 4),
        }
        for name, values in zip(names, zip(*rows, strict=True), strict=True)
    }


def write_between(path: str, name: str, text: str) -> None:
    """Replaces what stands between the marks `<!-- begin NAME -->` and `<!-- end NAME -->`."""
    file = pathlib.Path(path)
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, rest = file.read_text().split(begin)
    _, after = rest.split(end)
    file.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")
