"""Reads folders written by `sample`, the input of all evaluations.

Images of other origin (real ones, another model's) need a samples.jsonl in their folder with one
line `{"file": "a.png", "prompt": "..."}` per image.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np
from jaxtyping import UInt8

from imagen_jax.io import images, jsonl


class EvaluationError(ValueError):
    """An evaluation cannot run; the message names the file and the fix."""


def read_rows(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a folder's samples.jsonl, in the file's order.

    Returns:
      Mappings with at least `file` and `prompt`.

    Raises:
      EvaluationError: no such file, or a line without these fields.
    """
    path = pathlib.Path(folder) / "samples.jsonl"
    if not path.is_file():
        raise EvaluationError(f"no file {path}; give a folder written by `imagen sample`")
    rows = []
    for number, row in jsonl.read(path, default=None):
        fields = row if isinstance(row, dict) else {}
        if not all(isinstance(fields.get(name), str) for name in ("file", "prompt")):
            raise EvaluationError(f"{path} line {number} must be JSON with `file` and `prompt`")
        rows.append(row)
    if not rows:
        raise EvaluationError(f"{path} is empty; sample at least one image")
    return rows


def by_prompt(folder: str | os.PathLike[str]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows of a folder grouped by (prompt, category), sorted by prompt and sample index.

    Rows without a category are in the category "".
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in read_rows(folder):
        key = (row["prompt"], str(row.get("category") or "").strip())
        groups.setdefault(key, []).append(row)
    for rows in groups.values():
        rows.sort(key=lambda row: (row.get("prompt_index", 0), row.get("sample_index", 0)))
    return groups


def load(folder: str | os.PathLike[str], file: str) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of an image of the folder.

    Raises:
      EvaluationError: the file is missing or damaged.
    """
    path = pathlib.Path(folder) / file
    try:
        return images.decode(path.read_bytes())
    except (OSError, images.ImageError) as error:
        raise EvaluationError(f"cannot read image {path}: {error}; sample again") from error
