"""Decodes the captions of records that are not Unicode, between the checks and the table.

The encoding of a short text is uncertain, that of many is not: records with such captions, and all
that follow, wait until there are enough of them (`io/encodings.py`).
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from imagen_jax.data.sources.records import Caption, Item
from imagen_jax.io import encodings, text
from imagen_jax.io.encodings import Guess

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
    known: list[Guess] = []
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


def _with_known(check: RecordCheck, known: Sequence[Guess]) -> RecordCheck:
    """Decodes by the encodings found so far, where one fits."""
    if not known or not _undecoded(check):
        return check
    guesses = {caption: encodings.nearest(caption, known) for caption in _undecoded(check)}
    if not all(guess.name for guess in guesses.values()):
        return check
    return _with_encodings(check, guesses)


def _detect(checks: Sequence[RecordCheck], known: list[Guess]) -> Iterator[RecordCheck]:
    """Decodes the captions of `checks`; adds their encodings to `known`, frequent ones first."""
    texts = list(dict.fromkeys(found for check in checks for found in _undecoded(check)))
    guesses = dict(zip(texts, encodings.detect(texts), strict=True))
    names = [guess.name for guess in known]
    for guess, _ in collections.Counter(guesses.values()).most_common():
        if guess.name and guess.name not in names:
            known.append(guess)
            names.append(guess.name)
    for check in checks:
        yield _with_encodings(check, guesses) if _undecoded(check) else check


def _with_encodings(check: RecordCheck, guesses: Mapping[bytes, Guess]) -> RecordCheck:
    """Decodes captions by the encoding of each."""
    used = [guesses[caption] for caption in _undecoded(check)]
    if not all(guess.name for guess in used):
        return check._replace(fault="caption in an unknown encoding")
    found = [c.decode(guesses[c].name) if isinstance(c, bytes) else c for c in check.item.captions]
    kinds = dict.fromkeys(encodings.described(guess) for guess in used)
    notes = (*check.notes, *(f"caption in {kind}" for kind in kinds))
    return _with(check, found)._replace(notes=notes)


def _with(check: RecordCheck, captions: Iterable[Caption]) -> RecordCheck:
    return check._replace(item=check.item._replace(captions=tuple(captions)))
