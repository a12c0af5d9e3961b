"""Tables of captions beside images: metadata.jsonl, metadata.csv and metadata.parquet.

Hugging Face's imagefolder format: `file_name` relative to the table, and fields of the image.
"""

from __future__ import annotations

import importlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from imagen_jax.config.fields import ConfigError
from imagen_jax.io import text

JSON_LINES = "metadata.jsonl"
ROWS = 256  # Of a .parquet, decoded at once: a repeated text takes a few bytes in the file.
NAMES = (JSON_LINES, "metadata.csv", "metadata.parquet")


class MetadataRow(NamedTuple):
    """A row of a table.

    Attributes:
      number: of its line, or of the row, from 1.
      fields: {} where the row cannot be read.
      fault: why the row cannot be used; "" if it can.
      notes: for the report.
    """

    number: int
    fields: dict[str, Any]
    fault: str = ""
    notes: tuple[str, ...] = ()


def read(path: pathlib.Path) -> Iterator[MetadataRow]:
    """Reads a table, by its suffix.

    Raises:
      ConfigError: a .parquet without pyarrow.
    """
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    try:
        yield from readers[path.suffix.lower()](path)
    except text.TextError as error:
        yield MetadataRow(0, {}, f"unreadable ({error})")


def _read_jsonl(path: pathlib.Path) -> Iterator[MetadataRow]:
    for number, line in enumerate(text.read_lines(path), start=1):
        if not line.text.strip():
            continue
        value, why = None, "no JSON object"
        try:
            value = json.loads(line.text, strict=False)  # Tabs within texts.
        except (ValueError, RecursionError) as error:
            why = f"not JSON: {str(error).partition(';')[0]}"
        fault = f"caption in {line.fault}" if line.fault else ""
        notes = (f"caption in {line.encoding}",) if line.encoding else ()
        if isinstance(value, dict):
            yield MetadataRow(number, value, fault, notes)
        else:
            yield MetadataRow(number, {}, fault or f"bad row ({why})")


def _read_csv(path: pathlib.Path) -> Iterator[MetadataRow]:
    for row in text.read_csv(path):
        notes = (f"caption in {row.encoding}",) if row.encoding else ()
        fault = f"bad row ({row.fault})" if row.fault else ""
        yield MetadataRow(row.number, row.fields, fault, notes)


def _read_parquet(path: pathlib.Path) -> Iterator[MetadataRow]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(
            f"{path} needs the module {error.name!r}; install pyarrow, or write metadata.jsonl"
        ) from None
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(ROWS):
            for fields in batch.to_pylist():
                number += 1
                yield MetadataRow(number, fields)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors.
        yield MetadataRow(0, {}, f"unreadable ({' '.join(str(error).split())})")
