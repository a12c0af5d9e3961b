"""io/fonts.py: captions in other letters than Latin."""

import importlib.util

import pytest

from imagen_jax.io import fonts

MISSING = "\uffff"


@pytest.mark.parametrize("letter", ["\u2014", "\u00e9", "\u0416", "\u03a9", "\u2019"])
def test_letters_of_captions_are_drawn(letter):
    """A dash, an accent, Cyrillic, Greek and a typographic apostrophe are no empty boxes."""
    pytest.importorskip("matplotlib")
    font = fonts.label_font(12)
    assert bytes(font.getmask(letter)) != bytes(font.getmask(MISSING))


def test_without_matplotlib_there_is_still_a_font(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert fonts.label_font(12).getlength("abc") > 0
