"""Evaluation cards: a JSON file and a Markdown table of the same fields."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from imagen_jax.io import atomic


def write(card: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes FILE.json, and FILE.md."""
    file = pathlib.Path(path)
    atomic.write_json(file, card)
    atomic.write_text(file.with_suffix(".md"), format_card(card))


def format_card(card: Mapping[str, Any]) -> str:
    """A card as a Markdown table."""
    lines = [f"# {card['card']}", "", "| field | value |", "|---|---|"]
    return "\n".join(lines + [f"| {field} | {value} |" for field, value in lines_of(card)]) + "\n"


def lines_of(card: Mapping[str, Any]) -> list[list[str]]:
    """Fields and values as text, one line per stage, without the field `card`."""
    lines = []
    for field, value in card.items():
        if field == "stages":
            lines += [[f"stage {stage['name']}", _settings(stage)] for stage in value]
        elif field != "card":
            lines.append([field, f"{value:.6g}" if isinstance(value, float) else str(value)])
    return lines


def _settings(stage: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in stage.items() if name != "name")
