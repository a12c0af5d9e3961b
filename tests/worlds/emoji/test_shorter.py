"""Shorter captions name one emoji, and are none of the names kept for scoring."""

import pytest

pytest.importorskip("snowballstemmer")
from imagen_jax.worlds.emoji import other_names, shorter

CAPTIONS = {
    "1": "flag of Japan",
    "2": "flag of Chad",
    "3": "black bird",
    "4": "black cat",
    "5": "family, man and boy",
    "6": "cat",
}


def test_the_words_left_name_one_emoji(monkeypatch):
    monkeypatch.setattr(other_names, "read", lambda: [("1", "Japan", "emoji")])
    found = shorter.shorter(CAPTIONS)
    assert set(found) == {"1", "2", "3", "5"}  # "black cat" holds all words of "cat".
    assert set(found["1"]) == {"flag Japan", "of Japan"}  # "Japan" is kept, "flag" is not clear.
    assert set(found["2"]) == {"Chad", "flag Chad", "of Chad"}
    assert set(found["3"]) == {"bird"}
    assert "and" not in found["5"]  # No content word.


def test_no_more_than_eight_and_the_same_ones_each_time():
    found = shorter.shorter(CAPTIONS)
    assert len(found["5"]) == shorter.MOST == len(set(found["5"]))
    assert found == shorter.shorter(dict(reversed(CAPTIONS.items())))
    for text in found["5"]:
        words = iter(CAPTIONS["5"].replace(",", "").split())
        assert all(word in words for word in text.replace(",", "").split()), text


def test_of_the_emoji_none_is_another_name_or_caption():
    catalogue = pytest.importorskip("imagen_jax.worlds.emoji.catalogue")
    captions = {e.key: e.caption for e in catalogue.entries() if not e.tone}
    texts = [text for found in shorter.shorter(captions).values() for text in found]
    assert len(texts) > 1_000
    normal = {other_names.normalise(text) for text in texts}
    assert not normal & {other_names.normalise(name) for _, name, _ in other_names.read()}
    assert not normal & {other_names.normalise(e.caption) for e in catalogue.entries()}
