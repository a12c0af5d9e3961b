"""Retrieval against independent computations: ranks, near-duplicates, yardsticks."""

import numpy as np
import pytest
from scipy import stats

from imagen_jax.evaluation.retrieval import ranks, scorer
from tests.reference.galleries import SIDE, noisy, tiles


def means(card, group="all", part="scores"):
    return {name: entry["mean"] for name, entry in card["kinds"][group][part].items()}


@pytest.mark.parametrize("side", [3, 20, 64])
def test_distances_are_the_exact_integers(side):
    rng = np.random.default_rng(0)
    a, b = (rng.integers(256, size=(n, side, side, 3)).astype(np.uint8) for n in (5, 7))
    a[0], b[0] = 0, 255  # The largest distance.
    exact = np.square(a[:, None].astype(np.int64) - b).sum((2, 3, 4))
    np.testing.assert_array_equal(ranks.squared_distances(a, b), exact)


def brute_rank(distances, answer_of, right):
    """From the definition: right answers against each of the others, one at a time."""
    by_answer = {}
    for distance, answer in zip(distances, answer_of, strict=True):
        by_answer[answer] = min(by_answer.get(answer, np.inf), distance)
    own = min(by_answer[answer] for answer in right)
    return 1 + sum(d <= own for answer, d in by_answer.items() if answer not in right)


def test_ranks_of_sets_of_answers_with_ties(monkeypatch):
    monkeypatch.setattr(ranks, "_BLOCK", 40)  # Several blocks.
    rng = np.random.default_rng(0)
    distances = rng.integers(12, size=(23, 17)).astype(float)
    answer_of = np.unique(rng.integers(11, size=17), return_inverse=True)[1]
    sets = [(0,), (3, 5), (1, 2, 6), (4,)]
    found = ranks.rank(23, distances.__getitem__, answer_of, sets)
    expected = [[brute_rank(row, answer_of, right) for right in sets] for row in distances]
    np.testing.assert_array_equal(found.ranks, expected)
    np.testing.assert_array_equal(found.nearest, distances.argmin(1))


@pytest.mark.parametrize("side", [5, 12, 20])
def test_near_duplicates_are_the_pairs_within_the_threshold_and_their_chains(side):
    rng = np.random.default_rng(side)
    base = rng.integers(20, 230, size=(side, side, 3)).astype(np.uint8)
    # 0, 1 and 2 differ by 3 levels in a row; 3 by 4 from 0; 4 equals 1; 5 differs in one pixel.
    gallery = np.stack([base, base + 3, base + 6, base - 4, base + 3, base])
    gallery[5, 0, 0] = 255 - gallery[5, 0, 0] // 2
    rms = np.sqrt(np.square(gallery[:, None].astype(float) - gallery).mean((2, 3, 4)))
    for threshold in (0.0, 2.9, 3.0, 4.0, 6.9, 7.0):
        reach = np.linalg.matrix_power(rms <= threshold, len(gallery)) > 0
        found = ranks.near_duplicates(gallery, threshold)
        np.testing.assert_array_equal(found[:, None] == found, reach)


def test_noisy_copies_are_right_and_shuffled_ones_are_not(write_gallery, write_folder):
    pixels = tiles(40)
    real = write_gallery(pixels)
    own = scorer.Retrieval(real, match="key")
    card = own.evaluate(write_folder(noisy(pixels)))
    assert means(card) == {"exact": 1, "top5": 1}
    # 39 other prompts: one image is nearest, five are among the nearest five, one of them its own.
    chance = means(card, part="chance")
    assert chance["exact"] == 0 and chance["top5"] == pytest.approx(4 / 39)
    shuffled = np.roll(noisy(pixels), 1, axis=0)
    card = own.evaluate(write_folder(shuffled, name="shuffled"))
    assert means(card)["exact"] == 0
    chance = means(card, part="chance")
    assert chance["exact"] == pytest.approx(1 / 39)
    assert [row["nearest"] for row in card["rows"]] == [
        f"{(i - 1) % 40:03d}.png" for i in range(40)
    ]


def test_rank_and_files_of_each_row_from_whole_distances(write_gallery, write_folder):
    pixels = tiles(15)
    mixed = noisy(0.5 * pixels + 0.5 * pixels[::-1], 30)
    card = scorer.Retrieval(write_gallery(pixels)).evaluate(write_folder(mixed))
    distances = np.square(mixed[:, None].astype(float) - pixels).sum((2, 3, 4))
    for i, row in enumerate(card["rows"]):
        assert row["rank"] == 1 + (distances[i] < distances[i, i]).sum()
        assert (
            row["nearest"] == f"{distances[i].argmin():03d}.png" and row["right"] == f"{i:03d}.png"
        )
    top1 = np.mean([row["rank"] == 1 for row in card["rows"]])
    assert 0 < top1 < 1 and means(card)["exact"] == pytest.approx(top1)


def test_the_ceiling_is_the_real_image_shifted_and_stored_as_jpeg(write_gallery, write_folder):
    # Stripes of one pixel: shifted, each is the other.
    stripes = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    stripes[0, :, ::2] = stripes[1, :, 1::2] = 255
    pixels = np.concatenate([stripes, tiles(4)])
    card = scorer.Retrieval(write_gallery(pixels)).evaluate(write_folder(pixels))
    assert means(card)["exact"] == 1
    assert means(card, part="ceiling")["exact"] == pytest.approx(4 / 6)
    grey = pixels[3][..., :1].repeat(3, axis=-1)  # JPEG halves the resolution of colours.
    shifted = np.roll(grey, 1, axis=1)
    shifted[:, 0] = grey[:, 0]
    assert 0 < np.abs(scorer.degrade(grey).astype(int) - shifted).mean() < 8


def test_near_duplicates_are_one_answer(write_gallery, write_folder):
    pixels = tiles(8)
    pixels[1] = np.where(pixels[0] < 255, pixels[0] + 1, 254)
    mixed = pixels.copy()
    mixed[0] = pixels[1]
    real, own = write_gallery(pixels), write_folder(mixed)
    card = scorer.Retrieval(real, match="key").evaluate(own)
    assert card["gallery"]["images"] == 8 and card["gallery"]["answers"] == 7
    assert means(card)["exact"] == 1 and card["rows"][0]["nearest"] == "001.png"
    card = scorer.Retrieval(real, match="key", near_duplicate=0.5).evaluate(own)
    assert means(card)["exact"] == 7 / 8 and card["rows"][0]["rank"] == 2


def test_an_image_without_content_is_never_right(write_gallery, write_folder):
    """Equally far from all: ties count against the row."""
    pixels = np.zeros((6, SIDE, SIDE, 3), np.uint8)
    for i in range(6):
        pixels[i, i, :] = 255
    grey = np.full_like(pixels, 128)
    card = scorer.Retrieval(write_gallery(pixels)).evaluate(write_folder(grey))
    assert means(card) == {"exact": 0, "top5": 0}
    assert {row["rank"] for row in card["rows"]} == {6}


def test_several_right_images_and_captions(write_gallery, write_folder):
    pixels = tiles(6)
    texts = [{"text": ["raven", f"bird {i}"]} if i < 2 else {} for i in range(6)]
    real = write_gallery(pixels, texts)
    rows = [{"prompt": "raven", "prompt_index": i} for i in range(3)]
    card = scorer.Retrieval(real).evaluate(write_folder(noisy(pixels[:3]), rows))
    assert [row["rank"] == 1 for row in card["rows"]] == [True, True, False]
    keys = [{"key": ["k4", "k5"]}] * 2
    card = scorer.Retrieval(real, match="key").evaluate(
        write_folder(noisy(pixels[4:]), keys, name="lists")
    )
    assert means(card)["exact"] == 1


def test_groups_marks_and_rows_without_them(write_gallery, write_folder):
    pixels = tiles(8)
    fields = [{"tone": "dark" if i % 2 else "light", "person": "man"} for i in range(8)]
    fields[7] = {"tone": "light", "person": "woman"}
    real = write_gallery(pixels, fields)
    kinds = [{**row, "kind": "a" if i < 6 else "b"} for i, row in enumerate(fields)]
    kinds[0].pop("tone")
    # Each row shows its neighbour; the first two are right.
    generated = noisy(np.concatenate([pixels[:2], np.roll(pixels[2:], 1, axis=0)]))
    own = scorer.Retrieval(real, match="key", marks=("tone", "person"))
    card = own.evaluate(write_folder(generated, kinds))
    shown = [0, 1, 7, 2, 3, 4, 5, 6]
    for group, index in {"a": range(6), "b": range(6, 8), "all": range(8)}.items():
        scores = card["kinds"][group]["scores"]
        assert scores["exact"]["mean"] == np.mean([shown[i] == i for i in index])
        for field in ("tone", "person"):
            agree = [fields[shown[i]][field] == kinds[i][field] for i in index if field in kinds[i]]
            assert scores[field]["mean"] == pytest.approx(np.mean(agree))
            assert scores[field]["n"] == len(agree)
            others = [
                fields[shown[i]][field] == kinds[j][field]
                for i in index
                for j in index
                if i != j and field in kinds[i] and field in kinds[j]
            ]
            assert means(card, group, "chance")[field] == pytest.approx(np.mean(others))
    plain = own.evaluate(write_folder(generated, fields, name="plain"))
    assert set(plain["kinds"]) == {"all"}


def test_intervals_are_wilsons_over_prompts(write_gallery, write_folder):
    pixels = tiles(20)
    generated = noisy(np.concatenate([pixels[:15], np.roll(pixels[15:], 1, axis=0)]))
    card = scorer.Retrieval(write_gallery(pixels), match="key").evaluate(write_folder(generated))
    own = card["kinds"]["all"]["scores"]["exact"]
    expected = stats.binomtest(15, 20).proportion_ci(method="wilson")
    assert (own["mean"], own["n"]) == (0.75, 20)
    assert (own["low"], own["high"]) == pytest.approx(expected, abs=1e-4)
