"""Text of files of any origin: bytes to characters, and why a text cannot be used.

Unicode is recognised by its byte order mark, by its NUL bytes (UTF-16 without a mark) or as valid
UTF-8. Text in other encodings stays bytes until encodings.py has seen enough of it. Nothing is
replaced by marks.
"""

from __future__ import annotations

import codecs
import collections
import contextlib
import csv
import io
import os
import pathlib
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from imagen_jax.io import encodings

# The order matters: the mark of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_SURROGATE = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")  # As some programs write UTF-8.
_NOT_UPPER = bytes(range(9, 256))
_MOST_LINES = 512  # Lines by which the encoding of a file is detected.
csv.field_size_limit(min(sys.maxsize, 2**31 - 1))


class TextError(ValueError):
    """A text cannot be decoded; the message says why, in a few words."""


class Line(NamedTuple):
    """A line with its end.

    Attributes:
      text: without a byte order mark; with `fault`, bytes that cannot be decoded are surrogates.
      encoding: described for a report; "" for Unicode.
      fault: why it cannot be decoded; "" if it can.
    """

    text: str
    encoding: str = ""
    fault: str = ""


class Row(NamedTuple):
    """A row of a table.

    Attributes:
      number: of its last line, from 1.
      fields: by the names of the header, in lower case.
      encoding: described for a report; "" for Unicode.
      fault: why it cannot be used; "" if it can.
    """

    number: int
    fields: dict[str, str]
    encoding: str = ""
    fault: str = ""


def decode(data: bytes) -> str | bytes:
    """The text of a file in Unicode; `data` itself where it is in another encoding.

    Raises:
      TextError: damaged Unicode.
    """
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            return _decode_unicode(data.removeprefix(mark), encoding)
    if encoding := _utf16_without_mark(data):
        return _decode_unicode(data, encoding)
    try:
        return data.decode().lstrip("\ufeff")
    except UnicodeDecodeError as error:
        if _is_utf8(data):
            return _decode_unicode(data, "utf-8", error)
        return data


def fault(text: str) -> str:
    """Why a text cannot be used, as a noun that follows "with"; "" if it can."""
    if "\0" in text:
        return "a NUL character"
    if found := re.search("[\ud800-\udfff]", text):
        return f"an unpaired surrogate (U+{ord(found[0]):04X} at character {found.start()})"
    return ""


def is_blank(text: str) -> bool:
    """Whether nothing of a text is visible: white space, and characters without a width."""
    if text.isascii():
        return not text.strip()
    return all(char.isspace() or unicodedata.category(char) == "Cf" for char in text)


def read_lines(path: str | os.PathLike[str]) -> Iterator[Line]:
    r"""Reads a text file of any encoding as it is iterated over; lines end in \n.

    Lines that are not UTF-8 are detected together, so that a file may have lines of two origins.

    Raises:
      TextError: damaged UTF-16 or UTF-32.
    """
    file = pathlib.Path(path)
    with file.open("rb") as stream:
        start = stream.read(4096)
    mark = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")
    if mark != "utf-8" or _utf16_without_mark(start):
        content = str(decode(file.read_bytes()))
        yield from map(Line, re.findall(r"[^\n]*\n|[^\n]+", content))
        return
    other = _detect_lines(file)
    known = [guess for guess, _ in collections.Counter(other.values()).most_common() if guess.name]
    for number, data in enumerate(_lines(file)):
        try:
            text = decode(data)
        except TextError as error:
            yield Line(data.decode("utf-8", "surrogateescape"), fault=str(error))
            continue
        if isinstance(text, str):
            yield Line(text)
            continue
        guess = other.get(number) or encodings.nearest(text, known)
        if not guess.name:
            guess = encodings.detect([text])[0]
        if guess.name:
            yield Line(text.decode(guess.name), encodings.described(guess))
        else:
            yield Line(data.decode("utf-8", "surrogateescape"), fault="an unknown encoding")


def _lines(file: pathlib.Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream):
            yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line


def _detect_lines(file: pathlib.Path) -> dict[int, encodings.Guess]:
    """Encodings of the lines that are not Unicode, by number; of the first ones."""
    found: dict[int, bytes] = {}
    for number, line in enumerate(_lines(file)):
        try:
            text = decode(line)
        except TextError:
            continue
        if isinstance(text, bytes):
            found[number] = text
        if len(found) == _MOST_LINES:
            break
    return dict(zip(found, encodings.detect(list(found.values())), strict=True))


def read_csv(path: str | os.PathLike[str]) -> Iterator[Row]:
    """Reads a table with a header, separated by commas, semicolons or tabs; fields of any length.

    Raises:
      TextError: damaged UTF-16 or UTF-32, or no table.
    """
    lines: list[Line] = []

    def texts() -> Iterator[str]:
        for line in read_lines(path):
            for part in io.StringIO(line.text, newline=""):  # A line may end in \r alone.
                lines.append(line)
                yield part

    stream = texts()
    header = next(stream, "")
    while header and not header.strip():
        header = next(stream, "")
    delimiter = max(",;\t", key=header.count)
    if stated := re.fullmatch(r"sep=([,;|\t])\s*", header, re.IGNORECASE):  # Spreadsheets write it.
        delimiter, header = stated[1], next(stream, "")
    rows = csv.reader([header], delimiter=delimiter, skipinitialspace=True)
    # Where a space follows the delimiters, it may stand before a quoted field, too.
    spaced = f"{delimiter} " in header
    names = [name.strip().strip('"').lower() for name in next(rows, [])]
    first = len(lines)
    reader = csv.reader(stream, delimiter=delimiter, skipinitialspace=spaced)
    try:
        for row in reader:
            own, lines[first:] = lines[first:], []
            if not any(row):
                continue
            encoding = next((line.encoding for line in own if line.encoding), "")
            wrong = next((line.fault for line in own if line.fault), "")
            if len(own) > 1 and _is_open({id(line): line.text for line in own}.values(), delimiter):
                wrong = "a quote that is never closed"
            if len(row) > len(names):
                wrong = f"{len(row)} fields under a header of {len(names)}; quote the text"
            fields = dict(zip(names, row, strict=False))
            yield Row(first + reader.line_num, fields, encoding, wrong)
    except csv.Error as error:
        raise TextError(f"no table after line {first + reader.line_num} ({error})") from error


def _is_open(lines: Iterable[str], delimiter: str) -> bool:
    """Whether the lines of a row end within a quoted field: it holds what was the rest."""
    try:
        list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error as error:
        return "end of data" in str(error)
    return False


def _decode_unicode(data: bytes, encoding: str, error: UnicodeError | None = None) -> str:
    """Decodes; unpaired surrogates stay, paired ones become one character. Raises TextError."""
    try:
        text = data.decode(encoding, "surrogatepass")
    except UnicodeDecodeError as found:
        error = error or found
        where = f" (at byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        raise TextError(f"damaged {encoding[:6].removesuffix('-').upper()}{where}") from None
    pairs = "[\ud800-\udbff][\udc00-\udfff]"
    joined = lambda m: m[0].encode("utf-16-le", "surrogatepass").decode("utf-16-le")  # noqa: E731
    return re.sub(pairs, joined, text).lstrip("\ufeff")  # Some programs write the mark twice.


def _utf16_without_mark(data: bytes) -> str:
    """The encoding of UTF-16 without a mark; "": something else.

    Every other byte is the upper half of a character: below 9 up to the Arabic letters.
    """
    upper = [len(data[first::2].translate(None, _NOT_UPPER)) for first in (0, 1)]
    if len(data) >= 8 and min(upper) == 0 and max(upper) > 0.6 * (len(data) // 2):
        return "utf-16-le" if upper[1] else "utf-16-be"
    return ""


def _is_utf8(data: bytes) -> bool:
    """Whether invalid UTF-8 holds surrogates, or at least half of what is not ASCII is valid."""
    with contextlib.suppress(UnicodeDecodeError):
        _SURROGATE.sub(b"", data).decode()
        return True
    chars = [char for char in data.decode("utf-8", "surrogateescape") if char > "\x7f"]
    broken = sum("\udc80" <= char <= "\udcff" for char in chars)
    valid = sum(unicodedata.category(char)[0] in "LPSN" for char in chars)
    return broken <= valid
