"""Encodings of short texts: imagen_jax.io.encodings against charset-normalizer (docs/decisions.md).

    .venv/bin/python benchmarks/caption_encodings.py [--repeats=4]

Groups of names of countries and languages, from the CLDR (the package babel), in an encoding of
their language that is not Unicode. charset-normalizer gets the joined names of a group and the same
encodings to choose from. Prints the shares of names that are read wrongly; of ours also those of
them that are not reported as uncertain. charset-normalizer reports nothing as uncertain.
"""

from __future__ import annotations

import argparse
import random

import babel
import charset_normalizer

from imagen_jax.io import encodings

LANGUAGES = {
    "cp1252": "fr de es pt it sv da fi nl",
    "cp1250": "pl cs hu ro hr",
    "cp1251": "ru uk bg",
    "cp1253": "el",
    "cp1254": "tr",
    "cp1255": "he",
    "cp1256": "ar",
    "cp1257": "lt lv et",
    "cp874": "th",
    "cp932": "ja",
    "cp949": "ko",
    "gb18030": "zh",
}
SIZES = (1, 3, 10, 30)


def names_in(language: str, encoding: str) -> list[str]:
    """Names that the encoding can write and ASCII cannot."""
    locale = babel.Locale.parse(language)
    found = dict.fromkeys([*locale.territories.values(), *locale.languages.values()])
    return [name for name in found if not name.isascii() and _has(name, encoding)]


def _has(name: str, encoding: str) -> bool:
    try:
        return name.encode(encoding).decode(encoding) == name
    except UnicodeError:
        return False


def ours(texts: list[bytes]) -> list[tuple[str, bool]]:
    """Each text, "" where the encoding is unknown, and whether it is reported as uncertain."""
    return [
        (text.decode(guess.name) if guess.name else "", bool(guess.other or not guess.name))
        for text, guess in zip(texts, encodings.detect(texts), strict=True)
    ]


def library(texts: list[bytes]) -> list[tuple[str, bool]]:
    """The same by charset-normalizer, of all texts joined."""
    joined = b"\n".join(texts)
    best = charset_normalizer.from_bytes(joined, cp_isolation=list(encodings.LANGUAGES)).best()
    if best is None:
        return [("", True)] * len(texts)
    return [(text.decode(best.encoding, "replace"), False) for text in texts]


def measure(language: str, encoding: str, *, size: int, repeats: int) -> dict[str, list[int]]:
    """Numbers of names read wrongly, and of these not reported as uncertain, by method.

    Args:
      language, encoding: of all groups.
      size: names of a group.
      repeats: groups.
    """
    rng = random.Random(f"{language} {size}")
    pool = names_in(language, encoding)
    found = {"ours": [0, 0], "library": [0, 0]}
    for _ in range(repeats):
        group = rng.sample(pool, min(size, len(pool)))
        for method, read in (("ours", ours), ("library", library)):
            texts = read([name.encode(encoding) for name in group])
            for name, (text, uncertain) in zip(group, texts, strict=True):
                found[method][0] += text != name
                found[method][1] += text != name and not uncertain
    return found


def main() -> None:
    """Prints a row per language as it is finished, and the sums."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=4)
    flags = parser.parse_args()
    print("| language | encoding | names | wrong | not reported | charset-normalizer: wrong |")
    print("|---|---|---|---|---|---|")
    sums = {size: [0, 0, 0, 0] for size in SIZES}
    for encoding, languages in LANGUAGES.items():
        for language in languages.split():
            count = min(30, len(names_in(language, encoding)))
            for size in SIZES:
                found = measure(language, encoding, size=size, repeats=flags.repeats)
                row = [flags.repeats * min(size, count), *found["ours"], found["library"][0]]
                sums[size] = [a + b for a, b in zip(sums[size], row, strict=True)]
                total, wrong, silent, other = row
                print(
                    f"| {language} | {encoding} | {size} | {wrong / total:.2f} "
                    f"| {silent / total:.2f} | {other / total:.2f} |",
                    flush=True,
                )
    for size, (total, wrong, silent, other) in sums.items():
        shares = " | ".join(f"{part / total:.3f}" for part in (wrong, silent, other))
        print(f"| all | all | {size} | {shares} |")


if __name__ == "__main__":
    main()
