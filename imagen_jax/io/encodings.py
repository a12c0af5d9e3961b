"""Detects the encoding of text that is not Unicode, such as Windows-1252, -1250 or Shift-JIS.

A caption of a few words fits several encodings. `detect` therefore judges many texts of one origin
together: it looks for the fewest languages, each in one encoding, in which all texts are likely.
This is the shortest description of the texts: a text costs the negative logarithm of the
probability of its characters (letters.py), and every further encoding and language has a price.
What another encoding describes nearly as well is reported as uncertain.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from imagen_jax.io import letters

_WESTERN = "French German Spanish Portuguese Italian Dutch Swedish Danish Finnish Icelandic"
# Encodings, the most frequent first, and the languages written in them.
LANGUAGES = {
    "cp1252": _WESTERN.split(),
    "cp1250": ["Polish", "Czech", "Slovak", "Hungarian", "Romanian", "Slovene", "Croatian"],
    "cp1251": ["Russian", "Ukrainian", "Bulgarian", "Serbian"],
    "cp932": ["Japanese"],
    "gb18030": ["Chinese"],
    "cp949": ["Korean"],
    "big5": ["Traditional Chinese"],
    "euc_jp": ["Japanese"],
    "koi8_r": ["Russian"],
    "cp1253": ["Greek"],
    "cp1254": ["Turkish"],
    "cp1255": ["Hebrew"],
    "cp1256": ["Arabic", "Farsi"],
    "cp1257": ["Lithuanian", "Latvian", "Estonian"],
    "cp874": ["Thai"],
    "mac_roman": _WESTERN.split(),
}
_PAIRS = [(name, language) for name, languages in LANGUAGES.items() for language in languages]
# Prices in nats: of an encoding, less for the usual one and more for those that are rarer than
# others of the same script; of every encoding but the first; of a further language.
_USUAL, _OTHER = "cp1252", 3.0
_RARER = {
    **dict.fromkeys(("cp1250", "cp1253", "cp1254", "cp1256"), 1.0),
    **dict.fromkeys(("koi8_r", "euc_jp", "cp1255", "cp1257", "cp874"), 2.0),
    "mac_roman": 4.0,
}
_FURTHER, _LANGUAGE = 8.0, 4.0
# Of each text that is in another encoding than the first, in another language of its encoding.
_MINORITY, _SWITCH = 3.0, 1.0
_IMPOSSIBLE = 1e4
_ASCII = bytes(range(128))
# Least difference to another encoding, of all texts of an encoding (of prices, 30% count: they are
# no evidence), and of a text by itself.
_CLEAR, _CLEAR_ALONE, _WEIGHT_OF_PRICES = 3.0, 4.0, 0.3
MAX_COST = 8.5  # Per byte beyond ASCII, of any text.
MAX_BYTES = 2000  # Of a text, by which it is judged.


class Guess(NamedTuple):
    """The encoding of a text.

    Attributes:
      name: as of `bytes.decode`, which decodes the text without an error; "": unknown.
      other: another encoding, in which the text reads differently and is nearly as likely.
    """

    name: str
    other: str = ""


def described(guess: Guess) -> str:
    """An encoding for a report, as a noun that follows "in"."""
    if guess.other:
        return f"an uncertain encoding ({guess.name}, perhaps {guess.other})"
    return guess.name or "Unicode"


def detect(texts: Sequence[bytes]) -> list[Guess]:
    """The encoding of each text.

    Args:
      texts: of one origin, such as the captions of a folder; not Unicode.
    """
    costs = np.array([_costs(text) for text in texts]).reshape(len(texts), len(_PAIRS))
    chosen = _description(costs, range(len(_PAIRS)))
    if not chosen:
        return [Guess("")] * len(texts)
    total = costs[:, chosen] + _extras(chosen)
    names = [_PAIRS[chosen[place]][0] for place in np.argmin(total, axis=1)]
    others = {name: _other(name, texts, costs, names) for name in set(names)}
    return [
        Guess(name, others[name] or _other_alone(text, name, own))
        if _fits(text, name, own)
        else Guess("")
        for text, name, own in zip(texts, names, costs, strict=True)
    ]


def nearest(text: bytes, guesses: Sequence[Guess]) -> Guess:
    """The one of `guesses`, found for other texts of the same origin, that fits a text best.

    Returns:
      It is uncertain also if the text by itself is far more likely in another encoding, as in
      `detect`. Guess(""): none fits.
    """
    costs = np.array(_costs(text))
    fitting = [guess for guess in guesses if guess.name and _fits(text, guess.name, costs)]

    def cost(guess: Guess) -> float:
        return _least(costs, guess.name) + (_MINORITY if guess.name != guesses[0].name else 0.0)

    if not fitting:
        return Guess("")
    name, other = min(fitting, key=cost)
    return Guess(name, other or _other_alone(text, name, costs))


def _costs(text: bytes) -> list[float]:
    """Cost of a text in each of `_PAIRS`."""
    found = dict.fromkeys(_PAIRS, _IMPOSSIBLE)
    for name, languages in LANGUAGES.items():
        with contextlib.suppress(UnicodeDecodeError):
            text.decode(name)
            start = text[:MAX_BYTES].decode(name, "ignore")
            for language in languages:
                found[name, language] = letters.cost(start, language)
    return list(found.values())


def _least(costs: np.ndarray, name: str) -> float:
    """Cost of a text in the best language of an encoding."""
    return float(min(cost for cost, pair in zip(costs, _PAIRS, strict=True) if pair[0] == name))


def _fits(text: bytes, name: str, costs: np.ndarray) -> bool:
    beyond = sum(byte > 0x7F for byte in text[:MAX_BYTES])
    return _least(costs, name) <= MAX_COST * max(1, beyond)


def _description(costs: np.ndarray, pairs: Sequence[int]) -> list[int]:
    """Numbers of the pairs that describe texts best, found one by one; at least one.

    Args:
      costs: [text, pair].
      pairs: to choose from.
    """
    chosen: list[int] = []
    least = np.full(len(costs), _IMPOSSIBLE)
    while left := [pair for pair in pairs if pair not in chosen]:
        new = {pair: np.minimum(least, costs[:, pair] + _extra(pair, chosen)) for pair in left}
        totals = {pair: new[pair].sum() + _price(pair, chosen) for pair in left}
        best = min(left, key=totals.__getitem__)
        if chosen and totals[best] >= least.sum() or new[best].min(initial=0) == _IMPOSSIBLE:
            break
        chosen.append(best)
        least = new[best]
    # The first one may be needless beside others.
    while len(chosen) > 1:
        shorter = [[pair for pair in chosen if pair != out] for out in chosen]
        best_set = min(shorter, key=lambda those: _total(costs, those))
        if _total(costs, best_set) > _total(costs, chosen):
            break
        chosen = best_set
    return chosen


def _price(pair: int, chosen: Sequence[int]) -> float:
    """What a description is longer by with that pair, beside the costs of texts."""
    name = _PAIRS[pair][0]
    if any(_PAIRS[other][0] == name for other in chosen):
        return _LANGUAGE
    price = _RARER.get(name, 0.0) + (_OTHER if name != _USUAL else 0.0)
    return price + (_FURTHER if chosen else 0.0)


def _extra(pair: int, chosen: Sequence[int]) -> float:
    """What each text in that pair costs more, as others are more frequent."""
    names = [_PAIRS[other][0] for other in chosen]
    name = _PAIRS[pair][0]
    return _MINORITY * (names[:1] not in ([], [name])) + _SWITCH * (name in names)


def _extras(chosen: Sequence[int]) -> list[float]:
    return [_extra(pair, chosen[:place]) for place, pair in enumerate(chosen)]


def _prices(chosen: Sequence[int]) -> float:
    return sum(_price(pair, chosen[:place]) for place, pair in enumerate(chosen))


def _total(costs: np.ndarray, chosen: Sequence[int]) -> float:
    return float((costs[:, chosen] + _extras(chosen)).min(axis=1).sum()) + _prices(chosen)


def _other(name: str, texts: Sequence[bytes], costs: np.ndarray, names: Sequence[str]) -> str:
    """Another encoding that describes all texts of this one nearly as well; "": none."""
    # Texts with the same letters are no further evidence: the final ų of Lithuanian names is an ø.
    distinct = {
        frozenset(texts[i].translate(None, _ASCII)): i
        for i in reversed(range(len(names)))
        if names[i] == name
    }
    own = list(distinct.values())
    best, least = "", math.inf

    def cost_in(encoding: str) -> float:
        pairs = [number for number, pair in enumerate(_PAIRS) if pair[0] == encoding]
        chosen = _description(costs[own], pairs)
        prices = _prices(chosen) * (1 - _WEIGHT_OF_PRICES)
        return _total(costs[own], chosen) - prices if chosen else math.inf

    for other in LANGUAGES:
        if any(_reads_differently(texts[number], name, other) for number in own):
            cost = cost_in(other)
            best, least = (other, cost) if cost < least else (best, least)
    return best if least < cost_in(name) + _CLEAR else ""


def _other_alone(text: bytes, name: str, costs: np.ndarray) -> str:
    """Another encoding in which a text by itself is far more likely; "": none."""
    others = [other for other in LANGUAGES if _reads_differently(text, name, other)]
    other = min(others, key=lambda other: _least(costs, other), default=name)
    return other if _least(costs, other) + _CLEAR_ALONE < _least(costs, name) else ""


def _reads_differently(text: bytes, name: str, other: str) -> bool:
    """Whether `other` decodes a text, to other characters than `name`."""
    try:
        return other != name and text.decode(other) != text.decode(name)
    except UnicodeDecodeError:
        return False
