"""Captions in text files, for folders and tar files.

A text file holds one caption, with `data.caption_lines` one per line. Lines such as `de.utf8=...`
after the first are translations (Tux Paint's stamps have them) and are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from imagen_jax.config.data import SourceConfig
from imagen_jax.data.sources.records import Caption, is_blank, texts_of
from imagen_jax.io import jsonl, text

# Part of a reader's identity; increased when the meaning of a text file changes.
VERSION = 3
SUFFIXES = (".txt", ".caption", ".text")
MAX_BYTES = 1 << 20  # Of a text file; no caption is longer.
# Of one image: more are an attack or a mistake.
MAX_CAPTIONS, MAX_CHARACTERS = 10_000, 16 << 20
_TRANSLATION = re.compile(r"[a-z]{2,3}(_[A-Z]{2})?(@[a-z]+)?\.utf-?8=", re.IGNORECASE)
_FIELDS = ("text", "caption", "prompt")


class Captions(NamedTuple):
    """The captions of an image, notes on them for the report, and why they cannot be read."""

    texts: tuple[Caption, ...]
    notes: tuple[str, ...] = ()
    fault: str = ""


def of_file(data: bytes, *, by_line: bool) -> Captions:
    """The captions of a text file.

    Args:
      data: content of the file, in any encoding.
      by_line: whether each line is a caption of its own.
    """
    if fault := size_fault(len(data)):
        return Captions((), fault=fault)
    try:
        content = text.decode(data)
    except text.TextError:
        return Captions((data,))  # Rejected in the index pass, with the reason.
    if isinstance(content, str):
        return _of_text(content, by_line)
    # Line ends are the same bytes in all 8-bit encodings and are no second bytes in others.
    found = _of_text(content.decode("latin-1"), by_line)
    return found._replace(texts=tuple(str(one).encode("latin-1") for one in found.texts))


def _of_text(content: str, by_line: bool) -> Captions:
    lines = jsonl.split_lines(content)
    kept = lines[:1] + [line for line in lines[1:] if not _TRANSLATION.match(line)]
    notes = []
    if len(kept) < len(lines):
        notes.append(f"translations left out ({len(lines) - len(kept)} lines)")
    if by_line:
        return Captions(tuple(kept or [""]), tuple(notes))
    filled = sum(bool(line.strip()) for line in kept)
    if filled > 1:
        notes.append(
            f"caption of several lines ({filled}; data.caption_lines=true reads one per line)"
        )
    return Captions(("\n".join(kept),), tuple(notes))


def size_fault(size: int, limit: int = MAX_BYTES) -> str:
    """Why a file of captions of `size` bytes is not read; "" if it is."""
    return f"caption too long (more than {limit:,} bytes)" if size > limit else ""


def count_fault(count: int, characters: int) -> str:
    """Why the captions of one image are too many or, together, too long; "" if they are not."""
    if count > MAX_CAPTIONS:
        return f"too many captions (more than {MAX_CAPTIONS:,})"
    return size_fault(characters, MAX_CHARACTERS)


def explicit_key(key: str) -> str:
    """`data.caption_key` where it is not its default; else ""."""
    return "" if key == SourceConfig.caption_key else key


def of_fields(fields: Mapping[str, Any], key: str = "") -> tuple[Caption, ...]:
    """The captions in a row or a JSON object: those of `key`, else of text, caption or prompt.

    An empty text or caption is passed over; that of `key`, which the user named, is not.
    """
    if key and key in fields:
        return texts_of(fields[key])
    found = [texts_of(fields[name]) for name in _FIELDS if name in fields]
    filled = (texts for texts in found if not all(map(is_blank, texts)))
    return next(filled, max(found, key=len, default=()))
