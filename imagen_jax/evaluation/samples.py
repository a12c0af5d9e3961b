"""Reads folders written by `sample`, the input of all evaluations.

Images of other origin (real ones, another model's) need a samples.jsonl in their folder with one
line `{"file": "a.png", "prompt": "..."}` per image.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from imagen_jax.io import image_files, images, jsonl


class EvaluationError(ValueError):
    """An evaluation cannot run; the message names the file and the fix."""


def read_rows(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a folder's samples.jsonl, in the file's order.

    Returns:
      Mappings with at least `file` and `prompt`.

    Raises:
      EvaluationError: no such file, or a line without these fields or with a path out of the
        folder.
    """
    path = pathlib.Path(folder) / "samples.jsonl"
    if not path.is_file():
        raise EvaluationError(f"no file {path}; give a folder written by `imagen sample`")
    rows = []
    try:
        for number, row in jsonl.read(path, default=None):
            rows.append(_checked_row(row, f"{path} line {number}"))
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path} is not UTF-8 ({error.reason}); sample again") from error
    if not rows:
        raise EvaluationError(f"{path} is empty; sample at least one image")
    return rows


def _checked_row(row: Any, where: str) -> dict[str, Any]:
    """The row. Raises EvaluationError: it lacks a field, or its file is not in the folder."""
    fields = row if isinstance(row, dict) else {}
    if not all(isinstance(fields.get(name), str) for name in ("file", "prompt")):
        raise EvaluationError(f"{where} must be JSON with `file` and `prompt`")
    file = pathlib.PurePath(fields["file"])
    if file.is_absolute() or ".." in file.parts or not file.name or "\0" in fields["file"]:
        raise EvaluationError(f"{where}: file={fields['file']!r} must be a path inside the folder")
    return fields


def by_prompt(folder: str | os.PathLike[str]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows of a folder grouped by (prompt, category), sorted by prompt and sample index.

    Rows without a category are in the category "".
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in read_rows(folder):
        key = (row["prompt"], str(row.get("category") or "").strip())
        groups.setdefault(key, []).append(row)
    for rows in groups.values():
        rows.sort(key=lambda row: (_number(row, "prompt_index"), _number(row, "sample_index")))
    return groups


def _number(row: Mapping[str, Any], name: str) -> int | float:
    value = row.get(name)
    return value if isinstance(value, int | float) else 0


def load(folder: str | os.PathLike[str], file: str) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of an image of the folder.

    Raises:
      EvaluationError: the file is missing or damaged, or a link out of the folder.
    """
    return _read(folder, file, images.decode)


def shorter_side(folder: str | os.PathLike[str], file: str) -> int:
    """The shorter side of an image of the folder, pixels; reads the header. Raises as `load`."""
    return _read(folder, file, lambda data: min(images.inspect_image(data, "header").size))


def _read(folder: str | os.PathLike[str], file: str, decode: Callable[[bytes], Any]) -> Any:
    path = pathlib.Path(folder) / file
    try:
        if not path.resolve().is_relative_to(pathlib.Path(folder).resolve()):
            raise EvaluationError(f"{path} leads out of the folder; copy the image into it")
        if path.exists() and not path.is_file():
            raise EvaluationError(f"{path} is no regular file; give an image")
        return decode(image_files.read(path))
    except (OSError, images.ImageError, UnicodeError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise EvaluationError(f"cannot read image {path}: {why}; sample again") from error
