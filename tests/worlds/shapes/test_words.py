"""Words are rendered as spelled; held-out words share only letters with training."""

import collections

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from imagen_jax.worlds.shapes import letters, outlines
from imagen_jax.worlds.shapes import scenes as shapes
from imagen_jax.worlds.shapes import words as shapes_words


def _word(scene):
    return "".join(thing.shape for thing in scene.objects)


@pytest.fixture(scope="module")
def scenes():
    return {
        split: [shapes_words.scene(split, i) for i in range(400)] for split in ("train", "held_out")
    }


def test_a_scene_depends_on_its_split_and_index_alone(scenes):
    assert shapes_words.scene("train", 7) == scenes["train"][7]
    with pytest.raises(shapes.ShapesError, match="split='test'"):
        shapes_words.scene("test", 0)
    with pytest.raises(shapes.ShapesError, match="index=-1"):
        shapes_words.scene("train", -1)


def test_held_out_words_are_absent_from_training_and_their_letters_are_not(scenes):
    words = {split: {_word(scene) for scene in found} for split, found in scenes.items()}
    assert not words["train"] & words["held_out"]
    for place in range(3):
        seen = {word[place] for word in words["train"]}
        assert seen >= {word[place] for word in words["held_out"]}
    everything = [
        a + b + c
        for a in shapes_words.CONSONANTS
        for b in shapes_words.VOWELS
        for c in shapes_words.CONSONANTS
    ]
    assert np.mean([shapes_words.is_held_out(word) for word in everything]) == pytest.approx(1 / 6)


def test_captions_and_paraphrases_say_the_word_and_its_colour(scenes):
    for index, scene in enumerate(scenes["train"][:100]):
        word, color = _word(scene).lower(), scene.objects[0].color
        captions = shapes_words.paraphrases("train", index)
        assert captions[0] == scene.caption and len(captions) == shapes.PARAPHRASES
        assert f'"{word}"' in scene.caption
        for text in captions:
            assert color in text
            spelled = all(
                f'{n} "{letter}"' in text
                for n, letter in zip(("first", "second", "third"), word, strict=True)
            )
            assert f'"{word}"' in text or spelled


def test_no_paraphrase_of_training_has_a_held_out_word():
    held_out = {_word(shapes_words.scene("held_out", i)).lower() for i in range(300)}
    for index in range(300):
        for text in shapes_words.paraphrases("train", index):
            assert not held_out & set(text.replace('"', " ").split())


def test_letters_are_separate_inside_the_image_and_of_one_colour(scenes):
    for scene in scenes["train"][:60]:
        image = shapes.render(scene)
        lit = np.abs(image.astype(int) - shapes.BACKGROUND).sum(-1) > 0
        margin = int(shapes.MARGIN) - 1
        assert not lit[:margin].any() and not lit[-margin:].any()
        assert not lit[:, :margin].any() and not lit[:, -margin:].any()
        columns = np.abs(image.astype(int) - shapes.BACKGROUND).sum(-1).max(0) > 60
        runs = np.count_nonzero(np.diff(columns.astype(int)) == 1)
        assert runs == 3, scene.caption
        centre = image[lit].astype(int)
        color = np.array(shapes.COLORS[scene.objects[0].color])
        assert (np.abs(centre - color).sum(-1) < 3).mean() > 0.4


def test_letters_equal_the_font():
    """The distance field, rendered large, equals the glyph of Pillow."""
    radius, side = 60.0, 200
    finer = 4  # Pillow fits outlines to whole pixels.
    font = ImageFont.truetype(str(letters.FONT), round(finer * 2 * radius * 2048 / 1493))
    at = np.arange(side) + 0.5 - side / 2
    for letter in letters.LETTERS:
        ours = outlines.coverage(letter, radius, at[None, :], at[:, None])
        sheet = Image.new("L", (finer * side, finer * side))
        foot = finer * side / 2, finer * (side / 2 + radius)
        ImageDraw.Draw(sheet).text(foot, letter, fill=255, font=font, anchor="ms")
        theirs = np.asarray(sheet.reduce(finer)) / 255
        assert np.abs(ours - theirs).mean() < 0.01, letter
        assert np.abs(ours - theirs).sum() / theirs.sum() < 0.04, letter


def test_larger_images_show_the_same_scene(scenes):
    for scene in scenes["train"][:10]:
        small, large = (shapes.render(scene, size) for size in (64, 256))
        again = np.asarray(Image.fromarray(large).resize((64, 64), Image.Resampling.BOX))
        assert np.abs(again.astype(int) - small).mean() < 1.0


def test_prompt_rows_determine_a_scene(scenes):
    rng = np.random.default_rng(0)
    places = collections.Counter()
    for scene in scenes["held_out"][:40]:
        row = shapes.prompt_row(scene)
        again = shapes.scene_from_row(row, rng)
        assert [(t.shape, t.color, t.size) for t in again.objects] == [
            (t.shape, t.color, t.size) for t in scene.objects
        ]
        places[again.objects[0].y] += 1
    assert len(places) > 20
    four = [shapes.Object("A", "red", "large")] * 4
    with pytest.raises(shapes.ShapesError, match="4 letters do not fit"):
        shapes.place_word(four, rng)
