"""The card of a study as tables and bar charts (Figure 3)."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from imagen_jax.evaluation import charts
from imagen_jax.evaluation.raters.score import ALL_PROMPTS
from imagen_jax.io import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOO_FEW = "too few answers"


def write(card: Mapping[str, Any], out: str) -> None:
    """Writes OUT/ratings.json, OUT/ratings.md and the charts as OUT/NAME.svg."""
    folder = pathlib.Path(out)
    text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
    atomic.write_text(folder / "ratings.json", text)
    atomic.write_text(folder / "ratings.md", format_card(card))
    for name, chart in make_charts(card).items():
        atomic.write_text(folder / f"{name}.svg", charts.to_svg(chart))


def make_charts(card: Mapping[str, Any]) -> dict[str, Figure]:
    """Bar charts of a card by file name without its suffix.

    Returns:
      One chart per question, with a group of bars per category: QUESTION, or QUESTION_N of the
      Nth of several comparisons, which also have `comparisons`: a group per model and question.
    """
    several = len(card["comparisons"]) > 1
    found, overview = {}, {}
    for number, comparison in enumerate(card["comparisons"], start=1):
        first, second = comparison["names"]
        for question, scores in comparison["questions"].items():
            of_all = scores["groups"][ALL_PROMPTS]
            overview[_label(f"{second}: {question}", of_all)] = _bars(of_all, (first, "the other"))
            bars = {
                _label(group, entry): _bars(entry, comparison["names"])
                for group, entry in scores["groups"].items()
            }
            title = f"{question}: {first} and {second}, 95% intervals"
            name = f"{question}_{number}" if several else question
            found[name] = charts.bar_chart(bars, title=title)
    if several:
        title = f"{card['comparisons'][0]['names'][0]} and other models, 95% intervals"
        found = {"comparisons": charts.bar_chart(overview, title=title), **found}
    return found


def _label(name: str, entry: Mapping[str, Any]) -> str:
    return f"{name} ({TOO_FEW})" if entry["too_few"] else name


def _bars(entry: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Rates of A and B by name; without an interval where it says nothing."""
    bars = {}
    for which, name in zip("AB", names, strict=True):
        if rate := entry["rates"].get(which):
            bars[name] = {"mean": rate["mean"]} if entry["too_few"] else rate
    return bars


def format_card(card: Mapping[str, Any]) -> str:
    """The card as Markdown, one table per comparison and question, in percent."""
    models = " and ".join(comparison["names"][1] for comparison in card["comparisons"])
    lines = [f"# {card['study']}: {card['comparisons'][0]['names'][0]} against {models}", ""]
    lines.append(f"{card['raters']} raters count; rule: {card['rule']}.")
    lines += [f"Excluded: {rater}, {why}." for rater, why in card["excluded"].items()]
    for comparison in card["comparisons"]:
        first, second = comparison["names"]
        for question, scores in comparison["questions"].items():
            lines += ["", f"## {question}: {first} (A) and {second} (B)", ""]
            columns = list(scores["groups"][ALL_PROMPTS]["rates"])
            head = ["", *(f"{name} %" for name in columns), "raters", "prompts"]
            lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
            lines += [
                f"| {' | '.join(row)} |"
                for row in (
                    [group, *format_entry(e, columns)] for group, e in scores["groups"].items()
                )
            ]
            words = {k: "-" if v is None else f"{v:.2f}" for k, v in scores["agreement"].items()}
            agreement = f"{words['pairs']} of pairs equal, Krippendorff's alpha {words['alpha']}"
            lines += ["", f"Agreement: {agreement}."]
    return "\n".join(lines) + "\n"


def format_entry(entry: Mapping[str, Any], columns: list[str]) -> list[str]:
    """Cells of a group: the rates of the columns, numbers of raters and prompts."""
    cells = [format_rate(entry["rates"].get(name), too_few=entry["too_few"]) for name in columns]
    return [*cells, str(entry["raters"]), str(entry["prompts"])]


def format_rate(rate: Mapping[str, float] | None, *, too_few: bool) -> str:
    """A rate and its interval in percent."""
    if rate is None:
        return "-"
    interval = TOO_FEW if too_few else f"{100 * rate['low']:.1f}-{100 * rate['high']:.1f}"
    return f"{100 * rate['mean']:.1f} ({interval})"
