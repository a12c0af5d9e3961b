"""Writes the tables of the emoji world: groups, and other names with their sources.

    npm pack emoji-datasource-google@16.0.0 emojibase-data@17.0.0 emojilib@4.0.3
    for archive in *.tgz; do mkdir ${archive%.tgz}; tar xzf $archive -C ${archive%.tgz}; done
    python benchmarks/emoji_other_names.py FOLDER_OF_THE_ARCHIVES

Aliases: of package `emoji`, with its names of countries, and short names of emoji-datasource,
emojibase and JoyPixels (by way of emojibase). They hold letters only, no fragment of fewer than
three, neither "black", "white" or "heavy" (outlines, in vendors' names) nor "family" (letters for
its members). They have a word that the emoji's caption lacks, or fewer words. Keywords: Unicode's
CLDR annotations (emojibase) with a word that the caption lacks, which belong to one emoji only and,
by emojilib's independent list, to the same one only. A name belongs to one emoji and is no caption.
What a reader then removed is in emoji_other_names.txt. The world itself reads the tables alone.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
from collections.abc import Iterator

import emoji

from imagen_jax.io import atomic
from imagen_jax.worlds.emoji import catalogue, other_names

DATASOURCE = "emoji-datasource-google-16.0.0/package/emoji.json"
EMOJIBASE = "emojibase-data-17.0.0/package"
EMOJILIB = "emojilib-4.0.3/package/dist/emoji-en-US.json"
REMOVED = pathlib.Path(__file__).with_suffix(".txt")
COMPONENTS = 2  # Emojibase's number of Unicode's group of skin tones and hair.
MISLEADING = {"black", "white", "heavy", "family"}
GROUPS_HEAD = """\
# Group, subgroup and emoji (hex codes without tones and variation selectors) of Unicode 17's
# emoji-test.txt, Unicode License v3, by way of the npm package emojibase-data 17.0.0 (MIT).
# Written by benchmarks/emoji_other_names.py.
"""
NAMES_HEAD = """\
# Other names of emoji: OpenMoji's hex code, name, sources. Written and chosen by
# benchmarks/emoji_other_names.py.
#   emoji             aliases of the PyPI package emoji 2.16.0 (BSD)
#   emoji-datasource  short names of the npm package emoji-datasource-google 16.0.0 (MIT)
#   emojibase         short codes of the npm package emojibase-data 17.0.0 (MIT)
#   joypixels         JoyPixels' short codes, by way of emojibase-data (MIT)
#   cldr              keywords of Unicode's CLDR (Unicode License v3), by way of emojibase-data;
#                     those that emojilib 4.0.3 (MIT) has for the same emoji alone
"""

Rows = Iterator[tuple[str, str, str]]


def main() -> None:
    """Writes both tables into the package."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, help="with the unpacked npm packages")
    folder = parser.parse_args().folder
    atomic.write_text(catalogue.GROUPS_FILE, GROUPS_HEAD + "".join(groups(folder)))
    lines = ["\t".join(row) + "\n" for row in chosen([*aliases(folder), *keywords(folder)])]
    atomic.write_text(other_names.FILE, NAMES_HEAD + "".join(lines))


def groups(folder: pathlib.Path) -> list[str]:
    """Lines of groups.tsv."""
    titles = json.loads((folder / EMOJIBASE / "meta/groups.json").read_text())
    found: dict[tuple[int, int], list[str]] = {}
    for data in json.loads((folder / EMOJIBASE / "en/data.json").read_text()):
        if data.get("group", COMPONENTS) != COMPONENTS:
            keys = found.setdefault((data["group"], data["subgroup"]), [])
            keys.append(catalogue.plain_key(data["hexcode"]))
    return [
        f"{titles['groups'][str(group)]}\t{titles['subgroups'][str(sub)]}\t{' '.join(keys)}\n"
        for (group, sub), keys in sorted(found.items())
    ]


def aliases(folder: pathlib.Path) -> Rows:
    """Rows (hex code, name, source) of names that vendors use."""
    for sequence, data in emoji.EMOJI_DATA.items():
        if data["status"] == catalogue.FULLY_QUALIFIED:
            country = [data["en"]] if catalogue.is_flag(_hex(sequence)) else []
            names = [*data.get("alias", ()), *country]
            yield from ((_hex(sequence), name, "emoji") for name in names)
    for data in json.loads((folder / DATASOURCE).read_text()):
        yield from ((data["unified"], name, "emoji-datasource") for name in data["short_names"])
    for source in ("emojibase", "joypixels"):
        codes = json.loads((folder / EMOJIBASE / f"en/shortcodes/{source}.json").read_text())
        for key, names in codes.items():
            names = [names] if isinstance(names, str) else names
            yield from ((key, name, source) for name in names)


def keywords(folder: pathlib.Path) -> Rows:
    """Rows (hex code, keyword, "cldr") of keywords of one emoji only, in two lists."""
    cldr: dict[str, set[str]] = {}
    for data in json.loads((folder / EMOJIBASE / "en/data.json").read_text()):
        for word in data.get("tags", ()):
            cldr.setdefault(other_names.normalise(word), set()).add(_bare(data["hexcode"]))
    second: dict[str, set[str]] = {}
    for sequence, words in json.loads((folder / EMOJILIB).read_text()).items():
        for word in words:
            second.setdefault(other_names.normalise(word), set()).add(_bare(_hex(sequence)))
    for word, keys in cldr.items():
        if len(keys) == 1 and second.get(word) == keys:
            yield next(iter(keys)), word, "cldr"


def chosen(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Rows that pass the rules of the head of this file, sorted; sources joined by commas."""
    entries = {_bare(entry.key): entry for entry in catalogue.entries() if not entry.tone}
    taken = {other_names.normalise(entry.caption) for entry in catalogue.entries()}
    taken |= {other_names.normalise(name) for name in _unicode_names()} | _removed()
    found: dict[str, dict[str, list[str]]] = {}
    for key, name, source in rows:
        entry, name = entries.get(_bare(key)), other_names.normalise(name)
        if not entry or name in taken or not _is_phrase(name):
            continue
        words, known = other_names.stems(name), other_names.stems(entry.caption)
        if words - known or (source != "cldr" and words and words < known):
            sources = found.setdefault(name, {}).setdefault(entry.key, [])
            sources.extend({source} - set(sources))
    one = [(*keys.popitem(), name) for name, keys in found.items() if len(keys) == 1]
    unique: dict[tuple, tuple[str, str, str]] = {}
    for key, sources, name in one:  # Aliases come first, so that a keyword is not their repetition.
        source = ",".join(name for name in sources if name != "cldr" or len(sources) == 1)
        unique.setdefault((key, other_names.stems(name)), (key, name, source))
    return sorted(unique.values())


def _unicode_names() -> Iterator[str]:
    """Names that captions say in other words; a country is another name of its flag."""
    for sequence, data in emoji.EMOJI_DATA.items():
        if not catalogue.is_flag(_hex(sequence)):
            yield data["en"]


def _is_phrase(name: str) -> bool:
    words = name.split()
    short = [word for word in words if len(word) < 3 and word not in other_names.STOP_WORDS]
    return bool(re.fullmatch("[a-z ]+", name)) and not short and not MISLEADING & set(words)


def _removed() -> set[str]:
    lines = [line for line in REMOVED.read_text().splitlines() if not line.startswith("#")]
    return {name.strip() for name in " ".join(lines).split(",")}


def _hex(sequence: str) -> str:
    return "-".join(f"{ord(character):04X}" for character in sequence)


def _bare(key: str) -> str:
    return key.upper().replace(f"-{catalogue.VARIATION}", "")


if __name__ == "__main__":
    main()
