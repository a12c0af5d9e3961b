"""Captions: Unicode's English names as a person would write them.

Unicode's names (package `emoji`, ":woman_astronaut_medium-dark_skin_tone:") become a phrase of
words, commas and nothing else: "woman astronaut, medium-dark skin tone". Decisions:

- The case is Unicode's: lower case except for proper names ("flag of Japan", "ATM sign").
- The skin tone stands at the end, after a comma; two tones are joined by "and".
- Flags of countries and regions are "flag of ...", with "the" where English needs it.
- Hair is said as of a person: "man with red hair", "bald woman", "person with a beard".
- Those in a couple or family are listed: "kiss, woman and man", "family, man, woman and boy";
  two persons of unnamed gender are not.
- "&" is written "and", a curly apostrophe as a straight one.
"""

from __future__ import annotations

import re

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")

_TONE = re.compile(r" ?\b(medium-light|medium-dark|light|medium|dark) skin tone\b")
_HAIR = re.compile(r"(man|woman|person) (blond hair|curly hair|red hair|white hair|beard|bald)")
_GROUP = re.compile(
    r"(kiss|couple with heart|family)((?: (?:man|woman|person|adult|boy|girl|child))+)"
)
_ARTICLE = re.compile(
    r"United .*|(?!South Georgia|Heard).* Islands|.*Republic|.*Territor.*|Bahamas|Comoros|Gambia"
    r"|Isle of Man|Maldives|.*Netherlands|Philippines|European Union"
)


def caption(name: str, *, is_flag: bool = False) -> str:
    """The caption of an emoji.

    Args:
      name: Unicode's name as package `emoji` writes it (":woman_astronaut_dark_skin_tone:").
      is_flag: whether the emoji is the flag of a country or region, whose name is the place alone.
    """
    text = name.strip(":").replace("_", " ").replace("&", "and").replace("’", "'")
    tones = [f"{tone} skin tone" for tone in _TONE.findall(text)]
    text = _TONE.sub("", text)
    if is_flag:
        text = text.removesuffix(" SAR China")  # Of Hong Kong and Macao.
        text = f"flag of {'the ' if _ARTICLE.fullmatch(text) else ''}{text}"
    elif found := _HAIR.fullmatch(text):
        text = _hair(*found.groups())
    elif found := _GROUP.fullmatch(text):
        members = found[2].split()
        text = found[1] if members == ["person", "person"] else f"{found[1]}, {_listed(members)}"
    return ", ".join([text, " and ".join(tones)] if tones else [text])


def tone(name: str) -> str:
    """The skin tone in Unicode's name: one of TONES, two joined by "+" or, without one, ""."""
    return "+".join(_TONE.findall(name.strip(":").replace("_", " ")))


def person(text: str) -> str:
    """A caption without its skin tones."""
    return re.sub(r", [a-z-]+ skin tone( and [a-z-]+ skin tone)?$", "", text)


def _hair(person: str, hair: str) -> str:
    if hair == "bald":
        return f"bald {person}"
    return f"{person} with {'a ' if hair == 'beard' else ''}{hair}"


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
