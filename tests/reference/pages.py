"""Parses the Markdown pages for the tests: code blocks with their marks, and commands.

A block of shell or Python has a mark in the line above its fence, invisible on the rendered page:

    <!-- run -->            tests/docs/test_run.py runs it on small data
    <!-- tested: TEST -->   the test PATH or PATH::NAME covers it
    <!-- needs: WHAT -->    it needs hardware, weights or a network that no test has
"""

from __future__ import annotations

import pathlib
import re
import shlex
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "examples").glob("*.md"))
# Languages of blocks that a reader runs; the others show files or output.
TYPED = ("bash", "python")
SHOWN = ("text", "json", "{toctree}")


class Block(NamedTuple):
    """A fenced block.

    Attributes:
      page: path of the page, relative to the root of the repository.
      line: line of the fence.
      language: first word after the fence.
      kind: run, tested or needs; "" without a mark.
      about: text of the mark.
      code: lines of the block.
    """

    page: str
    line: int
    language: str
    kind: str
    about: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: pathlib.Path) -> list[Block]:
    """All fenced blocks of a page."""
    found, lines = [], page.read_text().splitlines()
    rows = iter(enumerate(lines, 1))
    for number, line in rows:
        fence = re.match(r"\s*(```+|~~~+)\s*(\S*)", line)
        if not fence:
            continue
        code = []
        for _, inner in rows:
            if inner.strip().startswith(fence[1]):
                break
            code.append(inner)
        mark = re.fullmatch(r"\s*<!-- (run|tested|needs)(?:: (.+))? -->", lines[number - 2])
        kind, about = (mark[1], mark[2] or "") if mark and number > 1 else ("", "")
        name = str(page.relative_to(ROOT))
        found.append(Block(name, number, fence[2], kind, about, "\n".join(code)))
    return found


def commands(code: str) -> list[list[str]]:
    """The commands of a shell block, each as a list of words, without variable assignments."""
    joined = re.sub(r"\\\n\s*", " ", code)
    found, pending = [], ""
    for line in joined.splitlines():
        pending += line
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # A quotation continues on the next line.
            pending += "\n"
            continue
        pending = ""
        if words and not re.match(r"\w+=", words[0]):
            found.append(words)
    return found


def settings(code: str) -> str:
    """The lines of a block of shell that set variables."""
    return "\n".join(line for line in code.splitlines() if re.match(r"\w+=", line))


def arguments_of_imagen(words: list[str]) -> list[str] | None:
    """The arguments of `imagen` in a command, verb first; None for other commands."""
    for index, word in enumerate(words):
        if word in ("$imagen", "imagen"):
            return words[index + 1 :]
        if word == "imagen_jax" and words[index - 1] == "-m":
            return words[index + 1 :]
    return None


ALL = [block for page in PAGES if page.exists() for block in blocks(page)]
