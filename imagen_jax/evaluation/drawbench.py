"""DrawBench (Sec. 4.3): prompts in categories, eight images each, one sheet per category.

`sample` generates the images; raters compare two such folders with `rate_build`.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from imagen_jax.evaluation import samples
from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.inference import prompts
from imagen_jax.io import images

# Side of an image on a sheet, pixels: eight of them are as wide as a screen.
SHEET_IMAGE_SIZE = 160


def read_prompts(path: str) -> list[dict[str, Any]]:
    """Reads the rows of a prompt file; each has `prompt` and `category`.

    Raises:
      EvaluationError: a row without category, or a duplicate prompt in a category.
    """
    rows = prompts.read(path)
    seen = set()
    for number, row in enumerate(rows, 1):
        row["prompt"], row["category"] = row["prompt"].strip(), (row.get("category") or "").strip()
        if not row["category"]:
            raise EvaluationError(f"--prompts={path}: row {number} has no column `Category`")
        key = (row["prompt"], row["category"])
        if key in seen:
            raise EvaluationError(
                f"--prompts={path}: row {number} repeats {row['prompt']!r} in {row['category']}; "
                "drop one"
            )
        seen.add(key)
    return rows


def write_sheets(folder: str) -> list[pathlib.Path]:
    """Writes FOLDER/sheets/CATEGORY.png for a folder of samples: a row of images per prompt.

    Returns:
      The files, sorted by category.
    """
    categories: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for (prompt, category), rows in samples.by_prompt(folder).items():
        categories.setdefault(category, {})[prompt] = rows
    paths = []
    for category, of_prompts in sorted(categories.items()):
        name = re.sub(r"\W+", "_", category.lower()).strip("_") or "all"
        path = pathlib.Path(folder) / "sheets" / f"{name}.png"
        images.save_png(path, _sheet(folder, of_prompts), {"category": category})
        paths.append(path)
    return paths


def _sheet(
    folder: str, of_prompts: Mapping[str, Sequence[Mapping[str, Any]]]
) -> UInt8[np.ndarray, "h w 3"]:
    columns = max(len(rows) for rows in of_prompts.values())
    blank = np.full((SHEET_IMAGE_SIZE, SHEET_IMAGE_SIZE, 3), 255, np.uint8)
    cells, captions = [], []
    for prompt, rows in of_prompts.items():
        loaded = [_load_image(folder, row["file"]) for row in rows]
        cells += loaded + [blank] * (columns - len(loaded))
        captions += [prompt] + [""] * (columns - 1)
    return images.grid(np.stack(cells), columns, captions)


def _load_image(folder: str, file: str) -> UInt8[np.ndarray, "h w 3"]:
    return images.center_crop_resize(samples.load(folder, file), SHEET_IMAGE_SIZE)
