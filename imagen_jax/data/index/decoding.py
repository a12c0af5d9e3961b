"""Decodes the captions of records that are not Unicode, between the checks and the table.

The encoding of a short text is uncertain, that of many is not: records with such captions, and all
that follow, wait until there are enough of them (`io/encodings.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from imagen_jax.data.sources.records import Caption, Item
from imagen_jax.io import encodings, text

SAMPLE = 512  # Texts by which encodings are detected.
MAX_WAITING = 100_000  # Records.


class RecordCheck(NamedTuple):
    """Result of checking a record.

    Attributes:
      item: the record.
      size: bytes of its encoded image.
      fault: why it cannot be used; "": it can.
      notes: on a usable record.
      image_size: width and height, pixels.
    """

    item: Item
    size: int
    fault: str
    notes: tuple[str, ...]
    image_size: tuple[int, int] = (0, 0)


def decode_captions(checks: Iterable[RecordCheck]) -> Iterator[RecordCheck]:
    """The same records, in their order, with captions that are text, or a fault."""
    waiting: list[RecordCheck] = []
    known: list[str] = []
    count = 0
    for raw in checks:
        check = _with_known(_with_unicode(raw), known)
        missing = len(_undecoded(check))
        if not waiting and not missing:
            yield check
            continue
        waiting.append(check)
        count += missing
        if count >= SAMPLE or len(waiting) >= MAX_WAITING:
            yield from _detect(waiting, known)
            waiting, count = [], 0
    yield from _detect(waiting, known)


def _undecoded(check: RecordCheck) -> list[bytes]:
    return [] if check.fault else [c for c in check.item.captions if isinstance(c, bytes)]


def _with_unicode(check: RecordCheck) -> RecordCheck:
    """Decodes what is Unicode; finds damaged Unicode and NUL bytes."""
    if not _undecoded(check):
        return check
    try:
        found = [text.decode(c) if isinstance(c, bytes) else c for c in check.item.captions]
    except text.TextError as error:
        return check._replace(fault=f"caption in {error}")
    if any(isinstance(caption, bytes) and b"\0" in caption for caption in found):
        return check._replace(fault="caption with a NUL character")
    return _with(check, found)


def _with_known(check: RecordCheck, known: Sequence[str]) -> RecordCheck:
    """Decodes by the encodings found so far, where one fits."""
    for encoding in known if _undecoded(check) else ():
        if all(encodings.fits(caption, encoding) for caption in _undecoded(check)):
            return _with_encodings(check, dict.fromkeys(_undecoded(check), encoding))
    return check


def _detect(checks: Sequence[RecordCheck], known: list[str]) -> Iterator[RecordCheck]:
    """Decodes all captions of `checks`; adds their encodings to `known`."""
    texts = list(dict.fromkeys(found for check in checks for found in _undecoded(check)))
    names = dict(zip(texts, encodings.detect(texts), strict=True))
    known += [name for name in dict.fromkeys(names.values()) if name and name not in known]
    for check in checks:
        yield _with_encodings(check, names) if _undecoded(check) else check


def _with_encodings(check: RecordCheck, names: dict[bytes, str]) -> RecordCheck:
    """Decodes captions by the encoding of each; "": unknown."""
    used = [names[caption] for caption in _undecoded(check)]
    if not all(used):
        return check._replace(fault="caption in an unknown encoding")
    found = [c.decode(names[c]) if isinstance(c, bytes) else c for c in check.item.captions]
    notes = (*check.notes, *(f"caption in {name}" for name in dict.fromkeys(used)))
    return _with(check, found)._replace(notes=notes)


def _with(check: RecordCheck, captions: Iterable[Caption]) -> RecordCheck:
    return check._replace(item=check.item._replace(captions=tuple(captions)))
