"""How frequent characters beyond ASCII are in a language, for encodings.py.

Costs are negative logarithms of probabilities, in nats. Those of alphabets and of CJK characters
follow from the order of frequency in charset-normalizer, those of Latin scripts from `LATIN`:
charset-normalizer's lists of 26 letters leave out many letters with accents.
"""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections.abc import Sequence

# Shares of letters in text, percent, rounded from the table in Wikipedia's "Letter frequency" and,
# for languages that it lacks, from its articles on their alphabets. Costs depend on ratios alone.
LATIN = {
    "French": "é1.5 à.49 è.27 ê.22 ç.09 â.05 î.05 ù.06 û.06 ô.03 œ.02 ë.01 ï.01 ü.01",
    "German": "ü1.0 ä.58 ö.44 ß.31 é.02",
    "Spanish": "ó.83 í.73 á.5 é.43 ñ.31 ú.17 ü.01",
    "Portuguese": "ã.73 ç.53 á.5 é.4 ê.4 í.3 ó.3 ú.2 â.15 õ.1 à.07 ô.1",
    "Italian": "à.6 è.4 ù.17 ò.15 é.06 ì.06",
    "Dutch": "ë.1 é.08 ï.05 è.02 ü.02 ö.02 ê.01",
    "Swedish": "ä1.8 å1.3 ö1.3 é.05",
    "Danish": "å1.2 ø.94 æ.87 é.05 ò.01",
    "Finnish": "ä3.6 ö.44 å.01",
    "Icelandic": "ð2.5 á1.8 í1.6 þ1.4 ó1.0 æ.87 ö.78 é.65 ú.61 ý.23",
    "Polish": "ł1.7 ó1.1 ę1.0 ś.8 ą.7 ć.7 ż.7 ń.36 ź.08",
    "Czech": "í1.6 á1.5 ě1.2 é1.0 ý.9 č.8 ř.8 š.8 ž.8 ů.4 ú.1 ň.05 ť.04 ď.03 ó.03",
    "Slovak": "á1.6 č1.0 í1.0 ý.9 ž.9 é.8 š.8 ú.8 ť.7 ľ.4 ň.2 ô.2 ď.2 ó.1 ä.1 ŕ.01",
    "Hungarian": "é3.5 á3.4 ó1.1 ö1.1 ő1.0 í.6 ü.6 ú.3 ű.2",
    "Romanian": "ă3.0 ş1.1 î1.0 ţ1.0 â.8",
    "Slovene": "č1.5 š1.0 ž.65 ć.03",
    "Croatian": "č1.1 š.9 ć.6 ž.5 đ.25",
    "Turkish": "ı5.1 ü1.9 ş1.8 ç1.2 ğ1.1 ö.8 i̇.1 â.03",
    "Lithuanian": "ė1.6 ų1.3 š1.2 ž.8 ą.7 į.6 ū.5 č.4 ę.3",
    "Latvian": "ā4.0 ī2.0 ē1.8 š1.5 ņ.6 ļ.5 ū.5 ž.4 č.3 ģ.15 ķ.15",
    "Estonian": "ä1.5 õ1.0 ü.8 ö.25 š.05 ž.03",
}
# First words of the Unicode names of the letters.
ALPHABETS = {
    **dict.fromkeys(("Russian", "Ukrainian", "Bulgarian", "Serbian"), "CYRILLIC"),
    **dict.fromkeys(("Arabic", "Farsi"), "ARABIC"),
    "Greek": "GREEK",
    "Hebrew": "HEBREW",
    "Thai": "THAI",
}
# charset-normalizer's lists with their shares of a text; a national standard with the first and the
# last byte of its frequent characters, and the cost of one that is in no list.
CHARACTERS = {
    "Japanese": (
        {"Japanese": 0.15, "Japanese—": 0.25, "Japanese——": 0.45},
        ("euc_jp", 0xB0, 0xCF, 8.3),
    ),
    "Chinese": ({"Chinese": 0.3}, ("gb2312", 0xB0, 0xD7, 8.6)),
    "Traditional Chinese": ({"Chinese": 0.3}, ("big5", 0xA4, 0xC6, 8.9)),
    "Korean": ({"Korean": 0.45}, ("euc_kr", 0xB0, 0xC8, 8.2)),
}
_EAST_ASIAN = {"CJK", "HANGUL", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "FULLWIDTH"}
# Signs that occur in text of every script; the most frequent ones cost less.
_SIGN = 6.5
_FREQUENT_SIGNS = {"’": 3.0, **dict.fromkeys("–€", 4.0), **dict.fromkeys("“”…—©°", 4.5)}
_SIGNS = frozenset(
    "\u00a0‘’‚“”„–—…•‹›«»©®™°·×÷½¼¾€£¥§¿¡№、。・「」『』【】《》！？（）：；～ー，￥＝％"
)
_INSIDE = re.compile(r"(?<=[^\W\d_])[‚“”„…•‹›«»©®°·×÷½¼¾¿¡§¥£€](?=[^\W\d_])")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f]")
_BESIDE_LATIN = re.compile(r"(?<=[A-Za-z])(?=[^\W\x00-\x7f])|(?<=[^\W\x00-\x7f])(?=[A-Za-z])")


def cost(text: str, language: str) -> float:
    """Negative logarithm of the probability of what is not ASCII in a text, nats.

    Args:
      text: some words.
      language: a key of `LATIN`, `ALPHABETS` or `CHARACTERS`.
    """
    signs = [(place, char) for place, char in enumerate(text) if char > "\x7f"]
    total = 3.0 * len(_INSIDE.findall(text)) + 9.0 * len(_CONTROL.findall(text))
    capital = 0.4 if text.isupper() and sum(char.isalpha() for char in text) > 1 else 1.5
    for place, char in signs:
        total += _cost_of_char(char, language)
        if char.isupper():
            total += capital + _cost_of_case(text, place)
    if language in LATIN:  # Words of accented letters alone are words of another script.
        usual = max(1.0, 0.34 * sum(char.isalpha() for char in text))
        return total + 4.0 * max(0.0, len(signs) - usual)
    # Letters of other alphabets do not stand beside Latin ones; Japanese does ("Tシャツ").
    return total + (5.0 if language in ALPHABETS else 1.0) * len(_BESIDE_LATIN.findall(text))


def _cost_of_case(text: str, place: int) -> float:
    """That of a capital letter within a word."""
    before, after = text[max(place - 1, 0) : place], text[place + 1 : place + 2]
    if before.isalpha() and before.islower():
        return 4.0
    return 2.0 if before.isalpha() and after.islower() else 0.0


@functools.lru_cache(maxsize=1 << 16)
def _cost_of_char(char: str, language: str) -> float:
    if char in _SIGNS:
        return _FREQUENT_SIGNS.get(char, _SIGN)
    listed = _listed(language).get(char.lower())
    if listed is not None:
        return listed
    script = unicodedata.name(char, "").split(" ")[0]
    if language in LATIN:
        return 8.0 if char.isalpha() and script == "LATIN" else 9.0
    if language in ALPHABETS:
        return 6.5 if script == ALPHABETS[language] else 9.0
    if script not in _EAST_ASIAN:
        return 14.0
    standard, first, last, frequent = CHARACTERS[language][1]
    data = char.encode(standard, "ignore")
    return frequent if len(data) == 2 and first <= data[0] <= last else 12.0


@functools.cache
def _listed(language: str) -> dict[str, float]:
    """Costs of the characters that are in the lists of a language."""
    from charset_normalizer.constant import FREQUENCIES

    if language in LATIN:
        found = re.findall(r"(\D+?)(\d*\.\d+)(?: |$)", LATIN[language])
        shares = {letter: float(share) for letter, share in found}
        whole = sum(shares.values())
        return {letter: min(7.0, -math.log(share / whole)) for letter, share in shares.items()}
    if language in ALPHABETS:
        return _by_rank(FREQUENCIES[language], 0.97, 4)
    lists = CHARACTERS[language][0].items()
    return {
        c: v for name, share in lists for c, v in _by_rank(FREQUENCIES[name], share, 10).items()
    }


def _by_rank(letters: Sequence[str], share: float, offset: int) -> dict[str, float]:
    """Costs of letters in the order of their frequency, by Zipf's law; `share`: of them all."""
    weights = [1 / (rank + offset) for rank in range(len(letters))]
    whole = sum(weights) / share
    return {c: -math.log(w / whole) for c, w in zip(letters, weights, strict=True)}
