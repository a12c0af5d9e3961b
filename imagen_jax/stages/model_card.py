"""What a reader of a model wants to know first: card.md of a stage folder, in Markdown."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from imagen_jax.config.data import DataConfig
from imagen_jax.config.schema import Config

# Of a run's last report: what it says about the model rather than the machine.
METRICS = ("loss", "x0_mse", "skipped")


def format_card(
    config: Config,
    *,
    step: int,
    average: str,
    params: Any,
    metrics: Mapping[str, Any] | None = None,
    licence: str = "",
    scores: str = "",
) -> str:
    """The card of a stage that was trained here.

    Args:
      config: the stage.
      step: updates it was trained for.
      average: which average of the parameters it is.
      params: the parameters, for their number.
      metrics: a row of metrics.jsonl; None: none.
      licence: of the weights; "": not stated.
      scores: evaluations, Markdown.
    """
    count = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    measured = metrics or {}
    shown = [f"{name} {measured[name]:.4g}" for name in METRICS if name in measured]
    rows = {
        "draws": size_line(config),
        "parameters": f"{count:,} (float32, {average})",
        "trained for": f"{step} steps of {config.data.batch_size} pictures",
        "last report": f"step {measured['step']}: {', '.join(shown)}" if shown else "",
        "data": _origin(config.data),
        "text encoder": encoder_line(config),
        "draws with": sampling_line(config),
        "licence": licence or "not stated",
    }
    title = "A stage of a text-to-image cascade, trained with imagen_jax."
    parts = [f"# {config.name}", title, table(rows), scores]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(rows: Mapping[str, str]) -> str:
    """A Markdown table of two columns, without the rows that say nothing."""
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value]
    return "\n".join(["| | |", "|---|---|", *lines])


def last_metrics(workdir: str, step: int) -> dict[str, Any] | None:
    """The newest row of WORKDIR/metrics.jsonl up to `step`, if there is one."""
    file = pathlib.Path(workdir) / "metrics.jsonl"
    if not file.is_file():
        return None
    found = None
    for line in file.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # A line that a kill has cut.
        if isinstance(row, dict) and "loss" in row and row.get("step", step + 1) <= step:
            found = row
    return found


def sampling_line(config: Config) -> str:
    """The settings a stage draws with, in a few words."""
    settings = config.sampling
    aug = f", aug_level {settings.aug_level:g}" if config.model.lowres else ""
    return (
        f"{settings.sampler}, {settings.steps} steps, guidance weight "
        f"{settings.guidance_weight:g}, {settings.thresholding} thresholding{aug}"
    )


def size_line(config: Config) -> str:
    """What a stage draws, and from what."""
    size, lowres = config.data.image_size, config.data.lowres_size
    return f"{size}x{size} pixels" + (f" from {lowres}x{lowres} pixels" if lowres else "")


def encoder_line(config: Config) -> str:
    """Which text encoder, and where it lies; "" where none is named."""
    text = config.text
    prints = f", fingerprint {text.fingerprint}" if text.fingerprint else ""
    return f"{text.encoder} `{text.path}`{prints}" if text.path else ""


def _origin(data: DataConfig) -> str:
    """Where the pictures came from."""
    if data.mixture:
        return f"mixture of {', '.join(data.mixture)}"
    return f"{data.kind} `{data.path}`" + (f" {data.name}" if data.kind == "tfds" else "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
