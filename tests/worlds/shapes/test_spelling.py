"""The scorer reads words, also noisy or blurred, and rejects every wrong letter."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageFilter

from imagen_jax.evaluation.samples import EvaluationError
from imagen_jax.worlds.shapes import alignment, scenes, words
from tests.reference import scene_samples

SCENES = [words.scene("held_out", index) for index in range(24)]


def _marks(image, scene):
    return alignment.score(image, scenes.prompt_row(scene))


def _blurred(image):
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.4)))


def _noisy(image):
    noise = np.random.default_rng(0).normal(0, 6, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("degrade", [np.asarray, _blurred, _noisy])
def test_real_words_pass(degrade):
    found = [_marks(degrade(scenes.render(scene)), scene)["exact"] for scene in SCENES]
    assert np.mean(found) >= 0.95


def test_every_letter_is_classified():
    rng = np.random.default_rng(0)
    for word in ("ABC", "DEF", "GHI", "JKL", "MNO", "PRS", "TUV", "WXY", "ZOD"):
        letters = [scenes.Object(letter, "red", "large") for letter in word]
        scene = scenes.Scene("word", scenes.place_word(letters, rng), None, "", False)
        assert _marks(scenes.render(scene), scene)["shape"], word


def _replaced(scene, at, **changes):
    objects = list(scene.objects)
    objects[at] = dataclasses.replace(objects[at], **changes)
    return dataclasses.replace(scene, objects=tuple(objects))


def test_each_error_fails_its_attribute():
    rng = np.random.default_rng(1)
    for scene in SCENES[:8]:
        at, old = int(rng.integers(3)), {thing.shape for thing in scene.objects}
        letter = str(rng.choice([c for c in words.CONSONANTS if c not in old]))
        wrong = _marks(scenes.render(_replaced(scene, at, shape=letter)), scene)
        assert wrong["colour"] and not (wrong["spelling"] or wrong["shape"] or wrong["exact"])
        color = next(c for c in scenes.COLORS if c != scene.objects[0].color)
        mixed = _marks(scenes.render(_replaced(scene, at, color=color)), scene)
        assert mixed["spelling"] and not (mixed["colour"] or mixed["exact"])
        two = dataclasses.replace(scene, objects=scene.objects[:2])
        short = _marks(scenes.render(two), scene)
        assert not (short["spelling"] or short["count"])
        up = _marks(scenes.render(_replaced(scene, 1, y=scene.objects[1].y + 5)), scene)
        assert up["binding"] and not (up["spelling"] or up["exact"])


def test_a_reversed_word_has_all_letters_and_wrong_spelling():
    for scene in SCENES[:8]:
        reversed_objects = tuple(
            dataclasses.replace(thing, shape=other.shape)
            for thing, other in zip(scene.objects, scene.objects[::-1], strict=True)
        )
        marks = _marks(scenes.render(dataclasses.replace(scene, objects=reversed_objects)), scene)
        same = scene.objects[0].shape == scene.objects[2].shape
        assert marks["binding"] and marks["spelling"] == marks["exact"] == same


def test_a_folder_of_words_is_scored(tmp_path):
    rendered = [scenes.render(scene) for scene in SCENES]
    rendered[:6] = [np.zeros_like(rendered[0])] * 6
    scene_samples.write(tmp_path, SCENES, rendered)
    tally = alignment.evaluate(tmp_path)["kinds"]["word"]
    assert tally["scores"]["spelling"]["mean"] == tally["scores"]["exact"]["mean"] == 0.75
    assert tally["ceiling"]["exact"]["mean"] >= 0.95 and tally["chance"]["exact"]["mean"] < 0.2


def test_a_word_with_a_shape_is_rejected(tmp_path):
    scene = _replaced(SCENES[0], 0, shape="circle")
    scene_samples.write(tmp_path, [scene], [scenes.render(SCENES[0])])
    with pytest.raises(EvaluationError, match="shape='circle'"):
        alignment.evaluate(tmp_path)
