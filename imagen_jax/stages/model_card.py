"""card.md of a stage folder: what a user of the model wants to know first, in Markdown."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from imagen_jax.config.data import DataConfig
from imagen_jax.config.schema import Config
from imagen_jax.io import jsonl

# Metrics of the last training report that describe the model rather than the machine.
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
    """Formats the card of a trained stage.

    Args:
      config: the stage.
      step: number of training steps.
      average: which average of the parameters it is.
      params: the parameters; they are counted.
      metrics: a row of metrics.jsonl; None: no such row in the card.
      licence: of the weights; "": not stated.
      scores: evaluations, Markdown.
    """
    known = metrics or {}
    shown = [f"{name} {known[name]:.4g}" for name in METRICS if name in known]
    rows = {
        "output": size_line(config),
        "parameters": f"{parameter_count(params):,} (float32, {average})",
        "trained for": f"{step} steps of {config.data.batch_size} images",
        "distilled": _distilled_line(config),
        "last report": f"step {known['step']}: {', '.join(shown)}" if shown else "",
        "data": _data_line(config.data),
        "text encoder": encoder_line(config),
        "sampling": sampling_line(config),
        "licence": licence or "not stated",
    }
    title = "A stage of a text-to-image cascade, trained with imagen_jax."
    parts = [f"# {config.name}", title, table(rows), scores]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(rows: Mapping[str, str]) -> str:
    """Formats a Markdown table of two columns, without the rows whose value is empty."""
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value]
    return "\n".join(["| | |", "|---|---|", *lines])


def last_metrics(workdir: str, step: int) -> dict[str, Any] | None:
    """Returns the last row of WORKDIR/metrics.jsonl up to `step` that has a loss, or None."""
    file = pathlib.Path(workdir) / "metrics.jsonl"
    if not file.is_file():
        return None
    found = None
    # A killed run may leave a last line that is not JSON.
    for _, row in jsonl.read(file, default=None):
        if isinstance(row, dict) and "loss" in row and row.get("step", step + 1) <= step:
            found = row
    return found


def parameter_count(params: Any) -> int:
    """Number of parameters in a tree of arrays."""
    return sum(np.size(leaf) for leaf in jax.tree.leaves(params))


def sampling_line(config: Config) -> str:
    """The sampling settings of a stage in one line."""
    settings = config.sampling
    aug = f", aug_level {settings.aug_level:g}" if config.model.lowres else ""
    return (
        f"{settings.sampler}, {settings.steps} steps, guidance weight "
        f"{settings.guidance_weight:g}, {settings.thresholding} thresholding{aug}"
    )


def _distilled_line(config: Config) -> str:
    """What the stage learned from which teacher; "" without one."""
    settings = config.distill
    if not settings.teacher:
        return ""
    what = "guidance" if settings.steps is None else f"{settings.steps} sampling steps"
    return f"{what}, of the teacher `{settings.teacher}`"


def size_line(config: Config) -> str:
    """Size of a stage's output and, for a super-resolution stage, of its input."""
    size, lowres = config.data.image_size, config.data.lowres_size
    return f"{size}x{size} pixels" + (f" from {lowres}x{lowres} pixels" if lowres else "")


def encoder_line(config: Config) -> str:
    """The text encoder and its path; "" without a path."""
    text = config.text
    fingerprint = f", fingerprint {text.fingerprint}" if text.fingerprint else ""
    return f"{text.encoder} `{text.path}`{fingerprint}" if text.path else ""


def _data_line(data: DataConfig) -> str:
    """The source of the training images."""
    if data.mixture:
        return f"mixture of {', '.join(data.mixture)}"
    return f"{data.kind} `{data.path}`" + (f" {data.name}" if data.kind == "tfds" else "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
