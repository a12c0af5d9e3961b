"""`evaluate retrieval`: the verb, its figure and errors, pairs of folders, the scorer interface."""

import json
import re

import numpy as np
import pytest

from imagen_jax.cli import main
from imagen_jax.config import overrides
from imagen_jax.evaluation import intervals, report, samples
from imagen_jax.evaluation.retrieval import grid, scorer
from imagen_jax.evaluation.scorers import Scorer
from imagen_jax.inference import cascade
from imagen_jax.interop import weights
from imagen_jax.io import images
from tests.reference.fake_encoder import FakeEncoder
from tests.reference.galleries import SIDE, noisy, tiles


def retrieve(own, real, out, *flags):
    named = [f"--samples={own}", f"--gallery={real}", f"--out={out}"]
    return main.main(["evaluate", "retrieval", *named, *flags])


def test_from_prompts_to_card_table_and_report(
    base_config, random_params, write_gallery, tmp_path, monkeypatch, capsys
):
    """Samples of an untrained stage, written by `sample`."""
    stage = tmp_path / "stage"
    stage.mkdir()
    flat = weights.flatten(random_params(base_config))
    weights.write_safetensors(stage / "params.safetensors", flat)
    (stage / "config.json").write_text(overrides.to_json(base_config))
    monkeypatch.setattr(cascade, "load_text_encoder", lambda config: FakeEncoder())
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": f"a {i}", "key": f"k{i}", "kind": "ab"[i % 2], "tone": "x"} for i in range(4)
    ]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    own, real = tmp_path / "own", write_gallery(tiles(9), [{"tone": "x"}] * 9)
    flags = [f"--prompts={prompts}", f"--stages={stage}", f"--out={own}", "--samples_per_prompt=2"]
    assert main.main(["sample", *flags]) == 0
    out, grid = tmp_path / "card.json", tmp_path / "grid.png"
    flags = ["--match=key", "--by=kind", "--marks=tone", f"--grid={grid}", "--limit_grid=3"]
    capsys.readouterr()
    assert retrieve(own, real, out, *flags, "--credit=By me") == 0
    card = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert printed == scorer.Retrieval(real).format_table(card) + f"\n{grid}\n"
    assert "nearest of 9 real images (9 answers, 8 pixels)" in printed
    assert set(card["kinds"]) == {"a", "b", "all"} and len(card["rows"]) == 8
    assert card["kinds"]["all"]["scores"]["tone"]["mean"] == 1
    # The card by hand: distances at the samples' side.
    sides = [images.resize_host(image, 8) for image in tiles(9)]
    for row in card["rows"]:
        image = samples.load(own, row["file"]).astype(float)
        distances = np.square(image - sides).sum((1, 2, 3))
        right = int(row["right"][:3])
        assert row["rank"] == 1 + (distances < distances[right]).sum()
    assert "## Retrieval of the real image" in report.write(
        [str(out)], str(tmp_path / "report"), name="mine"
    )


def test_paired_difference_of_two_folders(write_gallery, write_folder, tmp_path, capsys):
    pixels = tiles(30)
    better, worse = noisy(pixels), noisy(pixels, seed=2)
    worse[:10] = np.roll(worse[:10], 1, axis=0)
    better[10] = worse[11]
    order = np.random.default_rng(0).permutation(30)  # The other folder has another order.
    rows = [{"prompt": f"thing {i}", "key": f"k{i}"} for i in order]
    first, second = write_folder(better), write_folder(worse[order], rows, name="other")
    real, out = write_gallery(pixels), tmp_path / "card.json"
    assert retrieve(first, real, out, f"--against={second}") == 0
    own = json.loads(out.read_text())["differences"]["all"]["exact"]
    # 10 right in the first only, 1 in the second only: Bonett & Price 2012.
    assert own["mean"] == pytest.approx(9 / 30) and own["n"] == 30
    p12, p21, n = 11 / 32, 2 / 32, 32
    half = 1.96 * np.sqrt((p12 + p21 - (p12 - p21) ** 2) / n)
    assert own["low"] == pytest.approx(p12 - p21 - half)
    assert own["high"] == pytest.approx(p12 - p21 + half)
    assert f"minus {second}, paired" in capsys.readouterr().out
    assert retrieve(first, real, out, f"--against={first}") == 0
    same = json.loads(out.read_text())["differences"]["all"]["exact"]
    assert same["mean"] == 0 and same["low"] < 0 < same["high"]


@pytest.mark.parametrize(("prompts", "count"), [(40, 1), (400, 1), (60, 4)])
def test_paired_intervals_cover_the_true_difference(prompts, count):
    """Two systems whose marks share a prompt's difficulty."""
    rng, covered = np.random.default_rng(prompts), []
    names = np.repeat(np.arange(prompts), count)
    for _ in range(1000):
        difficulty = rng.beta(4, 1, prompts)[names]
        first = rng.random(len(names)) < difficulty
        second = rng.random(len(names)) < difficulty * 0.9
        _, low, high = intervals.paired_difference(first - 1.0 * second, names)
        covered.append(low <= 0.8 * 0.1 <= high)
    assert 0.93 <= np.mean(covered) <= 0.985


def test_features_are_a_second_measure(write_gallery, write_folder, tmp_path, capsys):
    pixels = tiles(10, side=16)
    real, own = write_gallery(pixels), write_folder(noisy(pixels, 10))
    out = tmp_path / "card.json"
    assert retrieve(own, real, out, "--features=random_convolutions") == 0
    card = json.loads(out.read_text())
    scores = card["kinds"]["all"]["scores"]
    assert scores["exact"]["mean"] == 1 and scores["exact_random_convolutions"]["mean"] > 0.5
    assert "top-5_random_convolutions" in capsys.readouterr().out
    assert len(list((tmp_path / "card.features").iterdir())) == 3


def test_the_gallery_is_a_scorer(write_gallery, write_folder):
    pixels = tiles(6, side=20)
    own = scorer.Retrieval(write_gallery(pixels), match="key")
    assert isinstance(own, Scorer)
    assert own.can_score({"prompt": "a", "key": "k3"}) and not own.can_score({"prompt": "a"})
    row = {"prompt": "a", "key": "k3"}
    np.testing.assert_array_equal(own.real_image(row, index=0), pixels[3])
    assert own.real_image(row, index=0, size=10).shape == (10, 10, 3)
    folder = write_folder(noisy(pixels), [{"kind": "ab"[i % 2]} for i in range(6)])
    alone = {name: tally["scores"] for name, tally in own.evaluate(folder)["kinds"].items()}
    assert own.score_folder(folder) == alone and set(alone) == {"a", "b", "all"}


def test_real_images_of_other_sizes(write_gallery, write_folder, tmp_path):
    """Compared at the samples' size, centred squares."""
    small = tiles(5, side=16)
    large = [image.repeat(3, 0).repeat(3, 1) for image in small]
    large[2] = np.pad(large[2], ((48, 48), (0, 0), (0, 0)), constant_values=255)
    real = write_gallery(large)
    centred, out = write_folder(small), tmp_path / "card.json"
    assert retrieve(centred, real, out) == 0
    assert json.loads(out.read_text())["kinds"]["all"]["scores"]["exact"]["mean"] == 1
    assert json.loads(out.read_text())["gallery"]["size"] == 16
    assert retrieve(centred, real, out, "--size=4") == 0
    assert json.loads(out.read_text())["gallery"]["size"] == 4


def test_the_figure_shows_each_sample_beside_its_real_image(write_gallery, write_folder):
    pixels = tiles(5, side=16)
    generated = 255 - pixels
    wide = [np.pad(image, ((0, 0), (8, 8), (0, 0)), constant_values=9) for image in pixels]
    real, own = write_gallery(wide), write_folder(generated)
    results = scorer.Retrieval(real).evaluate(own)["rows"]
    sheet = grid.make_grid(own, real, results, limit=3)
    step = 2 * grid.SIDE + 2 * grid.GAP
    assert sheet.shape[1] == 3 * step + grid.GAP
    top = grid.LINE + grid.GAP
    band = sheet[top : top + grid.SIDE]
    for i in range(3):
        shown = band[:, grid.GAP + i * step :]
        np.testing.assert_array_equal(shown[:, : grid.SIDE], generated[i].repeat(8, 0).repeat(8, 1))
        beside = shown[:, grid.SIDE + grid.GAP :][:, : grid.SIDE]
        assert (beside[:32] == 255).all() and (beside[96:] == 255).all()  # Whole, on white.
        np.testing.assert_array_equal(beside[32:96], wide[i].repeat(4, 0).repeat(4, 1))
    assert (sheet[: grid.LINE] < 128).any() and (sheet[top + grid.SIDE :] < 128).any()
    credited = grid.make_grid(own, real, results, limit=3, credit="Art of many hands. " * 12)
    assert len(credited) - len(sheet) in (2 * grid.LINE, 3 * grid.LINE)
    np.testing.assert_array_equal(credited[: len(sheet)], sheet)
    assert (credited[-grid.LINE :] < 128).any()


def test_errors_in_one_line(write_gallery, write_folder, tmp_path, capsys):
    pixels = tiles(4)
    real = write_gallery(pixels, [{"tone": "x"}] * 4)
    rows = [{"tone": "x", "kind": "a"} for _ in range(4)]
    own = write_folder(pixels, rows)
    strange = write_folder(pixels, [{"key": f"z{i}", "prompt": "unicorn"} for i in range(4)], "z")
    uneven = write_folder([pixels[0], pixels[1][:8, :8]], name="uneven")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "card.json"
    for arguments, says in (
        ((own, real, out, "--match=kee"), "--match='kee' is not one of file_name, text, key, tone"),
        ((own, real, out, "--by=kid"), "--by='kid' is not one of .*did you mean 'kind'"),
        ((own, real, out, "--marks=kind"), "--marks='kind' is not one of file_name"),
        ((own, real, out, "--marks=ton"), "--marks='ton' is not one of .*did you mean 'tone'"),
        ((strange, real, out), r"row 1 \('unicorn'\): no image of the gallery has its prompt"),
        ((strange, real, out, "--match=key"), "no image of the gallery has key='z0'"),
        ((uneven, real, out), f"00001_00.png has 8x8 pixels, expected {SIDE}x{SIDE}"),
        ((own, tmp_path / "empty", out), "empty"),
        ((own, tmp_path / "none", out), "none is not a folder"),
        ((tmp_path / "empty", real, out), "no file .*samples.jsonl"),
        ((own, real, out, f"--against={strange}"), "'thing 0' is in one folder only"),
        ((own, real, out, "--near_duplicate=-1"), "--near_duplicate=-1.0 must be"),
    ):
        assert retrieve(*arguments) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert re.search(says, error), error
    assert not out.exists()
