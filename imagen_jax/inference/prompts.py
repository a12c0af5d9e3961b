"""Prompt files: one row per prompt, a mapping with `prompt` and the file's other fields."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from imagen_jax.inference.request import MAX_SEED
from imagen_jax.io import jsonl, text


class PromptError(ValueError):
    """A prompt or a prompt file cannot be used; the message gives file, line and fix."""


class _Row(NamedTuple):
    """A row, why its text cannot be decoded ("" if it can), and its encoding ("": Unicode)."""

    line: int
    fields: dict[str, Any]
    fault: str = ""
    encoding: str = ""


def read(path: str, log: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Reads prompts. Rows whose text cannot be used are skipped and logged; encodings are logged.

    Args:
      path: .txt (a prompt per line), .csv (a column `prompt`, or `prompts` as in
        DrawBench's, in any case) or .jsonl (objects with `prompt`), in Unicode or an encoding that
        can be detected. Empty lines of a .txt are skipped. A field `seed` is the seed of the
        row's images.
      log: called with one line per skipped row, and one per encoding that is not Unicode.

    Raises:
      PromptError: no such file, unknown kind, no prompts, or a row without one.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise PromptError(f"--prompts={path}: no such file")
    readers = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl}
    if file.suffix.lower() not in readers:
        raise PromptError(f"--prompts={path}: must end in {', '.join(readers)}")
    rows, skipped = [], []
    encodings: dict[str, tuple[int, str]] = {}  # Number of prompts, and the first one.
    try:
        for row in readers[file.suffix.lower()](file):
            prompt = row.fields.get("prompt", "")
            why = row.fault or text.fault(prompt)
            if not why and not prompt:
                name = "text field" if file.suffix.lower() == ".jsonl" else "column"
                raise PromptError(f"--prompts={path}: line {row.line} has no {name} `prompt`")
            if why:
                skipped.append(f"line {row.line}: a prompt with {why}")
            else:
                rows.append(_with_seed(row.fields, f"--prompts={path}: line {row.line}"))
                count, first = encodings.get(row.encoding, (0, prompt))
                encodings[row.encoding] = count + 1, first
    except text.TextError as error:
        raise PromptError(f"--prompts={path}: {error}; write it as UTF-8") from error
    if not rows:
        why = f" that can be used ({skipped[0]})" if skipped else ""
        raise PromptError(f"--prompts={path}: holds no prompts{why}")
    for why in skipped:
        log(f"--prompts={path}: {why} is skipped")
    for name, (count, first) in encodings.items():
        if name:
            log(f"--prompts={path}: {count} read in {name}, such as {first!r}")
    return rows


def check(prompt: str, flag: str) -> str:
    """The prompt of a flag. Raises PromptError: it is not UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise PromptError(f"{flag}={ascii(prompt)} is not UTF-8 text; give it as UTF-8") from None
    return prompt


def _with_seed(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """The row with `seed`, the seed of its images, as a number. Raises PromptError."""
    if fields.get("seed") in (None, ""):
        return {name: value for name, value in fields.items() if name != "seed"}
    seed = str(fields["seed"]).strip()
    if not (seed.isascii() and seed.isdigit() and int(seed) <= MAX_SEED):
        raise PromptError(
            f"{where} has seed={fields['seed']!r}; give a whole number from 0 to {MAX_SEED}"
        )
    return {**fields, "seed": int(seed)}


def _read_txt(file: pathlib.Path) -> Iterator[_Row]:
    number = 0
    for line in text.read_lines(file):
        for part in jsonl.split_lines(line.text):  # A line may end in \r alone.
            number += 1
            if not text.is_blank(part):
                yield _Row(number, {"prompt": part.strip()}, line.fault, line.encoding)


def _read_csv(file: pathlib.Path) -> Iterator[_Row]:
    for row in text.read_csv(file):
        fields = dict(row.fields)
        if "prompts" in fields and "prompt" not in fields:
            fields["prompt"] = fields.pop("prompts")
        yield _Row(row.number, fields, row.fault, row.encoding)


def _read_jsonl(file: pathlib.Path) -> Iterator[_Row]:
    for number, line in enumerate(text.read_lines(file), start=1):
        if not line.text.strip():
            continue
        try:
            row = json.loads(line.text, strict=False)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"--prompts={file}: line {number} is not JSON ({error})") from error
        prompt = row.get("prompt") if isinstance(row, dict) else None
        yield _Row(number, row if isinstance(prompt, str) else {}, line.fault, line.encoding)
