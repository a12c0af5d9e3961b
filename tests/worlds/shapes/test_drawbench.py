"""Every category tests its subject, and real images of its rows pass."""

import pathlib

import numpy as np
import pytest

from imagen_jax.evaluation import drawbench
from imagen_jax.inference import prompts
from imagen_jax.worlds.shapes import alignment, scenes
from imagen_jax.worlds.shapes import drawbench as shapes_drawbench
from imagen_jax.worlds.shapes import words as shapes_words

FILE = pathlib.Path(__file__).parents[3] / "configs" / "drawbench_shapes.jsonl"


@pytest.fixture(scope="module")
def rows():
    return shapes_drawbench.rows()


def _of(rows, category):
    return [row for row in rows if row["category"] == category]


def _scene(row):
    return scenes.scene_from_row(row, np.random.default_rng(0))


def test_the_bundled_file_equals_the_function(rows, tmp_path):
    assert drawbench.read_prompts(str(FILE)) == rows
    shapes_drawbench.write(str(tmp_path / "again.jsonl"))
    assert prompts.read(str(tmp_path / "again.jsonl")) == rows


def test_categories_have_equal_sizes(rows):
    categories = {category: len(_of(rows, category)) for category in shapes_drawbench.CATEGORIES}
    assert (
        set(categories.values()) == {shapes_drawbench.PROMPTS_PER_CATEGORY} and len(categories) == 9
    )
    assert len(rows) == sum(categories.values())


def test_real_images_pass_and_those_of_other_prompts_fail(rows):
    rng = np.random.default_rng(0)
    some = rows[::4]
    right = [alignment.score(scenes.render(_scene(row)), row)["exact"] for row in some]
    assert np.mean(right) >= 0.98
    order = rng.permutation(len(some))
    wrong = [
        alignment.score(scenes.render(_scene(some[i])), r)["exact"]
        for i, r in zip(order, some, strict=True)
    ]
    assert np.mean(wrong) <= 0.1


def test_conflicting_counting_and_positional_are_held_out(rows):
    for category in ("Conflicting", "Counting", "Positional"):
        assert all(scenes.is_held_out(_scene(row)) for row in _of(rows, category)), category
    assert {len(row["objects"]) for row in _of(rows, "Counting")} == {2, 3, 4}
    assert {row["relation"]["word"] for row in _of(rows, "Positional")} == set(scenes.RELATIONS)
    named = {(t["shape"], t["color"]) for row in _of(rows, "Colors") for t in row["objects"]}
    assert len(named) == len(scenes.SHAPES) * len(scenes.COLORS)


def test_pairs_differ_in_the_roles_only(rows):
    pairs = _of(rows, "Gary Marcus et al.")
    for one, other in zip(pairs[::2], pairs[1::2], strict=True):
        assert one["objects"] == other["objects"][::-1] and one["relation"] == other["relation"]
        words = [sorted(row["prompt"].strip(".").split()) for row in (one, other)]
        assert [w for w in words[0] if w not in ("a", "an")] == [
            w for w in words[1] if w not in ("a", "an")
        ]


def test_misspellings_and_rare_words_are_unknown_words(rows):
    known = {word for i in range(400) for word in _words(scenes.scene("train", i).caption)}
    plain = {*scenes.COLORS, *scenes.SHAPES, *scenes.SIZES}
    for category in ("Misspellings", "Rare Words"):
        for row in _of(rows, category):
            words = set(_words(row["prompt"]))
            assert not words & plain and len(words - known) >= 3, row["prompt"]
    for row in _of(rows, "Descriptions"):
        assert len(_words(row["prompt"])) >= 14


def test_text_uses_held_out_words(rows):
    spelled = {"".join(t["shape"] for t in row["objects"]) for row in _of(rows, "Text")}
    assert all(map(shapes_words.is_held_out, spelled)) and len(spelled) > 20
    for row in _of(rows, "Text"):
        word = "".join(thing["shape"] for thing in row["objects"]).lower()
        assert f'"{word}"' in row["prompt"] and row["objects"][0]["color"] in row["prompt"]


def _words(text):
    return text.strip(".").replace(",", "").split()
