"""Files read by lines: JSON lines, and plain text with one entry per line.

A line of JSON ends at a line feed. `str.splitlines` also splits at U+0085, U+2028 and U+2029, which
JSON allows unescaped within a string, and at further control characters.
"""

from __future__ import annotations

import codecs
import io
import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

_RAISE = object()


class JsonLinesError(ValueError):
    """A line is not JSON; the message names file and line.

    Attributes:
      line: number of the line, from 1.
      text: its first 40 characters.
    """

    def __init__(self, message: str, line: int, text: str) -> None:
        super().__init__(message)
        self.line, self.text = line, text.strip()[:40]


def read(
    path: str | os.PathLike[str], *, errors: str = "strict", default: Any = _RAISE
) -> Iterator[tuple[int, Any]]:
    """Reads a JSON lines file as it is iterated over; blank lines are skipped.

    Args:
      path: UTF-8, with or without a byte order mark.
      errors: as of `bytes.decode`, for bytes that are not UTF-8.
      default: yielded for a line that is not JSON; omitted: such a line raises.

    Yields:
      Line number, from 1, and the line's value.

    Raises:
      JsonLinesError: a line is not JSON.
      UnicodeDecodeError: the file is not UTF-8 and `errors` is "strict".
    """
    with epath.Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            text = content.decode("utf-8", errors)
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                if default is _RAISE:
                    message = f"{path} line {number} is not JSON ({error})"
                    raise JsonLinesError(message, number, text) from error
                value = default
            yield number, value


def split_lines(text: str) -> list[str]:
    r"""Lines of plain text without their ends, which are \n, \r\n and \r only."""
    return [line.removesuffix("\n") for line in io.StringIO(text, newline=None)]
