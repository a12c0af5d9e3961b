"""Prompt files: one row per prompt, a mapping with `prompt` and the file's other fields."""

from __future__ import annotations

import csv
import pathlib
from typing import Any

from imagen_jax.io import jsonl


class PromptError(ValueError):
    """A prompt file cannot be used; the message gives file, line and fix."""


def read(path: str) -> list[dict[str, Any]]:
    """Reads prompts.

    Args:
      path: .txt (a prompt per line), .csv (a column `prompt`, or `prompts` as in
        DrawBench's, in any case) or .jsonl (objects with `prompt`). Empty lines of a .txt are
        skipped.

    Raises:
      PromptError: no such file, unknown kind, no prompts, or a row without one.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise PromptError(f"--prompts={path}: no such file")
    readers = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl}
    if file.suffix not in readers:
        raise PromptError(f"--prompts={path}: must end in {', '.join(readers)}")
    try:
        rows = readers[file.suffix](file)
    except jsonl.JsonLinesError as error:
        raise PromptError(
            f"--prompts={path}: line {error.line} is not JSON ({error.__cause__})"
        ) from error
    except UnicodeDecodeError as error:
        raise PromptError(f"--prompts={path}: not UTF-8 text ({error})") from error
    if not rows:
        raise PromptError(f"--prompts={path}: holds no prompts")
    return rows


def _read_txt(file: pathlib.Path) -> list[dict[str, Any]]:
    lines = jsonl.split_lines(file.read_text(encoding="utf-8-sig"))
    return [{"prompt": line.strip()} for line in lines if line.strip()]


def _read_csv(file: pathlib.Path) -> list[dict[str, Any]]:
    rows = []
    with file.open(encoding="utf-8-sig", newline="") as stream:
        for number, row in enumerate(csv.DictReader(stream), start=2):
            fields = {str(k).strip().lower(): v for k, v in row.items()}
            if "prompts" in fields:
                fields["prompt"] = fields.pop("prompts")
            if not fields.get("prompt"):
                raise PromptError(f"--prompts={file}: line {number} has no column `prompt`")
            rows.append(fields)
    return rows


def _read_jsonl(file: pathlib.Path) -> list[dict[str, Any]]:
    rows = []
    for number, row in jsonl.read(file):
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt:
            raise PromptError(f"--prompts={file}: line {number} has no text field `prompt`")
        rows.append(row)
    return rows
