"""Captions, splits and other names: what needs no package beyond the framework's own."""

import collections

import pytest

from imagen_jax.worlds.emoji import attribution, captions, splits


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (":woman_astronaut_medium-dark_skin_tone:", "woman astronaut, medium-dark skin tone"),
        (":thumbs_up_light_skin_tone:", "thumbs up, light skin tone"),
        (":thumbs_up:", "thumbs up"),
        (":man_medium_skin_tone_bald:", "bald man, medium skin tone"),
        (":woman_medium-light_skin_tone_red_hair:", "woman with red hair, medium-light skin tone"),
        (":person_beard:", "person with a beard"),
        (":person_getting_haircut:", "person getting haircut"),
        (":kissing_face:", "kissing face"),
        (":couple_with_heart:", "couple with heart"),
        (":family_man_woman_girl_boy:", "family, man, woman, girl and boy"),
        (
            ":kiss_woman_man_dark_skin_tone_light_skin_tone:",
            "kiss, woman and man, dark skin tone and light skin tone",
        ),
        (
            ":kiss_person_person_medium_skin_tone_light_skin_tone:",
            "kiss, medium skin tone and light skin tone",
        ),
        (":eight_o’clock:", "eight o'clock"),
        (":light_bulb:", "light bulb"),
        (":Mrs._Claus_dark_skin_tone:", "Mrs. Claus, dark skin tone"),
    ],
)
def test_a_caption_is_what_a_person_would_write(name, expected):
    assert captions.caption(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (":Japan:", "flag of Japan"),
        (":United_States:", "flag of the United States"),
        (":Bosnia_&_Herzegovina:", "flag of Bosnia and Herzegovina"),
        (":Cook_Islands:", "flag of the Cook Islands"),
        (":Hong_Kong_SAR_China:", "flag of Hong Kong"),
    ],
)
def test_flags_are_of_a_place(name, expected):
    assert captions.caption(name, is_flag=True) == expected


@pytest.mark.parametrize(
    ("name", "tone", "person"),
    [
        (":woman_astronaut_medium-dark_skin_tone:", "medium-dark", "woman astronaut"),
        (":man_light_skin_tone_curly_hair:", "light", "man with curly hair"),
        (":handshake_dark_skin_tone_medium_skin_tone:", "dark+medium", "handshake"),
        (":rocket:", "", "rocket"),
    ],
)
def test_tone_and_person_of_a_name(name, tone, person):
    assert captions.tone(name) == tone
    assert captions.person(captions.caption(name)) == person


def test_only_emoji_of_one_tone_are_held_out():
    keys = [f"1F{number:03X}" for number in range(2000)]
    assert {splits.split(key, "") for key in keys} == {"train"}
    assert {splits.split(key, "light+dark") for key in keys} == {"train"}


def test_at_most_one_tone_of_a_person_is_in_each_held_out_split():
    persons, counts = 2000, collections.Counter()
    for key in (f"1F{number:03X}" for number in range(persons)):
        found = [(tone, splits.split(key, tone)) for tone in captions.TONES]
        held_out = [(split, tone) for tone, split in found if split != "train"]
        assert len(dict(held_out)) == len(held_out) <= 2
        counts.update(held_out)
    for split, share in splits.COMBINATIONS.items():
        for tone in captions.TONES:  # Each tone as often as every other.
            expected = share / len(captions.TONES)
            deviation = (expected * (1 - expected) / persons) ** 0.5
            assert abs(counts[split, tone] / persons - expected) < 4 * deviation


def test_attribution_names_author_licence_and_changes():
    for part in ("OpenMoji", "CC BY-SA 4.0", "Changes", "Unicode"):
        assert part in attribution.ATTRIBUTION
