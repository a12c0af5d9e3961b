"""Other names: what people call an emoji besides its caption.

`other_names.tsv` holds aliases of Unicode and short names and keywords of vendors, with sources and
licences at its head, which say how they were chosen (benchmarks/emoji_other_names.py). A name is
used if it is no training caption, and the name of one emoji only.
A *new word* is a name none of whose content words shares its stem with any training caption.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping

import snowballstemmer

from imagen_jax.worlds.emoji import catalogue

FILE = pathlib.Path(__file__).parent / "other_names.tsv"
# Words without content in a name; every other word counts, also "person" and "face".
STOP_WORDS = frozenset(
    ("a", "an", "and", "as", "at", "be", "by", "for", "from", "in", "into", "is", "it", "not", "of")
    + ("off", "on", "or", "out", "over", "s", "the", "this", "to", "under", "up", "with", "without")
)


@dataclasses.dataclass(frozen=True)
class OtherName:
    """Another name of an emoji.

    Attributes:
      key: OpenMoji's hex code of the untoned emoji.
      name: the name, normalised.
      kind: "alias": what vendors call the emoji, with a word that its caption lacks; "short": what
        vendors call it, in fewer words of its caption; "flag": what vendors call a flag, the name
        of a country or region; "keyword": a keyword of CLDR.
      new_word: whether none of its content-word stems occurs in a training caption.
    """

    key: str
    name: str
    kind: str
    new_word: bool


def normalise(name: str) -> str:
    """Words in lower case, separated by single spaces; hyphens and underscores are spaces."""
    return " ".join(re.findall(r"[^\W_]+", name.lower().replace("'", "").replace("’", "")))


def stems(text: str) -> frozenset[str]:
    """Porter stems (snowball's English) of the content words of a text."""
    words = [word for word in normalise(text).split() if word not in STOP_WORDS]
    return frozenset(snowballstemmer.stemmer("english").stemWords(words))


def read() -> list[tuple[str, str, str]]:
    """Rows (key, name, source) of the file."""
    lines = FILE.read_text().splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return [(key, name, source) for key, name, source in rows]


def usable(captions: Mapping[str, str]) -> list[OtherName]:
    """The names of training emoji that are no training caption.

    Args:
      captions: caption of each training emoji, by OpenMoji's hex code.
    """
    known = {normalise(text) for text in captions.values()}
    seen = frozenset().union(*map(stems, captions.values()))
    return [
        OtherName(
            key=key,
            name=name,
            kind="flag" if catalogue.is_flag(key) else _kind(name, source, captions[key]),
            new_word=not stems(name) & seen,
        )
        for key, name, source in _unique(read())
        if key in captions and normalise(name) not in known
    ]


def _kind(name: str, source: str, caption: str) -> str:
    if source == "cldr":
        return "keyword"
    return "alias" if stems(name) - stems(caption) else "short"


def _unique(rows: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Rows whose name belongs to one emoji."""
    rows = list(rows)
    owners: dict[str, set[str]] = {}
    for key, name, _ in rows:
        owners.setdefault(normalise(name), set()).add(key)
    return [row for row in rows if len(owners[normalise(row[1])]) == 1]
