"""Folders of pictures as the evaluations see them: what `sample` wrote, read and checked.

Pictures from elsewhere (originals, another model) take part by a samples.jsonl beside them, a line
`{"file": "a.png", "prompt": "..."}` per picture.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import numpy as np
from jaxtyping import UInt8

from imagen_jax.io import images


class EvaluationError(ValueError):
    """An evaluation cannot be carried out; the message says which file and what to do."""


def read_rows(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a folder's samples.jsonl, in the file's order.

    Returns:
      Mappings with at least `file` and `prompt`.

    Raises:
      EvaluationError: no such file, or a line without these.
    """
    path = pathlib.Path(folder) / "samples.jsonl"
    if not path.is_file():
        raise EvaluationError(f"no file {path}; give a folder written by `imagen sample`")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            valid = all(isinstance(row[field], str) for field in ("file", "prompt"))
        except (ValueError, KeyError, TypeError):
            valid = False
        if not valid:
            raise EvaluationError(f"{path} line {number} must be JSON with `file` and `prompt`")
        rows.append(row)
    if not rows:
        raise EvaluationError(f"{path} is empty; sample at least one picture")
    return rows


def by_prompt(folder: str | os.PathLike[str]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows of a folder under (prompt, category), each with its sample indices in order.

    Rows without a category have the category "".
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in read_rows(folder):
        key = (row["prompt"], str(row.get("category") or "").strip())
        groups.setdefault(key, []).append(row)
    for rows in groups.values():
        rows.sort(key=lambda row: (row.get("prompt_index", 0), row.get("sample_index", 0)))
    return groups


def load(folder: str | os.PathLike[str], file: str) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of a picture of the folder.

    Raises:
      EvaluationError: it is missing or damaged.
    """
    path = pathlib.Path(folder) / file
    try:
        return images.decode(path.read_bytes())
    except (OSError, images.ImageError) as error:
        raise EvaluationError(f"cannot read picture {path}: {error}; sample again") from error
