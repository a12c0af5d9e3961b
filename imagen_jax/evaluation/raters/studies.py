"""The paper's three human studies (Sec. 4.2 and 4.3) as data.

`drawbench`: two models' images of a prompt side by side, two questions, A / indifferent / B.
`photorealism`: a generated image beside the real one (COCO); 50% is indistinguishable.
`alignment`: one image and its caption, yes / somewhat / no, which count 100 / 50 / 0.
"""

from __future__ import annotations

import dataclasses
import re

CHOICE = (("left", "Left"), ("indifferent", "I am indifferent"), ("right", "Right"))
YES_NO = (("yes", "Yes"), ("somewhat", "Somewhat"), ("no", "No"))
# Value of an answer, 0..1; `left` and `right` are mapped to A and B first.
VALUE = {"A": 1.0, "indifferent": 0.5, "B": 0.0, "yes": 1.0, "somewhat": 0.5, "no": 0.0}


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and its answers: (value in the result file, text on the page)."""

    name: str
    text: str
    answers: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Study:
    """Layout of an item: images of both folders side by side, or a single image."""

    side_by_side: bool
    images_per_side: int  # at most
    shows_caption: bool
    questions: tuple[Question, ...]
    several: bool = False  # Whether one model can be compared with several.


STUDIES = {
    "drawbench": Study(
        side_by_side=True,
        images_per_side=8,
        shows_caption=True,
        questions=(
            Question("fidelity", "Which set of images is of higher quality?", CHOICE),
            Question(
                "alignment", "Which set of images better represents the text caption?", CHOICE
            ),
        ),
        several=True,
    ),
    "photorealism": Study(
        side_by_side=True,
        images_per_side=1,
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
        images_per_side=1,
        shows_caption=True,
        questions=(
            Question("description", "Does the caption accurately describe the image?", YES_NO),
        ),
    ),
}


def letters(count: int) -> list[str]:
    """The letters that stand for the folders of a study in its key: A, B, C, ..."""
    return [chr(ord("A") + index) for index in range(count)]


# The paper's list; it has "(sport) player" for "player".
_PEOPLE_WORDS = """
man men woman women person people child adult adults boy boys girl girls guy lady ladies someone
toddler player workers spectators
"""
PEOPLE = frozenset(_PEOPLE_WORDS.split())


def names_people(prompt: str) -> bool:
    """Whether a prompt has a word that the paper's no-people subset excludes."""
    return not PEOPLE.isdisjoint(re.findall(r"[a-z]+", prompt.lower()))
