"""What raters are asked: the paper's three studies (section 4.2, 4.3) as data.

`drawbench`: a model's pictures of a prompt beside another's, two questions, A / indifferent / B.
`photorealism`: a drawn picture beside the original (COCO); 50% cannot be told apart.
`alignment`: one picture and its caption, yes / somewhat / no, which count 100 / 50 / 0.
"""

from __future__ import annotations

import dataclasses
import re

CHOICE = (("left", "Left"), ("indifferent", "I am indifferent"), ("right", "Right"))
YES_NO = (("yes", "Yes"), ("somewhat", "Somewhat"), ("no", "No"))
# What an answer counts, 0..1; `left` and `right` become A and B first.
VALUE = {"A": 1.0, "indifferent": 0.5, "B": 0.0, "yes": 1.0, "somewhat": 0.5, "no": 0.0}


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and its answers: (value in the result file, words on the page)."""

    name: str
    text: str
    answers: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Study:
    """What an item shows: pictures of both folders side by side, or one picture by itself."""

    side_by_side: bool
    pictures: int  # at most so many of a folder per item
    shows_caption: bool
    questions: tuple[Question, ...]


STUDIES = {
    "drawbench": Study(
        side_by_side=True,
        pictures=8,
        shows_caption=True,
        questions=(
            Question("fidelity", "Which set of images is of higher quality?", CHOICE),
            Question(
                "alignment", "Which set of images better represents the text caption?", CHOICE
            ),
        ),
    ),
    "photorealism": Study(
        side_by_side=True,
        pictures=1,
        shows_caption=False,
        questions=(
            Question(
                "photorealism",
                "Which image is more photorealistic (looks more real)?",
                (CHOICE[0], CHOICE[2]),
            ),
        ),
    ),
    "alignment": Study(
        side_by_side=False,
        pictures=1,
        shows_caption=True,
        questions=(
            Question("description", "Does the caption accurately describe the image?", YES_NO),
        ),
    ),
}

# The paper's list; "player" stands there as "(sport) player".
_PEOPLE_WORDS = """
man men woman women person people child adult adults boy boys girl girls guy lady ladies someone
toddler player workers spectators
"""
PEOPLE = frozenset(_PEOPLE_WORDS.split())


def names_people(prompt: str) -> bool:
    """Whether a prompt holds one of the words that the paper's no-people subset leaves out."""
    return not PEOPLE.isdisjoint(re.findall(r"[a-z]+", prompt.lower()))
