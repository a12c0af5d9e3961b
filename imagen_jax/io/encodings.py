"""Detects the encoding of text that is not Unicode, such as Windows-1252, -1251 or Shift-JIS.

A caption of a few words fits several encodings. `detect` therefore judges many texts of one origin
together. charset-normalizer lists the encodings that a text may have; its letter frequencies
show which of them give a language. The encoding that fits most texts is taken, then the next one
for the texts that it does not fit.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import re
import unicodedata
from collections.abc import Sequence

# Encodings, the most frequent first, and the languages (of charset-normalizer) written in them.
_WESTERN = "French German Spanish Portuguese Italian Dutch Swedish Norwegian Danish Finnish"
LANGUAGES = {
    "cp1252": _WESTERN,
    "cp1250": "Polish Czech Hungarian Romanian Slovene Slovak Croatian",
    "cp1251": "Russian Ukrainian Bulgarian Serbian",
    "cp932": "Japanese Japanese— Japanese——",
    "gb18030": "Chinese",
    "cp949": "Korean",
    "big5": "Chinese",
    "euc_jp": "Japanese Japanese— Japanese——",
    "koi8_r": "Russian",
    "cp1253": "Greek",
    "cp1254": "Turkish",
    "cp1255": "Hebrew",
    "cp1256": "Arabic Farsi",
    "cp1257": "Lithuanian Estonian",
    "cp874": "Thai",
    "mac_roman": _WESTERN,
}
_JAPANESE = "CJK HIRAGANA KATAKANA KATAKANA-HIRAGANA FULLWIDTH"
# First words of the Unicode names of an encoding's letters; LATIN where missing.
_SCRIPTS = {
    "cp1251": "CYRILLIC",
    "koi8_r": "CYRILLIC",
    "cp932": _JAPANESE,
    "euc_jp": _JAPANESE,
    "gb18030": "CJK FULLWIDTH",
    "big5": "CJK FULLWIDTH",
    "cp949": "HANGUL FULLWIDTH",
    "cp1253": "GREEK",
    "cp1255": "HEBREW",
    "cp1256": "ARABIC",
    "cp874": "THAI",
}
# Signs that occur in text of every script.
_COMMON = frozenset("\u00a0‘’‚“”„–—…•‹›«»©®™°·×÷½¼¾€£¥§¿¡№、。・「」！？（）：；～ー")
_INSIDE = re.compile(r"(?<=[^\W\d_])[‚“”„…•‹›«»©®°×÷¿¡§¥£€](?=[^\W\d_])")  # Not within words.
# Encodings whose fault is this much above the lowest fit equally well; nearly as well.
MARGIN, NEAR = 0.06, 0.15
MAX_FAULT = 1.0
_LANGUAGE = 0.5  # Weight of the letter frequencies in a fault.
_REJECTED = 0.3  # Fault of an encoding that charset-normalizer rejects; it accepts up to 0.2.
# Encodings that are less frequent than another of the same script; added to their faults.
_RARE = {
    **dict.fromkeys(("cp1254", "cp1257", "koi8_r", "euc_jp"), 0.05),
    **dict.fromkeys(("cp1250", "cp874", "cp1256"), 0.1),
    "mac_roman": 0.2,
}
# Beside cp1252, which a word of one or two accented letters is in unless others say so.
_OF_ONE_BYTE = {name for name in LANGUAGES if re.match("cp12|cp874|koi8|mac", name)} - {"cp1252"}


def detect(texts: Sequence[bytes]) -> list[str]:
    """The encoding of each text.

    Args:
      texts: of one origin, such as the captions of a folder; not Unicode.

    Returns:
      Names as of `bytes.decode`, which decodes the text without an error; "": unknown.
    """
    found = [""] * len(texts)
    faults = [_faults(text) for text in texts]
    doubts = [_doubt(text) for text in texts]
    likely = [_likely(names, MARGIN + d) for names, d in zip(faults, doubts, strict=True)]
    left = {i for i, names in enumerate(likely) if names}
    while left:

        def rank(name: str) -> tuple[int, float]:
            those = [likely[i][name] for i in left if name in likely[i]]
            return -len(those), round(float(sum(those)), 6)

        chosen = min(LANGUAGES, key=rank)
        for i in [i for i in left if chosen in likely[i]]:
            found[i] = chosen
            left.remove(i)
    # A text alone in its encoding is more likely in that of the others, where this fits as well.
    counts = collections.Counter(found)
    for i, names in enumerate(faults):
        fitting = _likely(names, NEAR + doubts[i])
        near = {name for name in fitting if counts[name] > 3 * counts[found[i]]}
        found[i] = max(near, key=lambda name: counts[name], default=found[i])
    return found


def fits(text: bytes, encoding: str) -> bool:
    """Whether `encoding` decodes `text`, and to letters of its own scripts."""
    try:
        return _fault(text.decode(encoding), encoding) <= _LANGUAGE
    except UnicodeDecodeError:
        return False


def _faults(text: bytes) -> dict[str, float]:
    """How unlikely each encoding is in which the text can be decoded."""
    import charset_normalizer

    matches = charset_normalizer.from_bytes(text, cp_isolation=list(LANGUAGES))
    chaos = {name: match.chaos for match in matches for name in match.could_be_from_charset}
    faults = {}
    for name in LANGUAGES:
        with contextlib.suppress(UnicodeDecodeError):
            fault = chaos.get(name, _REJECTED) + _fault(text.decode(name), name)
            faults[name] = fault + _RARE.get(name, 0.0)
            if name in _OF_ONE_BYTE:
                faults[name] += _doubt(text)
    return faults


def _doubt(text: bytes) -> float:
    """How little the letters of a text say: 0.45 for one that is not ASCII, 0 for four."""
    return max(0.0, 0.6 - 0.15 * max(1, sum(byte > 0x7F for byte in text)))


def _likely(faults: dict[str, float], margin: float) -> dict[str, float]:
    """The encodings with the lowest faults."""
    limit = min(min(faults.values(), default=0.0) + margin, MAX_FAULT)
    return {name: fault for name, fault in faults.items() if fault <= limit}


def _fault(text: str, encoding: str) -> float:
    """How unlikely it is that text in `encoding` decodes to this, 0 (likely) and above."""
    scripts = _SCRIPTS.get(encoding, "LATIN").split()
    signs = [char for char in text if char > "\x7f" and char not in _COMMON]
    inside = 0.3 if _INSIDE.search(text) else 0.0
    if not signs:
        return inside
    foreign = sum(_script(char) not in scripts for char in signs) / len(signs)
    fault = inside + foreign + _LANGUAGE * (1 - _frequency(signs, encoding))
    within = [char for char in re.findall(r"(?<=[^\W\d_])[^\W\d_]", text) if char.isupper()]
    if any(char > "\x7f" for char in within):
        fault += 0.1 if text.upper() == text else 0.3  # Upper case within words.
    if scripts == ["LATIN"]:
        letters = sum(char.isalpha() for char in text)
        # Words of accented letters alone are words of another script.
        return fault + (1.0 if len(signs) > 2 and len(signs) > 0.6 * letters else 0.0)
    # Letters of other scripts do not stand beside Latin ones.
    beside = re.findall(r"(?<=[A-Za-z])[^\W\x00-\x7f]|[^\W\x00-\x7f](?=[A-Za-z])", text)
    return fault + len(beside) / len(signs)


def _script(char: str) -> str:
    return unicodedata.name(char, "").split(" ")[0]


def _frequency(chars: Sequence[str], encoding: str) -> float:
    """How frequent the characters are in a language of the encoding, 0 to 1."""
    tables = _tables(encoding)
    return max(sum(table.get(c.lower(), 0.0) for c in chars) for table in tables) / len(chars)


@functools.cache
def _tables(encoding: str) -> list[dict[str, float]]:
    """By language, the frequency of its letters: 1 for the first of the list, 0 for the last."""
    from charset_normalizer.constant import FREQUENCIES

    tables = []
    for language in LANGUAGES[encoding].split():
        letters = FREQUENCIES[language]
        tables.append({c: 1 - rank / len(letters) for rank, c in enumerate(letters)})
    if len(tables) > 1 and encoding in ("cp932", "euc_jp"):  # One language in three scripts.
        tables = [{char: value for table in tables for char, value in table.items()}]
    return tables
