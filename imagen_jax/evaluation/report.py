"""Tables of a run's cards beside the paper's: OUT/report.md and OUT/report.html with samples
and charts.

Cards are the JSON files of the evaluations: `fid30k.json`, those of `fid` and `clip_score`,
`ratings.json` of `rate_score`, the report of `alignment`, and any
`{"card": "fid30k", "fid": 9.1, "zero_shot": true}`, with `low` and `high` if the interval is known.
"""

from __future__ import annotations

import base64
import html
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from imagen_jax.config.fields import unknown_name
from imagen_jax.evaluation import cards as cards_lib
from imagen_jax.evaluation import charts, drawbench, leaderboard, samples
from imagen_jax.evaluation.features import fid30k
from imagen_jax.evaluation.raters import score, tables
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.io import atomic, images

MAX_IMAGES = 24
NOT_MEASURED = "not measured"
Table = tuple[str, list[str], list[list[str]]]


def write(cards: Sequence[str], out: str, *, name: str, samples_dir: str = "") -> str:
    """Writes OUT/report.md, OUT/report.html and, with samples, OUT/pictures.png.

    Args:
      cards: JSON files.
      out: folder to write.
      name: name of the run in the tables.
      samples_dir: folder of samples; the first image of each prompt is shown.

    Returns:
      The Markdown.

    Raises:
      EvaluationError: a file is not a card.
    """
    read = [_read_card(path) for path in cards]
    all_tables = [_fid_table(read, name), _human_table(read, name)]
    for card in read:
        all_tables += _RENDER[card["card"]](card)
    folder = pathlib.Path(out)
    documents = _write_charts(read, folder)
    image = ""
    if samples_dir:
        image = "pictures.png"
        images.save_png(folder / image, _grid(samples_dir), {"samples": samples_dir})
    markdown = _markdown(all_tables, name, [image, *documents] if image else list(documents))
    atomic.write_text(folder / "report.md", markdown)
    atomic.write_text(folder / "report.html", _html(all_tables, name, image, documents))
    return markdown


def _write_charts(cards: Sequence[Mapping[str, Any]], folder: pathlib.Path) -> dict[str, str]:
    """Writes the raters' charts; SVG documents by file name."""
    documents = {}
    for card in cards:
        if card["card"] == "ratings":
            for name, chart in tables.make_charts(card).items():
                documents[f"{card['study']}_{name}.svg"] = charts.to_svg(chart)
    for name, text in documents.items():
        atomic.write_text(folder / name, text)
    return documents


def score_tables(cards: Sequence[str]) -> str:
    """The cards' own numbers as Markdown; "" for no cards. Raises EvaluationError."""
    lines = []
    for path in cards:
        card = _read_card(path)
        if card["card"] == "fid30k":
            on = "zero-shot" if card["zero_shot"] else "COCO"
            rows = [[f"{card['fid']:.2f}", on]]
            lines += _markdown_table("FID-30K on COCO", ["FID-30K", "trained on"], rows)
        for table in _RENDER[card["card"]](card):
            lines += _markdown_table(*table)
    return "\n".join(lines).rstrip()


def _read_card(path: str) -> dict[str, Any]:
    try:
        card = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluationError(f"--cards: {path} is not JSON ({error})") from error
    if isinstance(card, dict) and "kinds" in card:
        card["card"] = "alignment"
    kind = card.get("card") if isinstance(card, dict) else None
    if not isinstance(kind, str) or kind not in _RENDER:
        raise EvaluationError(f"--cards: {path}: {unknown_name('card', str(kind), list(_RENDER))}")
    for field in _FIELDS[kind]:
        if field not in card:
            raise EvaluationError(f"--cards: {path}: a card {kind!r} needs the field {field!r}")
    return card


def _fid_table(cards: Sequence[Mapping[str, Any]], name: str) -> Table:
    rows = [(row.fid, row.model, row.zero_shot, f"{row.fid:.2f}") for row in leaderboard.FID]
    for card in cards:
        if card["card"] == "fid30k":
            value = f"**{card['fid']:.2f}**"
            if "low" in card and "high" in card:
                value += f" ({card['low']:.2f}-{card['high']:.2f})"
            if card.get("images", fid30k.COUNT) != fid30k.COUNT:
                value += f", of {card['images']} images"
            rows.append((float(card["fid"]), f"**{name}**", bool(card["zero_shot"]), value))
    lines = [
        [model, "zero-shot" if zero_shot else "COCO", value]
        for _, model, zero_shot, value in sorted(rows, key=lambda row: row[0])
    ]
    if len(rows) == len(leaderboard.FID):
        lines.append([f"**{name}**", "-", NOT_MEASURED])
    return "FID-30K on COCO, lower is better", ["model", "trained on", "FID-30K"], lines


def _human_table(cards: Sequence[Mapping[str, Any]], name: str) -> Table:
    def plus_minus(value: tuple[float, float]) -> str:
        return f"{value[0]:.1f}" + (f" ± {value[1]:.2f}" if value[1] else "")

    lines = [
        [row.model, row.subset, plus_minus(row.photorealism), plus_minus(row.alignment)]
        for row in leaderboard.HUMAN
    ]
    for subset in (score.ALL_PROMPTS, score.NO_PEOPLE):
        cells = {
            question: _rate_of(cards, question, subset)
            for question in ("photorealism", "description")
        }
        if any(cells.values()) or subset == score.ALL_PROMPTS:
            row = [cell or NOT_MEASURED for cell in cells.values()]
            lines.append([f"**{name}**", subset, *row])
    title = "Raters on COCO: percent with 95% interval; photorealism 50 is indistinguishable"
    return title, ["model", "captions", "photorealism", "alignment by raters"], lines


def _rate_of(cards: Sequence[Mapping[str, Any]], question: str, subset: str) -> str:
    """The rate of A, the run, in a group of a question's ratings; "" if no card has it."""
    for card in cards:
        if card["card"] == "ratings" and question in card["comparisons"][0]["questions"]:
            entry = card["comparisons"][0]["questions"][question]["groups"].get(subset)
            rate = entry["rates"].get("A") if entry else None
            return tables.format_rate(rate, too_few=entry["too_few"]) if rate else ""
    return ""


def _ratings_tables(card: Mapping[str, Any]) -> list[Table]:
    """Preference rates by category."""
    found = []
    for comparison in card["comparisons"]:
        names = dict(zip("AB", comparison["names"], strict=True))
        for question, scores in comparison["questions"].items():
            columns = list(scores["groups"][score.ALL_PROMPTS]["rates"])
            lines = [
                [group, *tables.format_entry(entry, columns)]
                for group, entry in scores["groups"].items()
            ]
            head = ["", *(names.get(column, column) for column in columns), "raters", "prompts"]
            found.append(
                (f"{question.capitalize()} by raters, {card['study']}, percent", head, lines)
            )
    return found


def _alignment_tables(card: Mapping[str, Any]) -> list[Table]:
    lines = []
    for kind, tally in card["kinds"].items():
        parts = [tally[part].get("exact") for part in ("scores", "ceiling", "chance")]
        own = parts[0]
        interval = f"{own['low']:.2f}-{own['high']:.2f}"
        means = [f"{part['mean']:.2f}" if part else "-" for part in parts]
        lines.append([kind, means[0], interval, means[1], means[2], str(own["n"])])
    head = ["prompts", "exact", "95%", "ceiling", "chance", "n"]
    return [(f"{card.get('title', 'Alignment')}, by the scorer", head, lines)]


def _measured_table(card: Mapping[str, Any]) -> list[Table]:
    """All fields of a card."""
    lines = cards_lib.lines_of(card)
    return [(f"Card {card['card']}", ["field", "value"], lines)] if len(lines) > 2 else []


_RENDER: dict[str, Callable[[Mapping[str, Any]], list[Table]]] = {
    "fid30k": _measured_table,
    "fid": _measured_table,
    "clip_score": _measured_table,
    "ratings": _ratings_tables,
    "alignment": _alignment_tables,
}
_FIELDS = {
    "fid30k": ("fid", "zero_shot"),
    "fid": ("fid",),
    "clip_score": ("clip_score",),
    "ratings": ("study", "comparisons"),
    "alignment": ("kinds",),
}


def _grid(folder: str) -> np.ndarray:
    groups = list(samples.by_prompt(folder).items())[:MAX_IMAGES]
    side = drawbench.SHEET_IMAGE_SIZE
    shown = [
        images.center_crop_resize(samples.load(folder, rows[0]["file"]), side) for _, rows in groups
    ]
    columns = min(6, len(shown))
    return images.grid(np.stack(shown), columns, [prompt for (prompt, _), _ in groups])


def _markdown(all_tables: Sequence[Table], name: str, files: Sequence[str]) -> str:
    lines = [f"# {name}", ""]
    for file in files:
        lines += [f"![{pathlib.Path(file).stem} of {name}]({file})", ""]
    for table in all_tables:
        lines += _markdown_table(*table)
    return "\n".join([*lines, f"Other models: {leaderboard.SOURCE}."]) + "\n"


def _markdown_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"## {title}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows] + [""]


STYLE = (
    "body{font-family:system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{padding:.25rem .8rem;border-bottom:1px solid #ddd;"
    "text-align:left}img{max-width:100%}tr.own{background:#e8f0fd;font-weight:600}"
)


def _html(all_tables: Sequence[Table], name: str, image: str, documents: Mapping[str, str]) -> str:
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(name)}</title>',
        f"<style>{STYLE}</style><h1>{html.escape(name)}</h1>",
    ]
    if image:
        parts.append(f'<img src="{image}" alt="Samples">')
    for file, svg in documents.items():
        data = base64.b64encode(svg.encode()).decode()
        parts.append(f'<img src="data:image/svg+xml;base64,{data}" alt="{html.escape(file)}">')
    for title, head, rows in all_tables:
        parts.append(f"<h2>{html.escape(title)}</h2><table>")
        parts.append("<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>")
        for row in rows:
            own = ' class="own"' if row[0].startswith("**") else ""
            cells = "".join(f"<td>{html.escape(cell.replace('**', ''))}</td>" for cell in row)
            parts.append(f"<tr{own}>{cells}</tr>")
        parts.append("</table>")
    parts.append(f"<p>Other models: {html.escape(leaderboard.SOURCE)}.</p></html>")
    return "\n".join(parts) + "\n"
