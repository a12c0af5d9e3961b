"""The oracle encoder parses every caption of the shapes world."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from imagen_jax.config.fields import ConfigError
from imagen_jax.config.text import TextConfig
from imagen_jax.inference.cascade import Cascade
from imagen_jax.stages.folder import write_stage
from imagen_jax.text import encoders
from imagen_jax.worlds.shapes import oracle_encoder, scenes


def said(scene):
    """The content of a scene's caption: unordered objects, names as in GROUPS."""
    named = scene.sizes_named
    if scene.relation:
        word = scene.relation.word
        pair = scene.objects[scene.relation.first], scene.objects[scene.relation.second]
        places = (word, scenes.OPPOSITE[word])
        things = [(o, "1", place) for o, place in zip(pair, places, strict=True)]
    else:
        things = [(scene.objects[0], str(len(scene.objects)), "")]
    return {(o.color, o.shape, o.size if named else "", n, place) for o, n, place in things}


def read(caption):
    order = ("color", "shape", "size", "number", "place")
    return {tuple(thing[group] for group in order) for thing in oracle_encoder.read(caption)}


def placed(text):
    """The content of a text of `pretrain_text`: "left red cross and then right ..."."""
    words = {word.split()[0]: word for word in scenes.RELATIONS}
    things = set()
    for half in text.rstrip(".").split(" and then "):
        half = half.split()
        side = half.pop(0) if half[0] in words else half.pop()
        *size, color, shape = half
        things.add((color, shape, "".join(size), "1", words[side]))
    return things


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_captions_and_paraphrases_are_parsed(split):
    for index in range(300):
        scene = scenes.scene(split, index)
        captions = scenes.paraphrases(split, index)
        assert captions[0] == scene.caption and len(captions) == scenes.PARAPHRASES
        for caption in captions:
            understood = placed(caption) if " and then " in caption else read(caption)
            assert understood == said(scene), caption


def test_names_equal_those_of_the_world():
    groups = oracle_encoder.GROUPS
    assert groups["color"] == tuple(scenes.COLORS) and groups["shape"] == scenes.SHAPES
    assert groups["size"][1:] == tuple(scenes.SIZES) and groups["place"][1:] == scenes.RELATIONS


def test_vectors_are_one_per_object_and_all_different():
    encoder = encoders.load_text_encoder(TextConfig(encoder="shapes_oracle", max_len=8))
    captions = ["a red cross", "a blue cross", "two red crosses", "a red cross above a blue cross"]
    batch = encoder.tokenize([*captions, ""])
    assert batch.mask.sum(1).tolist() == [2, 2, 2, 3, 1] and not batch.truncated
    vectors = np.asarray(encoder.encode(batch.ids, batch.mask))
    assert vectors.shape == (5, 8, encoder.dim) and not vectors[~batch.mask].any()
    objects = np.stack([*vectors[:3, 0], *vectors[3, :2]])
    np.testing.assert_allclose(np.square(objects).mean(1), 1, rtol=1e-6)
    distance = np.square(objects[:, None] - objects).sum(-1)
    assert (distance[~np.eye(5, dtype=bool)] > 1).all()


def test_too_short_a_length_is_rejected():
    with pytest.raises(ConfigError, match=r"config.text.max_len=2 must be at least 3"):
        encoders.load_text_encoder(TextConfig(encoder="shapes_oracle", max_len=2))


def test_a_stage_folder_that_names_the_encoder_loads(base_config, random_params, tmp_path):
    model = dataclasses.replace(base_config.model, text_dim=oracle_encoder.DIM)
    text = TextConfig(encoder="shapes_oracle", max_len=8)
    config = dataclasses.replace(base_config, model=model, text=text)
    write_stage(tmp_path / "base", random_params(config), config, {})
    saved = json.loads((tmp_path / "base" / "config.json").read_text())
    assert saved["text"]["encoder"] == "shapes_oracle"
    cascade = Cascade.load([str(tmp_path / "base")])
    emb, mask = cascade.embed(["a red cross above a blue cross"])
    assert emb.shape[2] == oracle_encoder.DIM and mask.sum() == 3
